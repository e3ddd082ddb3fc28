"""The table of targets: what a result is to run on. A new one is one file and one line here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnx_lowrank.config import Config
from onnx_lowrank.runtime import block_size
from onnx_lowrank.targets import coreml, cpu, mnn, nnapi, qnn, xnnpack
from onnx_lowrank.targets.measured import SUFFIX, Results, read_results
from onnx_lowrank.targets.partition import count_partitions
from onnx_lowrank.targets.target import Target
from onnx_lowrank.types import member_of

TARGETS: dict[str, Target] = {
    target.name: target for target in (cpu.TARGET, xnnpack.TARGET, nnapi.TARGET, coreml.TARGET, qnn.TARGET, mnn.TARGET)
}

__all__ = ["TARGETS", "Results", "Target", "block_of", "count_partitions", "find_target"]


def block_of(config: Config) -> int:
    """Multiple that ranks are kept to, and channels where dead ones are dropped."""
    return config.align or find_target(config.target).block or block_size()


def find_target(name: str) -> Target:
    """The member called `name`; of a file with results of a device, what it was made for, with the times in it.

    Raises
    ------
    LowRankError
        For a name that is not in the table, or a file that holds no results.
    """
    if name.endswith(SUFFIX):
        results = read_results(Path(name))
        made_for = member_of(TARGETS, "target", results.target)
        return replace(made_for, name=Path(name).name, block=results.align, results=results)
    return member_of(TARGETS, "target", name)

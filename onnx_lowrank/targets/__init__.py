"""The table of targets: what a result is to run on. A new one is one file and one line here."""

from __future__ import annotations

from onnx_lowrank.targets import coreml, cpu, nnapi, qnn, xnnpack
from onnx_lowrank.targets.partition import count_partitions
from onnx_lowrank.targets.target import Target
from onnx_lowrank.types import member_of

TARGETS: dict[str, Target] = {
    target.name: target for target in (cpu.TARGET, xnnpack.TARGET, nnapi.TARGET, coreml.TARGET, qnn.TARGET)
}

__all__ = ["TARGETS", "Target", "count_partitions", "find_target"]


def find_target(name: str) -> Target:
    """The member called `name`.

    Raises
    ------
    LowRankError
        For a name that is not in the table.
    """
    return member_of(TARGETS, "target", name)

"""What a result is to run on, as data: formats that it takes, the width of its kernels, and how its parts are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx_lowrank.candidates import Formats
from onnx_lowrank.runtime import OpList
from onnx_lowrank.targets.measured import Results

ANY = (0, 1, 2, 3)


@dataclass(frozen=True)
class Target:
    """A place that models run on.

    Parameters
    ----------
    name
        What ``--target`` calls it.
    provider
        The execution provider that runs models there.
    spatial
        Numbers of spatial axes with which it takes Conv, ConvTranspose, and products (always 0); an operator that is not
        here it does not take.
    block
        Channels to which ranks are aligned; None takes those of this machine's kernels.
    ops
        The operators that it takes, where its parts can be told without it.
    eight_bits
        Whether it takes models in QDQ form.
    compiled
        Whether it compiles the parts that it takes, so that a border between two costs a copy.
    engine
        Whether another engine than ONNX Runtime runs models there, and times them on this machine.
    results
        Times measured on a device.
    without
        What can be checked without the device, in words.
    """

    name: str
    provider: str
    spatial: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"Conv": ANY, "ConvTranspose": ANY, "Gemm": ANY, "MatMul": ANY}
    )
    block: int | None = None
    ops: OpList | None = None
    eight_bits: bool = True
    compiled: bool = False
    engine: bool = False
    results: Results | None = None
    without: str = ""

    @property
    def formats(self) -> Formats:
        """The part of it that work on layers needs, wherever that is done."""
        return Formats(self.name, self.spatial)

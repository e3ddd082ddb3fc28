"""``mnn``: MNN, timed on this machine by its Python package. It takes every form; which is fast differs from ONNX Runtime."""

from __future__ import annotations

from onnx_lowrank.runtime import MNN
from onnx_lowrank.targets.target import Target

TARGET = Target(
    "mnn",
    MNN,
    engine=True,
    without="everything on the CPU of this machine, times too, in float32: pip install 'onnx-lowrank[mnn]'; times of a phone's "
    "processor are its own",
)

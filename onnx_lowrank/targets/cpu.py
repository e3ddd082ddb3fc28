"""``cpu``: ONNX Runtime's own kernels on this machine. Everything is taken, and times are measured."""

from __future__ import annotations

from onnx_lowrank.runtime import CPU
from onnx_lowrank.targets.target import Target

TARGET = Target("cpu", CPU)

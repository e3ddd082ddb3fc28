"""``xnnpack``: the CPU of a phone. It takes nodes one by one, so that its parts do not count; the rest runs beside it."""

from __future__ import annotations

from onnx_lowrank.targets.target import Target

TARGET = Target(
    "xnnpack",
    "XnnpackExecutionProvider",
    # XNNPACK has 2-D convolutions and deconvolutions, and fully connected layers
    {"Conv": (2,), "ConvTranspose": (2,), "Gemm": (0,), "MatMul": (0,)},
    block=8,  # its kernels for ARM work on 8 channels of the output at a time
    without="formats: 2-D convolutions and products only, ranks in steps of 8",
)

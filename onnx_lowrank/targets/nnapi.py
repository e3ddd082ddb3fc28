"""``nnapi``: accelerators of Android phones by NNAPI. What it takes comes from the list that ONNX Runtime keeps."""

from __future__ import annotations

from onnx_lowrank.runtime import OpList
from onnx_lowrank.targets.target import Target

POOLS = ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")

TARGET = Target(
    "nnapi",
    "NnapiExecutionProvider",
    {"Conv": (2,), "Gemm": (0,), "MatMul": (0,)},
    block=8,  # drivers differ: the width of the narrowest kernels of ARM
    ops=OpList(
        "nnapi_supported_ops.md",
        spatial={**dict.fromkeys(("Conv", "Resize", *POOLS), (2,))},
        stored={"Conv": (1, 2), "Gemm": (1,)},
    ),
    compiled=True,
    without="formats (2-D convolutions, stored weights), and the parts before and after by ONNX Runtime's list of operators",
)

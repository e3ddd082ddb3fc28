"""``coreml``: Apple's devices by CoreML, as an MLProgram. What it takes comes from the list that ONNX Runtime keeps."""

from __future__ import annotations

from onnx_lowrank.runtime import OpList
from onnx_lowrank.targets.target import Target

POOLS = ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")

TARGET = Target(
    "coreml",
    "CoreMLExecutionProvider",
    {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0,), "MatMul": (0,)},
    block=8,  # CoreML chooses the processor by itself: the width of the narrowest kernels of ARM
    ops=OpList(
        "coreml_supported_mlprogram_ops.md",
        spatial={**dict.fromkeys(("Conv", "ConvTranspose"), (1, 2)), **dict.fromkeys(POOLS, (2,))},
        # the weight of a Conv may be computed, by the note; ours are stored
        stored={"Conv": (2,), "ConvTranspose": (1, 2), "Gemm": (1,)},
        most_axes=5,
    ),
    eight_bits=False,  # its list has neither QuantizeLinear nor DequantizeLinear
    compiled=True,
    without="formats (1-D and 2-D convolutions, stored weights), and the parts before and after by ONNX Runtime's list of operators",
)

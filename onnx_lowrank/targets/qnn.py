"""``qnn``: the accelerator of Qualcomm's phones. Its simulator is a Python package, and says itself what it takes."""

from __future__ import annotations

from onnx_lowrank.targets.target import Target

TARGET = Target(
    "qnn",
    "QNNExecutionProvider",
    {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0,), "MatMul": (0,)},
    block=32,  # tensors of HTP lie in blocks of 32 channels
    compiled=True,
    without="formats; numerics and placement on the simulator: pip install onnxruntime-qnn, then verify --provider qnn "
    "--provider-option backend_type=htp (its times say nothing of a phone's)",
)

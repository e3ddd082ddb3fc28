"""INT8 as onnxruntime.quantization makes it: QDQ, a scale for each channel of a kernel, ranges by MinMax."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.model import load
from tools.benchmark_int8 import RANGES, Reader


def alone(model: Path, samples: Path) -> Callable[[float | None, Path], None]:
    def make(share: float | None, out: Path) -> None:
        folded = load(model).copy()
        fold_batchnorm(folded)  # quantize_static wants it done, and its own pre-processing does it by ONNX Runtime
        first, name = out.with_suffix(".folded.onnx"), folded.graph.input[0].name
        onnx.save(folded.proto, first)
        with np.load(samples) as archive:
            pictures = archive[name][:RANGES]
        quantize_static(
            first,
            out,
            Reader({name: pictures[i : i + 32]} for i in range(0, len(pictures), 32)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )

    return make

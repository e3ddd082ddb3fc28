"""INT8 as onnxruntime.quantization makes it: see :func:`tools.benchmark_int8.alone`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnx_lowrank.graph.model import load
from tools import benchmark_int8


def alone(model: Path, samples: Path) -> Callable[[float | None, Path], None]:
    def make(share: float | None, out: Path) -> None:
        with np.load(samples) as archive:
            pictures = archive[load(model).graph.input[0].name]
        benchmark_int8.alone(model, out, pictures)

    return make

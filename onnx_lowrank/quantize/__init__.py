"""INT8 on top of a decomposition: scales equalised along chains, ranges of least error, QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank.calibrate import Batch
from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.shapes import Shapes, infer
from onnx_lowrank.quantize.choose import Choice, Measured, beginnings, choose
from onnx_lowrank.quantize.equalize import equalized
from onnx_lowrank.quantize.qdq import check_unquantized, insert_qdq, quantizable
from onnx_lowrank.quantize.ranges import Ranges, find_ranges

__all__ = [
    "Choice",
    "Measured",
    "as_quantized",
    "beginnings",
    "check_unquantized",
    "choose",
    "insert_qdq",
    "measure_ranges",
    "prepared",
]

SAMPLES = 512
"""That ranges are taken from at most."""


def prepared(model: Model, feeds: Sequence[Batch]) -> Model:
    """`model` with the same function (up to rounding), ready to be quantised: normalisations folded, chains equalised."""
    folded = model.copy()
    fold_batchnorm(folded)
    return equalized(folded, few(feeds))


def measure_ranges(model: Model, feeds: Sequence[Batch]) -> Ranges:
    """The ranges of all tensors that may be quantised, on samples."""
    return find_ranges(model, few(feeds), quantizable(model))


def as_quantized(model: Model, sizes: Shapes, beginning: int = 0) -> Model:
    """`model` in eight bits with ranges that are made up: it takes as long as one with true ones.

    Parameters
    ----------
    sizes
        Of the inputs, for one sample.
    beginning
        Which of the :func:`beginnings` of the model stays in floating point; 0 for none.
    """
    folded = model.copy()
    fold_batchnorm(folded)
    left = beginnings(folded, infer(folded, sizes) if beginning else {})
    return insert_qdq(folded, dict.fromkeys(quantizable(folded), (-1.0, 1.0)), left[min(beginning, len(left) - 1)])


def few(feeds: Sequence[Batch]) -> list[Batch]:
    """The first samples, batch by batch."""
    taken: list[Batch] = []
    left = SAMPLES
    for batch in feeds:
        if left <= 0:
            break
        taken.append(batch)
        left -= max((len(value) for value in batch.values() if value.ndim), default=1)
    return taken

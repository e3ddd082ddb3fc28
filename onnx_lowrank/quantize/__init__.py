"""INT8 on top of a decomposition: scales equalised along chains, ranges of least error, QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_lowrank.calibration.calibrate import Batch, few
from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.simplify import computed_constants, lift_constants, name_nodes
from onnx_lowrank.quantize.choose import Choice, beginnings, choose
from onnx_lowrank.quantize.equalize import equalized
from onnx_lowrank.quantize.qdq import check_unquantized, insert_qdq, quantizable
from onnx_lowrank.quantize.ranges import Ranges, find_ranges
from onnx_lowrank.shortcuts import fold_shortcuts, store_computed

__all__ = [
    "Choice",
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
    """`model` with the same function (up to rounding), ready to be quantised.

    Constants are stored, normalisations folded, shortcuts that slice and pad made convolutions, chains equalised.
    """
    return equalized(_simple(model, {name: value.shape for name, value in feeds[0].items()}), few(feeds, SAMPLES))


def measure_ranges(model: Model, feeds: Sequence[Batch]) -> Ranges:
    """The ranges of all tensors that may be quantised, on samples."""
    return find_ranges(model, few(feeds, SAMPLES), quantizable(model))


def as_quantized(model: Model, sizes: Mapping[str, tuple[int, ...]], beginning: int = 0) -> Model:
    """`model` in eight bits with ranges that are made up: it takes as long as one with true ones.

    Parameters
    ----------
    sizes
        Of the inputs, for one sample.
    beginning
        Which of the :func:`beginnings` of the model stays in floating point; 0 for none.
    """
    simple = _simple(model, sizes)
    left = beginnings(simple, infer(simple, dict(sizes)) if beginning else {})
    return insert_qdq(simple, dict.fromkeys(quantizable(simple), (-1.0, 1.0)), left[min(beginning, len(left) - 1)])


def _simple(model: Model, sizes: Mapping[str, tuple[int, ...]]) -> Model:
    copy = model.copy()
    name_nodes(copy)
    lift_constants(copy)
    store_computed(copy, computed_constants(copy))
    fold_batchnorm(copy)
    fold_shortcuts(copy, sizes)
    return copy

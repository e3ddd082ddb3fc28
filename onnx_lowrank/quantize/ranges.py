"""Ranges of tensors: what eight bits have to cover, with the outermost values cut off where that makes the error smaller."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from onnx_lowrank.calibration.calibrate import Batch, parts
from onnx_lowrank.graph.model import Model, serialize
from onnx_lowrank.graph.shapes import with_outputs
from onnx_lowrank.runtime import RunSettings, Session

Ranges = dict[str, tuple[float, float]]
"""For each tensor the smallest and the largest number that it can hold in eight bits."""

PART = 16
"""Samples run at a time: every tensor of the model is alive for them."""

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the whole range, to choose from."""

ELEMENTS = 1 << 16
"""Of a tensor, that one portion of the samples adds to the errors."""

LEVELS = 255

LARGEST = 1e4
"""Numbers from here on stand for infinity: no range that holds them leaves anything of the others."""


def find_ranges(model: Model, feeds: Sequence[Batch], names: Collection[str]) -> Ranges:
    """The range of least squared error of each tensor that is found to be of floating point.

    Parameters
    ----------
    names
        Tensors of the main graph; stored ones are left out.
    """
    whole: Ranges = {}
    for made in outputs_of(model, feeds, names):
        for name, value in made.items():
            if value.dtype.kind == "f" and value.size:
                low, high = whole.get(name, (0.0, 0.0))  # zero is always one of the numbers: padding needs it
                whole[name] = min(low, float(value.min())), max(high, float(value.max()))
    whole = {
        name: span for name, span in whole.items() if max(-span[0], span[1]) < LARGEST
    }  # masks, and what overflows
    errors: dict[str, np.ndarray] = {}
    for made in outputs_of(model, feeds, list(whole)):
        for name, value in made.items():
            flat = value.reshape(-1)[:: max(1, value.size // ELEMENTS)].astype(np.float64)
            found = [_error(flat, whole[name], share) for share in SHARES]
            errors[name] = errors.get(name, 0.0) + np.array(found)
    best = {name: SHARES[int(np.argmin(error))] for name, error in errors.items()}
    return {name: (low * best[name], high * best[name]) for name, (low, high) in whole.items()}


def _error(values: np.ndarray, whole: tuple[float, float], share: float) -> float:
    """Squared error of `values` in steps of a share of the range."""
    low, high = whole[0] * share, whole[1] * share
    step = (high - low) / LEVELS
    if not step > 0 or not np.isfinite(step):
        return 0.0
    zero = np.round(-low / step)
    held = (np.clip(np.round(values / step) + zero, 0, LEVELS) - zero) * step
    return float(np.square(values - held).sum())


def outputs_of(model: Model, feeds: Sequence[Batch], names: Collection[str]) -> Iterator[dict[str, np.ndarray]]:
    """Values of tensors, one portion of the samples after the other."""
    inputs = {value.name for value in model.graph.input}
    made = [name for name in names if name not in inputs]
    fed = [value.type.tensor_type.shape.dim for value in model.graph.input]
    free = all(not sizes or not sizes[0].HasField("dim_value") for sizes in fed)
    session = Session(serialize(with_outputs(model, made)), RunSettings(optimize=False), folder=model.folder)
    for batch in feeds:
        for part in parts(batch, PART if free else 0):
            values = session.run(part, made) if made else []
            yield {**{n: part[n] for n in names if n in part}, **dict(zip(made, values, strict=True))}

"""Which nodes stay in floating point, and whether activations have a sign: by measurement.

Early layers with large pictures and few channels gain the least from eight bits and are the most sensitive: so the model is tried
with its nodes up to each change of resolution left alone, as one part, that pays for one conversion. Then the layers that do the
most damage are left alone one by one, as long as that helps and costs no time worth mentioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_lowrank.calibration.calibrate import Batch, few
from onnx_lowrank.calibration.sensitivity import difference
from onnx_lowrank.graph.model import Model, serialize
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.quantize.qdq import LINEAR, insert_qdq
from onnx_lowrank.quantize.ranges import Ranges
from onnx_lowrank.runtime import RunSettings, Session

ALIKE = 1.03
"""Times within this factor of each other are alike: the smaller error decides."""

BOUNDARIES = 3
"""Changes of resolution that are tried."""

HELPS = 0.9
"""Share of the error that has to be left, or less, for a layer to stay in floating point."""

GOOD = 1e-3
"""An error with which nothing more is tried."""

RANKED = 24
"""Chains whose part in the error is looked at, the first ones: errors there go through all that follows."""

TRIED = 6
"""Layers that may stay in floating point one by one."""

SAMPLES = 128
"""That errors are looked at on, about."""


@dataclass(frozen=True)
class Choice:
    """A quantised model.

    Parameters
    ----------
    given
        What it was made from; of the same function but for rounding.
    float_nodes
        Names of its nodes that stayed in floating point.
    error
        Squared difference that rounding makes to the outputs, over their variance.
    ms
        Its time.
    size
        Its bytes.
    """

    given: Model
    ranges: Ranges
    float_nodes: tuple[str, ...]
    signed: bool
    model: Model
    error: float = math.nan
    ms: float = math.nan
    size: int = 0

    def of(self, model: Model) -> Choice:
        """Another model with the same tensors, quantised the same way."""
        return replace(self, given=model, model=insert_qdq(model, self.ranges, self.float_nodes, signed=self.signed))

    @property
    def note(self) -> str:
        """For the report."""
        kind = "signed" if self.signed else "unsigned"
        linear = [node.name for node in self.given.graph.node if node.op_type in LINEAR]
        bytes_ = kernels_in_bytes(self.model)
        kept = [name for name in linear if name not in bytes_]
        named = f" ({', '.join(kept[:3])}{'...' if len(kept) > 3 else ''})" if kept else ""
        return (
            f"INT8 (QDQ, {kind} activations, a scale for each channel of a kernel): {len(kept)} of {len(linear)} convolutions and "
            f"products stay in floating point{named}"
        )


def choose(
    model: Model,
    shapes: Shapes,
    ranges: Ranges,
    held: Sequence[Batch],
    time: Callable[[Model], float],
    most: float = math.inf,
) -> Choice:
    """The fastest way to quantise `model`, and of those alike the one with the smallest error.

    Parameters
    ----------
    model
        Prepared; see :func:`onnx_lowrank.quantize.prepared`.
    held
        Samples to see errors on.
    time
        The time of a model.
    most
        Bytes that it may have; where no way has so few, the smallest is taken.
    """
    held = few(held, SAMPLES)
    wanted = _outputs(model, held)

    def made(nodes: Sequence[str], signed: bool = False) -> Choice:
        quantized = insert_qdq(model, ranges, nodes, signed=signed)
        got = _outputs(quantized, held)
        alike = all(a.shape == b.shape for g, w in zip(got, wanted, strict=True) for a, b in zip(g, w, strict=True))
        error = difference(got, wanted) if alike else math.inf
        return Choice(model, ranges, tuple(nodes), signed, quantized, error, size=quantized.proto.ByteSize())

    def timed(choice: Choice) -> Choice:
        return replace(choice, ms=time(choice.model))

    choices = [timed(made(nodes)) for nodes in beginnings(model, shapes)] + [timed(made((), signed=True))]
    least = max(most, min(choice.size for choice in choices))
    choices = [choice for choice in choices if choice.size <= least]
    limit = ALIKE * min(choice.ms for choice in choices)
    best = min((choice for choice in choices if choice.ms <= limit), key=lambda choice: choice.error)
    chains = [chain for chain in _chains(model) if not set(chain) & set(best.float_nodes)]
    room = min(TRIED, len(chains) // 2) if best.error > GOOD else 0
    ranked = sorted(chains[:RANKED] if room else [], key=lambda c: made((*best.float_nodes, *c), best.signed).error)
    for chain in ranked[:room]:
        without = made((*best.float_nodes, *chain), best.signed)
        if without.error > HELPS * best.error or without.size > least:
            continue
        without = timed(without)
        best = without if without.ms <= limit else best
    return best


def kernels_in_bytes(model: Model) -> set[str]:
    """Names of the convolutions and products of a quantised model whose kernel is stored in eight bits."""
    stored = {tensor.name for tensor in model.graph.initializer}
    small = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    return {n.name for n in model.graph.node if n.op_type in LINEAR and n.input[1] in small}


def _outputs(model: Model, held: Sequence[Batch]) -> list[list[np.ndarray]]:
    session = Session(serialize(model), RunSettings(), folder=model.folder)
    return [session.run(batch) for batch in held]


def _chains(model: Model) -> list[list[str]]:
    """Names of linear nodes, those together that follow each other with nothing in between."""
    found: list[list[str]] = []
    place: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type not in LINEAR or not node.name:
            continue
        chain = place.get(node.input[0])
        if chain is None:
            found.append(chain := [])
        chain.append(node.name)
        place[node.output[0]] = chain
    return found


def beginnings(model: Model, shapes: Shapes) -> list[list[str]]:
    """Names of the nodes before each of the first changes of resolution; first none.

    Parameters
    ----------
    shapes
        Of the outputs of convolutions, for one sample.
    """
    found: list[list[str]] = [[]]
    before: list[str] = []
    size = math.inf
    for node in model.graph.node:
        shape = shapes.get(node.output[0], ()) if node.output else ()
        if node.op_type == "Conv" and len(shape) > 2:
            pixels = math.prod(shape[2:])
            if pixels < size < math.inf and all(before):
                found.append(list(before))
            size = min(size, pixels)
        before.append(node.name)
    return found[: BOUNDARIES + 1]

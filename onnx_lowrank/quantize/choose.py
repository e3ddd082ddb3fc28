"""Which nodes stay in floating point, and whether activations have a sign: by measurement.

Early layers with large pictures and few channels gain the least from eight bits and are the most sensitive: so the model is tried
with its nodes up to each change of resolution left alone, as one part, that pays for one conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.quantize.qdq import insert_qdq
from onnx_lowrank.quantize.ranges import Ranges

ALIKE = 1.03
"""Times within this factor of each other are alike: the smaller error decides."""

BOUNDARIES = 3
"""Changes of resolution that are tried."""


@dataclass(frozen=True)
class Measured:
    """What a quantised model does: how far its outputs are from the original's, and its time."""

    difference: float
    ms: float


@dataclass(frozen=True)
class Choice:
    """A quantised model.

    Parameters
    ----------
    given
        What it was made from; of the same function but for rounding.
    float_nodes
        Names of its nodes that stayed in floating point.
    """

    given: Model
    ranges: Ranges
    float_nodes: tuple[str, ...]
    signed: bool
    model: Model
    measured: Measured

    def of(self, model: Model) -> Choice:
        """Another model with the same tensors, quantised the same way."""
        return replace(self, given=model, model=insert_qdq(model, self.ranges, self.float_nodes, signed=self.signed))

    @property
    def note(self) -> str:
        """For the report."""
        kind = "signed" if self.signed else "unsigned"
        kept = f"the first {len(self.float_nodes)} nodes stay in floating point" if self.float_nodes else "all layers"
        return f"INT8 (QDQ, {kind} activations, a scale for each channel of a kernel): {kept}, as measured"


def choose(model: Model, shapes: Shapes, ranges: Ranges, measure: Callable[[Model], Measured]) -> Choice:
    """The fastest way to quantise `model`, and of those alike the one with the smallest error.

    Parameters
    ----------
    model
        Prepared; see :func:`onnx_lowrank.quantize.prepared`.
    measure
        Time and error of a model.
    """

    def made(nodes: Sequence[str], signed: bool) -> Choice:
        quantized = insert_qdq(model, ranges, nodes, signed=signed)
        return Choice(model, ranges, tuple(nodes), signed, quantized, measure(quantized))

    choices = [made(nodes, False) for nodes in beginnings(model, shapes)] + [made((), True)]
    fastest = min(choice.measured.ms for choice in choices)
    close = [choice for choice in choices if choice.measured.ms <= ALIKE * fastest]
    return min(close, key=lambda choice: choice.measured.difference)


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

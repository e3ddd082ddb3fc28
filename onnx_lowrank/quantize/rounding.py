"""What a quantised model rounds, read off its nodes: for those who train through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.plain import plain_graph


@dataclass(frozen=True)
class Steps:
    """The numbers that a tensor can take: ``(i - zero) * scale`` for whole i from `low` to `high`."""

    scale: float
    zero: int
    low: int
    high: int


@dataclass(frozen=True)
class Rounding:
    """What becomes of the tensors of a float model.

    Parameters
    ----------
    activations
        Steps of tensors, by name.
    weights
        For each stored kernel the axis along which it has a scale for each channel; None where one serves all.
    """

    activations: Mapping[str, Steps] = field(default_factory=dict)
    weights: Mapping[str, int | None] = field(default_factory=dict)


def rounding_of(model: Model, quantized: Model) -> Rounding:
    """What `quantized` rounds of `model`, which it was made from."""
    plain, small = plain_graph(model), plain_graph(quantized)
    kernels = {node.key: node.inputs for node in plain.nodes}
    made = {node.key: node.outputs[0] for node in plain.nodes}
    known = {*plain.inputs, *made.values()}
    producers = {name: node for node in small.nodes for name in node.outputs}
    activations: dict[str, Steps] = {}
    weights: dict[str, int | None] = {}
    for node in small.nodes:
        if node.op_type == "QuantizeLinear":
            scale = float(small.values[node.inputs[1]])
            zero = small.values[node.inputs[2]] if len(node.inputs) > 2 else np.zeros((), np.uint8)
            bounds = np.iinfo(zero.dtype)
            name = node.inputs[0]
            if name not in known:  # an output of the graph, whose name the rounded one has now
                name = made[producers[name].key]
            activations[name] = Steps(scale, int(zero), int(bounds.min), int(bounds.max))
            continue
        old = kernels.get(node.key) if node.op_type != "DequantizeLinear" else None
        for place, name in enumerate(node.inputs[:2]):
            source = producers.get(name)
            if old is None or place >= len(old) or source is None or source.op_type != "DequantizeLinear":
                continue
            if source.inputs[0] in small.stored and old[place] in plain.stored:
                several = small.values[source.inputs[1]].size > 1
                weights[old[place]] = source.attributes.get("axis", 1) if several else None
    return Rounding(activations, weights)

"""Scales within a chain, so that eight bits serve every channel alike.

Between two linear nodes with nothing in between, channel c may be multiplied by any s_c and divided by it again: the function
stays. One scale has to serve all channels of a quantised tensor, so each is given the same largest value. The weights before have a
scale for each channel anyway; those behind then weigh every channel by what it really contributes.

References
----------
Nagel, van Baalen, Blankevoort & Welling (2019), "Data-free quantization through weight equalization and bias correction",
arXiv 1906.04721, whose factor is the geometric mean of both sides where one scale serves a whole weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.calibration.calibrate import Batch
from onnx_lowrank.graph.model import Model, readers
from onnx_lowrank.graph.plain import PlainGraph, PlainNode, plain_graph, with_values
from onnx_lowrank.quantize.ranges import outputs_of

Scaling = Callable[[np.ndarray], np.ndarray]

FLOOR = 1e-4
"""Channels that are smaller than this share of the largest count as that: they may be all zeros."""


@dataclass(frozen=True)
class Link:
    """A tensor that one linear node makes and another alone reads."""

    name: str
    before: PlainNode
    after: PlainNode


def links(model: Model, graph: PlainGraph) -> list[Link]:
    """Tensors whose channels can be scaled, in the order of the graph; every weight and bias has no other reader."""
    count = readers(model.proto)
    producers = {node.outputs[0]: node for node in graph.nodes if node.outputs}
    weights = Counter(name for node in graph.nodes for name in node.inputs[1:])

    def own(node: PlainNode) -> bool:
        names = [name for name in node.inputs[1:] if name]
        stored = all(name in graph.stored and name not in graph.overridable for name in names)
        return stored and all(weights[name] == count[name] == 1 for name in names)

    found = []
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before is None or count[node.inputs[0]] != 1 or not (_linear(before, graph) and _linear(node, graph)):
            continue
        if (before.op_type == "Conv") == (node.op_type == "Conv") and own(before) and own(node):
            found.append(Link(node.inputs[0], before, node))
    return found


def equalized(model: Model, feeds: Sequence[Batch]) -> Model:
    """`model` with the channels between linear nodes scaled to the same largest value on the samples.

    A tensor within a chain is seen before anything is scaled; factors of several links of one chain multiply.
    """
    graph = plain_graph(model)
    found = links(model, graph)
    if not found:
        return model
    values: dict[str, np.ndarray] = {}
    peaks = _peaks(model, feeds, found)
    for link in found:
        peak = np.maximum(peaks[link.name], peaks[link.name].max() * FLOOR)
        if not peak.max() > 0:
            continue
        factor = peak.max() / peak
        for name, scaled in (*_scaled_outputs(link.before, factor), *_scaled_inputs(link.after, factor)):
            old = values.get(name, graph.stored[name]).astype(np.float64)
            values[name] = scaled(old)
    return with_values(model, values)


def _linear(node: PlainNode, graph: PlainGraph) -> bool:
    """Whether a node multiplies its first input by a stored kernel, and adds nothing to it but a bias."""
    if node.domain or len(node.inputs) < 2 or node.inputs[1] not in graph.stored:
        return False
    if node.op_type == "Gemm":
        return not node.attributes.get("transA", 0) and (len(node.inputs) == 2 or _plain_bias(node, graph))
    return node.op_type == "Conv" or (node.op_type == "MatMul" and graph.stored[node.inputs[1]].ndim == 2)


def _plain_bias(node: PlainNode, graph: PlainGraph) -> bool:
    outputs = graph.stored[node.inputs[1]].shape[0 if node.attributes.get("transB", 0) else 1]
    return node.inputs[2] in graph.stored and graph.stored[node.inputs[2]].shape == (outputs,)


def _peaks(model: Model, feeds: Sequence[Batch], found: Sequence[Link]) -> dict[str, np.ndarray]:
    """The largest magnitude of every channel."""
    axes = {link.name: 1 if link.after.op_type == "Conv" else -1 for link in found}
    peaks: dict[str, np.ndarray] = {}
    for made in outputs_of(model, feeds, list(axes)):
        for name, value in made.items():
            rows = np.moveaxis(value, axes[name], 0)
            peak = np.abs(rows.reshape(len(rows), -1)).max(axis=1).astype(np.float64)
            peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
    return peaks


def _scaled_outputs(node: PlainNode, factor: np.ndarray) -> Iterator[tuple[str, Scaling]]:
    """The kernel and bias of a node, with its output channels multiplied."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get("transB", 0)):
        yield node.inputs[1], lambda w: w * factor.reshape(-1, *[1] * (w.ndim - 1))
    else:
        yield node.inputs[1], lambda w: w * factor
    if len(node.inputs) > 2 and node.inputs[2]:
        yield node.inputs[2], lambda b: b * factor


def _scaled_inputs(node: PlainNode, factor: np.ndarray) -> Iterator[tuple[str, Scaling]]:
    """The kernel of a node, with its input channels divided."""
    if node.op_type == "Conv":
        group = node.attributes.get("group", 1)

        def divided(w: np.ndarray) -> np.ndarray:
            parts = w.reshape(group, len(w) // group, w.shape[1], -1)
            result: np.ndarray = (parts / factor.reshape(group, 1, -1, 1)).reshape(w.shape)
            return result

        yield node.inputs[1], divided
    elif node.op_type == "Gemm" and node.attributes.get("transB", 0):
        yield node.inputs[1], lambda w: w / factor
    else:
        yield node.inputs[1], lambda w: w / factor[:, None]

"""Which layer of a model each node of its optimised graph works for: what makes measured times into times of layers.

A runtime fuses a layer with its BatchNormalization, its activation and a residual Add, changes the layout of tensors
around it, and renames what it touches. The time of a layer is that of all this, before and after the layer is
decomposed alike: a chain whose last stage no longer takes in the Add pays for the Add.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model

ELEMENTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "HardSwish",
        "Softplus",
        "Elu",
        "Selu",
        "Gelu",
        "Erf",
        "Pow",
        "Sqrt",
        "Mish",
        "BatchNormalization",
        "Identity",
        "QuickGelu",
        "BiasGelu",
        "FastGelu",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
)
"""What works on each element of a layer's output by itself, and so goes with the layer that it waits for."""

LAYOUT = frozenset(("ReorderInput", "ReorderOutput", "Reshape", "Transpose", "Squeeze", "Unsqueeze"))
"""What a runtime puts around the layers that it fuses; it goes with what it stands behind."""

_RENAMED = re.compile(r"(_nchwc)?(_token_\d+)?$")


@dataclass(frozen=True)
class Owned:
    """A node of an optimised graph, and the layer that it works for."""

    name: str
    op_type: str
    layer: str


def own_nodes(model: Model, found: Found) -> dict[str, tuple[str, ...]]:
    """For each layer, the name of its node (or of its first output), as :func:`owners` takes them."""
    return {name: (_name(model.graph.node[place.position]),) for name, place in found.places.items()}


def _name(node: onnx.NodeProto) -> str:
    return node.name or next((output for output in node.output if output), "")


def owners(model: Model, nodes: Mapping[str, Sequence[str]], optimized: str | Path) -> list[Owned]:
    """The nodes of an optimised graph that belong to a layer, in its order.

    Parameters
    ----------
    model
        What the runtime was given.
    nodes
        For each layer, the names of its nodes in `model` (for one without a name, of its first output).
    optimized
        The file that the runtime wrote its optimised graph to.
    """
    known = _tensors(model, nodes)
    names = sorted(((name, layer) for layer, members in nodes.items() for name in members), key=lambda p: -len(p[0]))
    graph = onnx.load(str(optimized), load_external_data=False).graph
    found: list[Owned] = []
    for node in graph.node:
        layer = _owner(node, known, names)
        if layer is None and node.op_type in LAYOUT:
            layer = next((known[i] for i in node.input[:1] if i in known), None)
        if layer:
            found.append(Owned(node.name, node.op_type, layer))
            known.update({output: layer for output in node.output if output not in known})
    return found


def _tensors(model: Model, nodes: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """For each tensor that a node of `model` makes, the layer that it comes from; None where it comes from none."""
    members = {name: layer for layer, each in nodes.items() for name in each}
    known: dict[str, str | None] = {}
    order: dict[str, int] = {}
    for position, node in enumerate(model.graph.node):
        layer = members.get(_name(node))
        if layer is None and node.op_type in ELEMENTWISE:
            waited = [i for i in node.input if known.get(i)]
            latest = max(waited, key=lambda i: order[i], default=None)
            layer = known[latest] if latest else None
        for output in node.output:
            known[output], order[output] = layer, position
    return known


def _owner(node: onnx.NodeProto, known: Mapping[str, str | None], names: Iterable[tuple[str, str]]) -> str | None:
    """By what it makes, else by its name, which a runtime derives from what the node stands for."""
    for output in node.output:
        if output in known:
            return known[output]
    stem = _RENAMED.sub("", node.name)
    if stem in known:
        return known[stem]
    if node.op_type in LAYOUT:
        return None
    return next((layer for name, layer in names if name and name in node.name), None)

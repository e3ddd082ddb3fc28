"""Layers that repeat: of one shape, in one section between down-samplings, at one place of the repeated block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.types import Layer

FOLLOWED = 3
"""Operators after a layer that tell its place in a block."""


@dataclass(frozen=True)
class Section:
    """Layers that may share a factor of their kernels.

    Parameters
    ----------
    layers
        In the order of the graph.
    shortcut
        True where they lead around a block: pointwise, straight into a sum, from a tensor that others read as well.
    """

    layers: tuple[Layer, ...]
    shortcut: bool


def sections(model: Model, found: Found, layers: Sequence[Layer]) -> list[Section]:
    """Sections of two layers and more among `layers`, read off the graph alone.

    Together are layers of one operator with kernels of one size and as many output channels, whose outputs have one
    size (so that no down-sampling is between them) and are followed by the same operators. They may differ in their input
    channels, as the first of a stage does: what cannot be shared then is for a decomposition to say.
    """
    walks = _Walks(model)
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        spec = layer.spec
        node = model.graph.node[found.places[layer.name].position]
        source = node.input[1 - found.places[layer.name].weight_input]
        follows = walks.after(node.output[0])
        around = set(spec.kernel) <= {1} and "Add" in follows[:2] and walks.reads(source) > 1
        size = spec.output_size(layer.input_size)
        key = (layer.op_type, spec.kernel, spec.out_channels, spec.group, spec.dilations, size, follows, around)
        groups.setdefault(key, []).append(layer)
    return [Section(tuple(g), bool(key[-1])) for key, g in groups.items() if len(g) > 1]  # type: ignore[index]


def alike(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Those of the commonest number of input channels (of the largest of these), which may share a first stage."""
    inputs = [layer.spec.weight_shape[1] for layer in layers]
    common = max(inputs, key=lambda n: (inputs.count(n), n), default=0)
    return tuple(layer for layer, n in zip(layers, inputs, strict=True) if n == common)


class _Walks:
    """Who reads what."""

    def __init__(self, model: Model) -> None:
        self._readers: dict[str, list[int]] = {}
        self._nodes = model.graph.node
        for index, node in enumerate(model.graph.node):
            for name in node.input:
                self._readers.setdefault(name, []).append(index)

    def reads(self, name: str) -> int:
        """How many nodes read a tensor."""
        return len(self._readers.get(name, []))

    def after(self, name: str) -> tuple[str, ...]:
        """Operators that follow, as long as there is one at a time."""
        found: list[str] = []
        while len(found) < FOLLOWED and self.reads(name) == 1:
            node = self._nodes[self._readers[name][0]]
            found.append(node.op_type)
            if not node.output or node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                break
            name = node.output[0]
        return tuple(found)

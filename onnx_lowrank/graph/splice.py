"""Putting islands in the place of nodes, with everything else left as it is, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.islands import Island, Naming, build_island
from onnx_lowrank.graph.model import Model, readers, tensor_names
from onnx_lowrank.types import Chain, Layer, LowRankError


@dataclass(frozen=True)
class Replacement:
    """What one layer becomes.

    Parameters
    ----------
    layer
        Name of the layer.
    decomposition, rank
        Recorded in the metadata of the new nodes.
    chain, kernels
        The stages and their kernels, in float64.
    """

    layer: str
    decomposition: str
    rank: tuple[int, ...]
    chain: Chain
    kernels: Sequence[np.ndarray]


def splice(model: Model, found: Found, replacements: Sequence[Replacement]) -> tuple[Model, dict[str, tuple[str, ...]]]:
    """A copy of `model` with layers replaced.

    Parameters
    ----------
    model
        Not changed; the kernels that fall away are not copied either.
    found
        The layers of `model`.

    Returns
    -------
    model
        The copy.
    names
        Names of the new nodes for each layer replaced: what lists of node names elsewhere have to follow.
    """
    taken, shared = tensor_names(model.proto), dict[str, str]()
    layers = {layer.name: layer for layer in found.layers}
    constants = Constants(model)
    islands: list[tuple[int, Island]] = []
    names: dict[str, tuple[str, ...]] = {}
    dead: list[list[str]] = []
    for item in replacements:
        place, layer = found.places[item.layer], layers[item.layer]
        node = model.graph.node[place.position]
        naming = _names(node, layer, item, shared, taken)
        try:
            island = build_island(node, place.weight_input, item.chain, item.kernels, layer.dtype, naming, model.opset)
        except LowRankError as error:
            raise LowRankError(f"layer '{item.layer}', {item.decomposition} of rank {item.rank}: {error}") from error
        _describe(node, island.nodes, item)
        islands.append((place.position, island))
        names[item.layer] = tuple(new.name or new.output[0] for new in island.nodes)
        dead.append(constants.chain(node.input[place.weight_input]))
    replaced = {layers[item.layer].weight_name for item in replacements if not layers[item.layer].weight_kept}
    unread = replaced - {layer.weight_name for layer in found.layers if layer.name not in names}
    result = model.copy(without=unread - {output.name for output in model.graph.output})
    # from the back, so that the positions still to come stay right
    for position, island in sorted(islands, key=lambda pair: pair[0], reverse=True):
        del result.graph.node[position]
        for node in reversed(island.nodes):
            result.graph.node.insert(position, node)
    present: set[str] = set()
    for tensor in (tensor for _, island in islands for tensor in island.initializers):
        if tensor.name not in present:
            present.add(tensor.name)
            _add_initializer(result, tensor)
    _drop_unread(result, dead)
    return result, names


def _names(node: onnx.NodeProto, layer: Layer, item: Replacement, shared: dict[str, str], taken: set[str]) -> Naming:
    def fresh(stem: str) -> str:
        name, number = stem, 1
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        return name

    def kernel(index: int, tag: str | None) -> str:
        if tag is None:
            return fresh(f"{layer.weight_name}_lowrank_{index}")
        if tag not in shared:
            shared[tag] = fresh(f"{tag}_lowrank")
        return shared[tag]

    stages = range(len(item.chain))
    return Naming(
        tuple(kernel(i, item.chain[i].shared) for i in stages),
        tuple(fresh(f"{node.output[0]}_lowrank_{i}") for i in stages[:-1]),
        tuple(fresh(f"{node.name or node.output[0]}_lowrank_{i}") for i in stages[:-1]),
    )


def _describe(node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], item: Replacement) -> None:
    """Documentation and metadata of the old node on the new ones, with where they come from."""
    source = {
        "onnx_lowrank.source": item.layer,
        "onnx_lowrank.decomposition": item.decomposition,
        "onnx_lowrank.rank": ",".join(map(str, item.rank)),
    }
    for new in nodes:
        new.doc_string = node.doc_string
        new.metadata_props.extend(node.metadata_props)
        new.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in source.items())


def _add_initializer(model: Model, tensor: onnx.TensorProto) -> None:
    model.graph.initializer.append(tensor)
    if model.proto.ir_version < 4:  # that version of the format lists every initializer as an input too
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _drop_unread(model: Model, chains: Sequence[Sequence[str]]) -> None:
    """Remove stored kernels, and the nodes that derived them, that nothing in any scope reads any more."""
    graph = model.graph
    for chain in chains:
        for name in chain:  # from the layer back to the stored tensor
            if readers(graph).get(name):
                break
            _remove(graph.node, [i for i, node in enumerate(graph.node) if list(node.output) == [name]])
            for values in (graph.initializer, graph.value_info, graph.input):
                _remove(values, [i for i, value in enumerate(values) if value.name == name])
            annotations = graph.quantization_annotation
            _remove(annotations, [i for i, note in enumerate(annotations) if note.tensor_name == name])


def _remove(items: object, positions: Sequence[int]) -> None:
    for position in reversed(positions):
        del items[position]  # type: ignore[attr-defined]

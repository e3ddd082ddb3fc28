"""Putting islands in the place of nodes, with everything else left as it is, byte for byte."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.graph.constants import add_initializer, drop_unread, lists_all
from onnx_lowrank.graph.datafile import DataFile, for_data_file
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.islands import Island, Naming, build_island, zero_of
from onnx_lowrank.graph.model import Model, tensor_names
from onnx_lowrank.types import Chain, Layer, LowRankError

DATA = "model.onnx.data"
"""Name of the file of external data in a folder of its own."""


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
        The stages and their kernels.
    bias
        Stands for the layer's own bias; None leaves that.
    """

    layer: str
    decomposition: str
    rank: tuple[int, ...]
    chain: Chain
    kernels: Sequence[np.ndarray]
    bias: np.ndarray | None = None


def splice(
    model: Model, found: Found, replacements: Iterable[Replacement], folder: Path | None = None
) -> tuple[Model, dict[str, tuple[str, ...]]]:
    """A copy of `model` with layers replaced.

    Parameters
    ----------
    model
        Not changed; the kernels that fall away are not copied either.
    found
        The layers of `model`.
    replacements
        Taken one after the other: with a `folder`, the kernels of one at a time are in memory.
    folder
        Where the external data of the copy go, old and new; without, kernels are inside it, and what is external stays
        where it is.

    Returns
    -------
    model
        The copy.
    names
        Names of the new nodes for each layer replaced: what lists of node names elsewhere have to follow.
    """
    if folder is None:
        return _splice(model, found, replacements, None)
    try:
        with DataFile(folder / DATA) as data:
            result, names = _splice(model, found, replacements, data)
    except OSError as error:
        raise LowRankError(
            f"{folder} cannot be written ({error.strerror or error}): it needs room for the result; TMPDIR names another"
        ) from error
    return replace(result, folder=folder), names


def _splice(
    model: Model, found: Found, replacements: Iterable[Replacement], data: DataFile | None
) -> tuple[Model, dict[str, tuple[str, ...]]]:
    taken, shared = tensor_names(model.proto), dict[str, str]()
    layers = {layer.name: layer for layer in found.layers}
    islands: list[tuple[int, Island]] = []
    outside: dict[str, onnx.TensorProto] = {}
    names: dict[str, tuple[str, ...]] = {}
    replaced: list[str] = []
    for item in replacements:
        place, layer = found.places[item.layer], layers[item.layer]
        node = model.graph.node[place.position]
        naming = _names(node, layer, item, shared, taken)
        replaced.append(node.input[place.weight_input])
        try:
            island = build_island(
                node, place.weight_input, item.chain, item.kernels, layer.dtype, naming, model.opset, item.bias
            )
        except LowRankError as error:
            raise LowRankError(f"layer '{item.layer}', {item.decomposition} of rank {item.rank}: {error}") from error
        _describe(node, island.nodes, item)
        islands.append((place.position, island if data is None else _outside(island, data, model.folder, outside)))
        names[item.layer] = tuple(new.name or new.output[0] for new in island.nodes)
        if item.bias is not None and len(node.input) > 2 and node.input[2]:
            replaced.append(node.input[2])
    unread = {layer.weight_name for layer in found.layers if layer.name in names and not layer.weight_kept}
    result = model.copy(without=unread - {layer.weight_name for layer in found.layers if layer.name not in names})
    # from the back, so that the positions still to come stay right
    for position, island in sorted(islands, key=lambda pair: pair[0], reverse=True):
        del result.graph.node[position]
        for node in reversed(island.nodes):
            result.graph.node.insert(position, node)
    drop_unread(result, replaced)
    if data is not None:
        for tensor in for_data_file(result.proto):
            data.take(tensor, model.folder)
    present, listed = set[str](), lists_all(model)
    for tensor in (tensor for _, island in islands for tensor in island.initializers):
        if tensor.name not in present:
            present.add(tensor.name)
            add_initializer(result, tensor, listed=listed)
    return result, names


def _outside(island: Island, data: DataFile, folder: Path, known: dict[str, onnx.TensorProto]) -> Island:
    """An island whose kernels are in a data file, once for each name, with nothing left of the message that held them."""
    nodes = [onnx.NodeProto() for _ in island.nodes]
    for copy, node in zip(nodes, island.nodes, strict=True):
        copy.CopyFrom(node)
    for tensor in island.initializers:
        if tensor.name not in known:
            known[tensor.name] = data.taken(tensor, folder)
    gc.collect()  # graphsurgeon's nodes and tensors refer to each other in circles, and hold the kernels till then
    return Island(tuple(nodes), tuple(known[tensor.name] for tensor in island.initializers))


def _names(node: onnx.NodeProto, layer: Layer, item: Replacement, shared: dict[str, str], taken: set[str]) -> Naming:
    def fresh(stem: str) -> str:
        name, number = stem, 1
        while taken & {name, zero_of(name), f"{name}_bias"}:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        return name

    def kernel(stem: str, tag: str | None) -> str:
        if tag is None:
            return fresh(stem)
        if tag not in shared:
            shared[tag] = fresh(f"{tag}_lowrank")
        return shared[tag]

    stages = range(len(item.chain))
    own = [f"{layer.weight_name}_lowrank_{i}" for i in stages]
    return Naming(
        tuple(kernel(own[i], item.chain[i].shared) for i in stages),
        tuple(fresh(f"{node.output[0]}_lowrank_{i}") for i in stages[:-1]),
        tuple(fresh(f"{node.name or node.output[0]}_lowrank_{i}") for i in stages[:-1]),
        {i: tuple(kernel(f"{own[i]}_part", part.shared) for part in item.chain[i].parts) for i in stages},
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
        new.metadata_props.extend(entry for entry in node.metadata_props if entry.key not in source)
        new.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in source.items())

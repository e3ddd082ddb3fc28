"""Loading a model: nothing is interpreted here, and no external tensor is read before it is needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from onnx_lowrank.graph.limits import check_claim, held_bytes
from onnx_lowrank.types import LowRankError

MOST_NODES = 1_000_000
"""That functions may come to."""

MAX_PROTO_BYTES = (1 << 31) - 1
"""What protobuf can serialise in one message."""


@dataclass(frozen=True)
class Model:
    """A ModelProto and where it comes from.

    Parameters
    ----------
    proto
        The model.
    folder
        What the places of its external data are relative to.
    path
        The file that it was read from.
    data_files
        Files of external data that it was loaded with, whether or not it still refers to them.
    """

    proto: onnx.ModelProto
    folder: Path
    path: Path | None = None
    data_files: frozenset[Path] = frozenset()

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 1)

    def copy(self, *, without: Container[str] = ()) -> Model:
        """A copy whose graph may be changed, leaving out the initializers called `without`, which may be large.

        They are left out of the list of inputs too.
        """
        proto = onnx.ModelProto()
        if not without or UnknownFieldSet(self.proto) or UnknownFieldSet(self.graph):
            proto.CopyFrom(self.proto)
        else:
            _copy_fields(self.proto, proto, leave="graph")
            _copy_fields(self.graph, proto.graph, leave="initializer")
            proto.graph.initializer.extend(t for t in self.graph.initializer if t.name not in without)
            del proto.graph.input[:]
            proto.graph.input.extend(value for value in self.graph.input if value.name not in without)
        return replace(self, proto=proto)


def _copy_fields(source: Message, target: Message, *, leave: str) -> None:
    for descriptor, value in source.ListFields():
        if descriptor.name == leave:
            continue
        if isinstance(value, Message):
            getattr(target, descriptor.name).CopyFrom(value)
        elif hasattr(value, "MergeFrom"):  # a repeated field
            getattr(target, descriptor.name).MergeFrom(value)
        else:
            setattr(target, descriptor.name, value)


def load(source: str | Path | onnx.ModelProto) -> Model:
    """A model from a path or from a ModelProto (which is not copied).

    Raises
    ------
    LowRankError
        Where the file is missing, empty or not an ONNX model.
    """
    if isinstance(source, onnx.ModelProto):
        return _checked(source, Path.cwd(), None, sum(map(held_bytes, stored_tensors(source))))
    path = Path(source)
    if path.suffix == ".ort":
        raise LowRankError(
            f"{path} is of the format for mobile builds, which is written and not read: give the .onnx model"
        )
    if path.is_dir():
        raise LowRankError(f"{path} is a folder: the path of an .onnx file was expected")
    if path.exists() and not path.is_file():
        raise LowRankError(f"{path} is a device or a pipe: the path of an .onnx file was expected")
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_PROTO_BYTES else b""
    except OSError as error:
        raise LowRankError(
            f"{path} cannot be read ({error.strerror}): the path of an .onnx file was expected"
        ) from error
    if size > MAX_PROTO_BYTES:
        raise LowRankError(
            f"{path} has {size / 1e9:.0f} GB, and an ONNX file no more than 2: its tensors belong into a file beside it "
            f"(external data)"
        )
    if not data:
        raise LowRankError(f"{path} is empty: an ONNX model was expected; was the download or the export interrupted?")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise LowRankError(
            f"{path} is not an ONNX model, or is cut short or damaged: export or download it again"
        ) from error
    # not resolved: where the path is a link, its data lies beside the link, as for ONNX Runtime
    return _checked(proto, path.absolute().parent, path, size)


def _checked(proto: onnx.ModelProto, folder: Path, path: Path | None, size: int) -> Model:
    graph, version, called = proto.graph, proto.ir_version, str(path or "the model given")
    # the operator sets come after the graph in a file, so that one cut short may lack nothing else
    whole = version and graph.output and (proto.opset_import or version < 3)
    if not whole or not (graph.node or graph.input or graph.initializer):
        raise LowRankError(
            f"{called} is not a whole ONNX model (no version, operator set, graph or outputs): "
            f"export or download it again"
        )
    if any(isinstance(text, bytes) for text in _texts(proto)):
        raise LowRankError(f"{called} is damaged: a name in it is not UTF-8 text; export it again")
    for each in all_graphs(graph):
        stored = [*(t.name for t in each.initializer), *(t.values.name for t in each.sparse_initializer)]
        if twice := [name for name, count in Counter(stored).items() if count > 1]:
            raise LowRankError(f"{called} stores '{twice[0]}' twice: export it again")
    if proto.functions:
        _check_functions(proto, called)
    files = set()
    for tensor in stored_tensors(proto):
        check_claim(tensor, size)
        for entry in tensor.external_data:
            if entry.key == "location":
                files.add(external_file(tensor.name, entry.value, folder))
    return Model(proto, folder, path, frozenset(files))


def _check_functions(proto: onnx.ModelProto, called: str) -> None:
    """See that functions which call functions do not come to more nodes than anything could go through.

    Raises
    ------
    LowRankError
        Where they do, or where one calls itself.
    """
    functions = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    under_way: set[tuple[str, str]] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += 1 + sum(size(graph.node) for graph in subgraphs(node))
            if key in functions and key not in sizes:
                if key in under_way:
                    raise LowRankError(f"{called} is damaged: function '{node.op_type}' calls itself")
                under_way.add(key)
                sizes[key] = size(functions[key].node)
            total += sizes.get(key, 0)
        return total

    try:
        whole = size(proto.graph.node)
    except RecursionError:
        whole = MOST_NODES + 1
    if whole > MOST_NODES:
        raise LowRankError(f"{called} comes to more than {MOST_NODES:,} nodes once its functions are called: refused")


def external_file(tensor: str, location: str, folder: Path) -> Path:
    """The file of a tensor's external data, whether or not it is there.

    Raises
    ------
    LowRankError
        Where that is not inside `folder`, links followed: a model must not read elsewhere.
    """
    try:
        root, path = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / location))
    except ValueError as error:  # a zero byte
        raise LowRankError(f"tensor '{tensor}' is damaged ({error}): export the model again") from error
    if not path.is_relative_to(root):
        raise LowRankError(
            f"tensor '{tensor}' is stored in {location}, which leads outside the model's folder: refused; "
            f"copy the model and its data into one folder"
        )
    return path


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Names and descriptions (among other fields); protobuf reads one that is not UTF-8 as bytes, and writes none."""
    graphs, nodes = everything(proto)
    yield from tensor_names(proto)
    for message in (proto, *proto.opset_import, *graphs, *nodes):
        yield from (value for _, value in message.ListFields())
    yield from (attribute.name for node in nodes for attribute in node.attribute)
    yield from (entry.value for tensor in stored_tensors(proto) for entry in tensor.external_data)
    yield from (dim.dim_param for value in proto.graph.input for dim in value.type.tensor_type.shape.dim)


def serialize(model: Model) -> bytes:
    """The model as bytes; external tensors stay references.

    Raises
    ------
    LowRankError
        Where it is larger than protobuf allows.
    """
    try:
        return model.proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise LowRankError("the model is larger than 2 GB in memory: give it by its path") from error


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node's attributes hold (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and every graph inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def attributes(node: onnx.NodeProto) -> dict[str, onnx.AttributeProto]:
    """Attributes by name."""
    return {a.name: a for a in node.attribute}


def tensors_read(node: onnx.NodeProto) -> set[str]:
    """Tensors that a node reads, from inside its subgraphs too."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        inside = {o.name for o in graph.output}.union(*map(tensors_read, graph.node))
        own = {value.name for value in [*graph.input, *graph.initializer]}
        names |= inside - own.union(*(inner.output for inner in graph.node))
    return names


def scopes(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Every graph that sees the stored tensors of the main one: itself, what it holds, and those of training."""
    yield from all_graphs(proto.graph)
    for training in proto.training_info:
        yield from all_graphs(training.initialization)
        yield from all_graphs(training.algorithm)


def readers(proto: onnx.ModelProto) -> dict[str, int]:
    """How often each tensor is read: by nodes of every scope, as an output of a graph, and by training."""
    names: list[str] = []
    for scope in scopes(proto):
        names += [i for node in scope.node for i in node.input]
        names += [output.name for output in scope.output]
    for training in proto.training_info:
        names += [binding.key for binding in [*training.initialization_binding, *training.update_binding]]
    return Counter(names)


def everything(proto: onnx.ModelProto) -> tuple[list[onnx.GraphProto], list[onnx.NodeProto]]:
    """Every graph and every node, those of functions too."""
    graphs = list(scopes(proto))
    nodes = [node for function in proto.functions for node in function.node]
    graphs += [graph for node in nodes for inner in subgraphs(node) for graph in all_graphs(inner)]
    return graphs, [*nodes, *(node for graph in graphs for node in graph.node)]


def stored_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor whose value is in the model: initializers and attributes, wherever they are."""
    graphs, nodes = everything(proto)
    sparse = [tensor for graph in graphs for tensor in graph.sparse_initializer]
    for graph in graphs:
        yield from graph.initializer
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors)
        sparse += [
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ()),
            *attribute.sparse_tensors,
        ]
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def tensor_names(proto: onnx.ModelProto) -> set[str]:
    """Every name of a tensor or a node, in every scope: what a new name must differ from."""
    graphs, nodes = everything(proto)
    names = {name for function in proto.functions for name in function.input}
    for graph in graphs:
        names.update(v.name for v in [*graph.input, *graph.output, *graph.value_info, *graph.initializer])
        names.update(t.values.name for t in graph.sparse_initializer)
    return names.union(*([node.name, *node.input, *node.output] for node in nodes))


def fresh_name(stem: str, taken: set[str]) -> str:
    """`stem`, with a number where that is taken; it is taken from now on."""
    name, number = stem, 1
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name)
    return name

"""Loading a model: nothing is interpreted here, and no external tensor is read before it is needed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from onnx_lowrank.types import LowRankError

MAX_PROTO_BYTES = (1 << 31) - 1
"""What protobuf can serialise in one message."""


@dataclass(frozen=True)
class Model:
    """A ModelProto and the folder that its external data is relative to."""

    proto: onnx.ModelProto
    folder: Path
    path: Path | None = None

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 1)

    def copy(self, *, without: Container[str] = ()) -> Model:
        """A copy whose graph may be changed, leaving out the initializers called `without`, which may be large."""
        proto = onnx.ModelProto()
        if not without or UnknownFieldSet(self.proto) or UnknownFieldSet(self.graph):
            proto.CopyFrom(self.proto)
        else:
            _copy_fields(self.proto, proto, leave="graph")
            _copy_fields(self.graph, proto.graph, leave="initializer")
            proto.graph.initializer.extend(t for t in self.graph.initializer if t.name not in without)
        return Model(proto, self.folder, self.path)


def _copy_fields(source: Message, target: Message, *, leave: str) -> None:
    for descriptor, value in source.ListFields():
        if descriptor.name == leave:
            continue
        if descriptor.is_repeated:
            getattr(target, descriptor.name).MergeFrom(value)
        elif descriptor.message_type:
            getattr(target, descriptor.name).CopyFrom(value)
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
        return _checked(Model(source, Path.cwd()), "the model given")
    path = Path(source)
    if path.is_dir():
        raise LowRankError(f"{path} is a folder: the path of an .onnx file was expected")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LowRankError(
            f"{path} cannot be read ({error.strerror}): the path of an .onnx file was expected"
        ) from error
    if not data:
        raise LowRankError(f"{path} is empty: an ONNX model was expected; was the download or the export interrupted?")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise LowRankError(
            f"{path} is not an ONNX model, or is cut short or damaged: export or download it again"
        ) from error
    return _checked(Model(proto, path.resolve().parent, path), str(path))


def _checked(model: Model, what: str) -> Model:
    graph = model.graph
    if not model.proto.ir_version or not graph.output or not (graph.node or graph.input or graph.initializer):
        raise LowRankError(
            f"{what} is not a whole ONNX model (no version, graph or outputs): export or download it again"
        )
    return model


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


def readers(graph: onnx.GraphProto) -> dict[str, int]:
    """How often each tensor is read: by nodes of every scope and as an output of a graph."""
    count: dict[str, int] = {}
    for scope in all_graphs(graph):
        for name in [*(i for node in scope.node for i in node.input), *(o.name for o in scope.output)]:
            count[name] = count.get(name, 0) + 1
    return count


def tensor_names(proto: onnx.ModelProto) -> set[str]:
    """Every name of a tensor or a node, in every scope: what a new name must differ from."""
    names: set[str] = set()
    for graph in all_graphs(proto.graph):
        names.update(v.name for v in [*graph.input, *graph.output, *graph.value_info, *graph.initializer])
        names.update(t.values.name for t in graph.sparse_initializer)
        for node in graph.node:
            names.update([node.name, *node.input, *node.output])
    for function in proto.functions:
        names.update(function.input)
        names.update(n for node in function.node for n in [node.name, *node.input, *node.output])
    return names

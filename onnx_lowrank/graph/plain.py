"""The main graph as plain data, for what runs it without ONNX Runtime; and values written back by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lowrank.graph.constants import overridable, read_tensor
from onnx_lowrank.graph.model import Model, subgraphs
from onnx_lowrank.types import LowRankError

ATTRIBUTE = onnx.AttributeProto


@dataclass(frozen=True)
class PlainNode:
    """A node. Attributes are numbers, texts, lists of them, or arrays; absent inputs and outputs have an empty name."""

    op_type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    has_subgraphs: bool

    @property
    def key(self) -> str:
        """Its name, or its first output's: what reports call it."""
        return self.name or self.outputs[0]

    @property
    def title(self) -> str:
        """What messages call it."""
        kind = f"{self.domain}:{self.op_type}" if self.domain else self.op_type
        return f"{kind} '{self.name or next(iter(self.outputs), '')}'"


@dataclass(frozen=True)
class PlainGraph:
    """A graph: names of inputs and outputs, stored tensors by name, nodes in topological order."""

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: Mapping[str, np.ndarray]
    nodes: tuple[PlainNode, ...]
    overridable: frozenset[str] = frozenset()
    """Stored tensors that a user may feed."""

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """All tensors that :func:`with_values` may change: stored ones, and those of Constant nodes."""
        made = {
            node.outputs[0]: node.attributes["value"]
            for node in self.nodes
            if node.op_type == "Constant" and isinstance(node.attributes.get("value"), np.ndarray)
        }
        return {**made, **self.stored}


def plain_graph(model: Model) -> PlainGraph:
    """The main graph of `model`, with all of its stored tensors read; bfloat16 and the like as the arrays onnx makes.

    Raises
    ------
    LowRankError
        Where it stores sparse tensors.
    """
    graph = model.graph
    if graph.sparse_initializer:
        raise LowRankError("the model stores sparse tensors: it cannot be run outside ONNX Runtime")
    stored = {tensor.name: read_tensor(tensor, model.folder) for tensor in graph.initializer}
    fed = tuple(value.name for value in graph.input if value.name not in stored)
    nodes = tuple(_plain_node(node, model) for node in graph.node)
    return PlainGraph(
        model.opset, fed, tuple(value.name for value in graph.output), stored, nodes, frozenset(overridable(model))
    )


def is_floating(value: np.ndarray) -> bool:
    """Whether an array holds floating-point numbers, bfloat16 among them."""
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


def _plain_node(node: onnx.NodeProto, model: Model) -> PlainNode:
    values: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type == ATTRIBUTE.TENSOR:
            values[attribute.name] = read_tensor(attribute.t, model.folder)
        elif attribute.type in (ATTRIBUTE.GRAPH, ATTRIBUTE.GRAPHS):
            continue
        else:
            value = onnx.helper.get_attribute_value(attribute)
            values[attribute.name] = _text(value)
    domain = "" if node.domain == "ai.onnx" else node.domain
    inner = any(True for _ in subgraphs(node))
    return PlainNode(node.op_type, domain, node.name, tuple(node.input), tuple(node.output), values, inner)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not isinstance(value, str)):
        return [_text(item) for item in value]
    return value


def numpy_dtype(code: int) -> np.dtype:
    """The dtype of an element type of ONNX, as Cast names it."""
    return onnx.helper.tensor_dtype_to_np_dtype(code)


def with_values(model: Model, values: Mapping[str, np.ndarray]) -> Model:
    """A copy of `model` whose initializers and Constant nodes of these names hold `values`, each in the dtype it had.

    Raises
    ------
    LowRankError
        Where a name stores nothing, or a value has another shape or does not fit its dtype.
    """
    copy = model.copy()
    written = set()
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            old = read_tensor(tensor, model.folder)
            new = _cast(tensor.name, values[tensor.name], old)
            written.add(tensor.name)
            if new.tobytes() == old.tobytes():  # it stays as it was stored
                continue
            fresh = numpy_helper.from_array(new, tensor.name)
            fresh.doc_string = tensor.doc_string
            fresh.metadata_props.extend(tensor.metadata_props)
            tensor.CopyFrom(fresh)
    for node in copy.graph.node:
        if node.op_type == "Constant" and node.output[0] in values:
            for attribute in node.attribute:
                if attribute.type == ATTRIBUTE.TENSOR:
                    new = _cast(node.output[0], values[node.output[0]], read_tensor(attribute.t, model.folder))
                    attribute.t.CopyFrom(numpy_helper.from_array(new, attribute.t.name))
                    written.add(node.output[0])
    if missing := set(values) - written:
        raise LowRankError(f"the graph stores nothing called {', '.join(sorted(missing)[:3])}")
    return copy


def _cast(name: str, value: np.ndarray, old: np.ndarray) -> np.ndarray:
    if value.shape != old.shape:
        raise LowRankError(f"'{name}' has the shape {old.shape}: it cannot become {value.shape}")
    with np.errstate(over="ignore"):
        new = np.ascontiguousarray(value.astype(old.dtype))
    if not np.isfinite(new.astype(np.float64)).all():
        raise LowRankError(f"'{name}' does not fit {old.dtype}")
    return new

"""Tensors whose value is known without running the model: stored ones, and those a few shape operators derive."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_lowrank.graph.model import Model, attributes, readers
from onnx_lowrank.types import LowRankError


@dataclass(frozen=True)
class Constant:
    """A tensor known without running.

    Parameters
    ----------
    root
        Name of the stored tensor (or the output of the Constant node) that it comes from.
    read
        Reads the value; each call reads again, nothing is kept.
    overridable
        True where the root is also an input of the model, so that a user may feed another value.
    quantized
        True where a QuantizeLinear or DequantizeLinear lies on the way: `read` then reads what comes before it.
    """

    root: str
    read: Callable[[], np.ndarray]
    overridable: bool = False
    quantized: bool = False


class Constants:
    """Looks up the constants of the main graph of a model."""

    def __init__(self, model: Model) -> None:
        self._folder = model.folder
        self._stored = {t.name: t for t in model.graph.initializer}
        self._sparse = {t.values.name: t for t in model.graph.sparse_initializer}
        self._producers = {out: node for node in model.graph.node for out in node.output if out}
        listed = {i.name for i in model.graph.input} & set(self._stored)
        self._overridable = set() if lists_all(model) else listed

    def find(self, name: str) -> Constant | None:
        """The constant called `name`; None where it depends on an input or on an operator not followed here."""
        if name in self._stored:
            tensor = self._stored[name]
            return Constant(name, lambda: read_tensor(tensor, self._folder), name in self._overridable)
        if name in self._sparse:
            sparse = self._sparse[name]
            return Constant(name, lambda: _densify(sparse, self._folder))
        node = self._producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            return self._constant_node(node)
        if not node.input:
            return None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            inner = self.find(node.input[0])
            return inner and Constant(inner.root, inner.read, inner.overridable, quantized=True)
        if node.op_type not in _FOLLOWED:
            return None
        values = [self.find(i) if i else None for i in node.input]
        if values[0] is None or any(v is None for v, i in zip(values, node.input, strict=True) if i):
            return None
        first, rest = values[0], values[1:]

        def read() -> np.ndarray:
            inputs = first.read(), [v.read() if v else None for v in rest]
            try:
                return _FOLLOWED[node.op_type](*inputs, attributes(node))
            except (ValueError, IndexError, KeyError, TypeError) as error:
                raise LowRankError(f"{node.op_type} cannot make '{name}' from a stored tensor: {error}") from error

        return Constant(
            first.root, read, any(v.overridable for v in values if v), any(v.quantized for v in values if v)
        )

    def _constant_node(self, node: onnx.NodeProto) -> Constant | None:
        attribute = next(iter(node.attribute), onnx.AttributeProto())
        if attribute.type == onnx.AttributeProto.UNDEFINED:
            return None
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.type == onnx.AttributeProto.TENSOR:
            return Constant(node.output[0], lambda: read_tensor(value, self._folder))
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            return Constant(node.output[0], lambda: _densify(value, self._folder))
        if attribute.type in (onnx.AttributeProto.FLOATS, onnx.AttributeProto.FLOAT):
            return Constant(node.output[0], lambda: np.array(value, dtype=np.float32))
        if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.INT):
            return Constant(node.output[0], lambda: np.array(value, dtype=np.int64))
        return None

    def chain(self, name: str) -> list[str]:
        """Names of the tensors from `name` back to its root."""
        names = [name]
        while name not in self._stored and (node := self._producers.get(name)) and node.op_type in _FOLLOWED:
            name = node.input[0]
            names.append(name)
        return names


def lists_all(model: Model) -> bool:
    """Whether every initializer is listed as an input.

    Before version 4 of the format all had to be, and exporters kept that habit. Where all are listed nobody meant
    to feed them; where a few are, somebody did.
    """
    stored = {t.name for t in model.graph.initializer}
    return model.proto.ir_version < 4 or (bool(stored) and stored <= {i.name for i in model.graph.input})


def add_initializer(model: Model, tensor: onnx.TensorProto, *, listed: bool) -> None:
    """Store a tensor in the graph of `model`, and list it among the inputs where :func:`lists_all` of them."""
    model.graph.initializer.append(tensor)
    if listed:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def drop_unread(model: Model, names: Iterable[str]) -> None:
    """Remove the constants called `names`, and what they alone were derived from, where no scope reads them any more."""
    graph = model.graph
    count = readers(model.proto)
    producers = {out: node for node in graph.node for out in node.output}
    stored = {*(t.name for t in graph.initializer), *(t.values.name for t in graph.sparse_initializer)}
    fed = {value.name for value in graph.input} - stored
    pending, gone = list(names), set[str]()
    while pending:
        name = pending.pop()
        node = producers.get(name)
        if not name or name in gone or name in fed or count[name] or (node and node.op_type not in _CONSTANT):
            continue
        gone.add(name)
        for source in node.input if node else ():
            count[source] -= 1
            pending.append(source)
    _remove(graph.node, [not gone.isdisjoint(node.output) for node in graph.node])
    for values in (graph.initializer, graph.input, graph.value_info):
        _remove(values, [value.name in gone for value in values])
    _remove(graph.sparse_initializer, [tensor.values.name in gone for tensor in graph.sparse_initializer])
    _remove(graph.quantization_annotation, [note.tensor_name in gone for note in graph.quantization_annotation])


def _remove(items: MutableSequence[Any], which: Sequence[bool]) -> None:
    for position in reversed(range(len(which))):
        if which[position]:
            del items[position]


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor as raw data, from its shape and type: reading the data would copy it.

    Raises
    ------
    LowRankError
        Where its type is none.
    """
    try:
        bits = _BITS.get(onnx.TensorProto.DataType.Name(tensor.data_type)) or 8 * _dtype(tensor).itemsize
    except (ValueError, KeyError) as error:
        raise LowRankError(
            f"tensor '{tensor.name}' is damaged (no type {tensor.data_type}): export it again"
        ) from error
    return -(-math.prod(tensor.dims) * bits // 8)


def _dtype(tensor: onnx.TensorProto) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


_BITS = {"UINT2": 2, "INT2": 2, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
"""Types that are packed, by name: not every version of onnx has them all."""


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """Value of a stored tensor; one of external data is read from its place in its file.

    Raises
    ------
    LowRankError
        Where its data are damaged, or its external file is missing, too short, or outside the model's folder.
    """
    external = uses_external_data(tensor)
    raw = read_external(tensor, folder) if external else b""
    try:
        if not external:
            return numpy_helper.to_array(tensor)
        if onnx.TensorProto.DataType.Name(tensor.data_type) not in _BITS:
            return np.frombuffer(raw, _dtype(tensor).newbyteorder("<")).reshape(tuple(tensor.dims))
        whole = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
        return numpy_helper.to_array(whole)
    except (ValueError, TypeError, KeyError) as error:
        raise LowRankError(f"tensor '{tensor.name}' is damaged ({error}): export the model again") from error


def read_external(tensor: onnx.TensorProto, folder: Path) -> bytes:
    """Raw data of a tensor of external data.

    Raises
    ------
    LowRankError
        Where the file is missing, too short, or outside the model's folder.
    """
    path, offset = external_place(tensor, folder)
    size = stored_bytes(tensor)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise LowRankError(f"{path}, which holds tensor '{tensor.name}', cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise LowRankError(f"{path} ends before tensor '{tensor.name}' does: was its copy interrupted?")
    return data


def external_place(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int]:
    """File and offset of a tensor's external data.

    Raises
    ------
    LowRankError
        Where the file is not a regular file inside `folder`: a model must not read elsewhere.
    """
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        raise LowRankError(f"tensor '{tensor.name}' is damaged ({error}): export the model again") from error
    root = folder.resolve()
    path = Path(os.path.realpath(root / info.location))
    if not path.is_relative_to(root):
        raise LowRankError(
            f"tensor '{tensor.name}' is stored in {info.location}, which leads outside the model's folder: refused; "
            f"copy the model and its data into one folder"
        )
    if not path.is_file():
        raise LowRankError(f"tensor '{tensor.name}' is stored in {path}, which is not there: copy it beside the model")
    return path, info.offset or 0


def _densify(sparse: onnx.SparseTensorProto, folder: Path) -> np.ndarray:
    values, indices = read_tensor(sparse.values, folder), read_tensor(sparse.indices, folder)
    dense = np.zeros(tuple(sparse.dims), dtype=values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


Operator = Callable[[np.ndarray, list["np.ndarray | None"], dict[str, onnx.AttributeProto]], np.ndarray]


def _axes(rest: list[np.ndarray | None], attrs: dict[str, onnx.AttributeProto]) -> tuple[int, ...] | None:
    """Axes as an input (from opset 13) or as an attribute (before)."""
    if rest and rest[0] is not None:
        return tuple(int(axis) for axis in rest[0])
    return tuple(attrs["axes"].ints) if "axes" in attrs else None


def _reshape(x: np.ndarray, rest: list[np.ndarray | None], attrs: dict[str, onnx.AttributeProto]) -> np.ndarray:
    target = [int(n) for n in (rest[0] if rest and rest[0] is not None else attrs["shape"].ints)]
    keep_zero = "allowzero" in attrs and attrs["allowzero"].i
    return x.reshape([x.shape[i] if n == 0 and not keep_zero else n for i, n in enumerate(target)])


def _unsqueeze(x: np.ndarray, rest: list[np.ndarray | None], attrs: dict[str, onnx.AttributeProto]) -> np.ndarray:
    return np.expand_dims(x, _axes(rest, attrs) or ())


def _squeeze(x: np.ndarray, rest: list[np.ndarray | None], attrs: dict[str, onnx.AttributeProto]) -> np.ndarray:
    return np.squeeze(x, _axes(rest, attrs))


def _flatten(x: np.ndarray, rest: list[np.ndarray | None], attrs: dict[str, onnx.AttributeProto]) -> np.ndarray:
    axis = attrs["axis"].i if "axis" in attrs else 1
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)


_FOLLOWED: dict[str, Operator] = {
    "Identity": lambda x, rest, attrs: x,
    "Transpose": lambda x, rest, attrs: x.transpose(tuple(attrs["perm"].ints) if "perm" in attrs else None),
    "Reshape": _reshape,
    "Cast": lambda x, rest, attrs: x.astype(onnx.helper.tensor_dtype_to_np_dtype(attrs["to"].i)),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
}

_CONSTANT = {"Constant", "QuantizeLinear", "DequantizeLinear", *_FOLLOWED}
"""Operators whose outputs :meth:`Constants.find` may know."""

"""Tensors whose value is known without running the model: stored ones, and those a few shape operators derive."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_lowrank.graph.model import Model, attributes
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
        True where a DequantizeLinear lies on the way.
    """

    root: str
    read: Callable[[], np.ndarray]
    overridable: bool = False
    quantized: bool = False


class Constants:
    """Looks up the constants of the main graph of a model."""

    def __init__(self, model: Model) -> None:
        self._folder = model.folder
        self._opset = model.opset
        self._stored = {t.name: t for t in model.graph.initializer}
        self._producers = {out: node for node in model.graph.node for out in node.output if out}
        listed = {i.name for i in model.graph.input} & set(self._stored)
        # Before version 4 of the format every initializer had to be listed as an input, and exporters kept that
        # habit. Where all are listed nobody meant to feed them; where a few are, somebody did.
        habit = model.proto.ir_version < 4 or len(listed) == len(self._stored)
        self._overridable = set() if habit else listed

    def find(self, name: str) -> Constant | None:
        """The constant called `name`; None where it depends on an input or on an operator not followed here."""
        if name in self._stored:
            tensor = self._stored[name]
            return Constant(name, lambda: read_tensor(tensor, self._folder), name in self._overridable)
        node = self._producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            return self._constant_node(node)
        if node.op_type == "DequantizeLinear":
            inner = self.find(node.input[0])
            return inner and Constant(inner.root, inner.read, inner.overridable, quantized=True)
        if node.op_type not in _FOLLOWED:
            return None
        values = [self.find(i) if i else None for i in node.input]
        if values[0] is None or any(v is None for v, i in zip(values, node.input, strict=True) if i):
            return None
        first, rest = values[0], values[1:]

        def read() -> np.ndarray:
            return _FOLLOWED[node.op_type](first.read(), [v.read() if v else None for v in rest], attributes(node))

        return Constant(
            first.root, read, any(v.overridable for v in values if v), any(v.quantized for v in values if v)
        )

    def _constant_node(self, node: onnx.NodeProto) -> Constant | None:
        attribute = node.attribute[0]
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
        """Names of the tensors from `name` back to its root, all of which fall away with their last reader."""
        names = [name]
        while name not in self._stored and (node := self._producers.get(name)) and node.op_type in _FOLLOWED:
            name = node.input[0]
            names.append(name)
        return names


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """Value of a stored tensor; one of external data is read from its place in its file.

    Raises
    ------
    LowRankError
        Where the external file is missing, too short, or lies outside the model's folder.
    """
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    count = int(np.prod(tensor.dims, dtype=np.int64))
    path, offset, length = external_place(tensor, folder)
    # types of less than a byte are packed: leave their unpacking to onnx
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)
    size = length if packed or length else count * dtype.itemsize
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < (size if packed else count * dtype.itemsize):
        raise LowRankError(f"{path} ends before tensor '{tensor.name}' does: was its copy interrupted?")
    if packed:
        whole = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
        return numpy_helper.to_array(whole)
    return np.frombuffer(data, dtype.newbyteorder("<"), count).reshape(tuple(tensor.dims))


def external_place(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """File, offset and length (0: not said) of a tensor's external data.

    Raises
    ------
    LowRankError
        Where the file is not a regular file inside `folder`: a model must not read elsewhere.
    """
    info = ExternalDataInfo(tensor)
    root = folder.resolve()
    path = Path(os.path.realpath(root / info.location))
    if not path.is_relative_to(root):
        raise LowRankError(f"tensor '{tensor.name}' points to {info.location}, outside the model's folder: refused")
    if not path.is_file():
        raise LowRankError(f"tensor '{tensor.name}' is stored in {path}, which is not there: copy it beside the model")
    return path, int(info.offset or 0), int(info.length or 0)


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

"""Tensors whose value is known without running the model: stored ones, and those a few shape operators derive."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.graph.limits import PACKED, check_fits, dtype_of, one_line, stored_bytes
from onnx_lowrank.graph.model import Model, attributes, external_file, readers
from onnx_lowrank.types import LowRankError

COPIED = 1 << 24
"""Bytes of external data in memory while they are copied."""

MOST_STEPS = 128
"""Operators that a constant may be derived by: a model could spend any time and depth on them."""


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
    source
        Name of the constant that it is another form of, where it is one.
    steps
        Operators that `read` computes.
    """

    root: str
    read: Callable[[], np.ndarray]
    overridable: bool = False
    quantized: bool = False
    source: str = ""
    steps: int = 0

    @property
    def fixed(self) -> bool:
        """Whether it is what is stored, in every run: no user may feed another, and nothing is quantised on the way."""
        return not self.overridable and not self.quantized


class Constants:
    """Looks up the constants of the main graph of a model."""

    def __init__(self, model: Model) -> None:
        self._folder = model.folder
        fed = overridable(model)
        self._known: dict[str, Constant] = {}
        for tensor in model.graph.initializer:
            self._known[tensor.name] = Constant(
                tensor.name, partial(read_tensor, tensor, self._folder), tensor.name in fed
            )
        for sparse in model.graph.sparse_initializer:
            name = sparse.values.name
            self._known.setdefault(name, Constant(name, partial(_densify, sparse, self._folder)))
        # what a node reads is made before it, so that neither a circle nor a long chain leads anywhere
        for node in model.graph.node:
            made = self._made_by(node) if node.domain in ("", "ai.onnx") and any(node.output[:1]) else None
            if made is not None:
                self._known.setdefault(node.output[0], made)

    def find(self, name: str) -> Constant | None:
        """The constant called `name`; None where it depends on an input or on an operator not followed here."""
        return self._known.get(name)

    def _made_by(self, node: onnx.NodeProto) -> Constant | None:
        if node.op_type == "Constant":
            return self._constant_node(node)
        if not node.input:
            return None
        first = self.find(node.input[0])
        if first is None:
            return None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return Constant(first.root, first.read, first.overridable, quantized=True, steps=first.steps)
        if node.op_type not in _FOLLOWED:
            return None
        rest = [self.find(i) if i else None for i in node.input[1:]]
        values = [first, *(v for v in rest if v)]
        steps = 1 + sum(v.steps for v in values)
        if steps > MOST_STEPS or any(v is None for v, i in zip(rest, node.input[1:], strict=True) if i):
            return None

        def read() -> np.ndarray:
            inputs = first.read(), [v.read() if v else None for v in rest]
            try:
                with np.errstate(all="ignore"):  # a cast may overflow: who uses the value looks at it
                    return _FOLLOWED[node.op_type](*inputs, attributes(node))
            except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
                raise LowRankError(
                    f"{node.op_type} cannot make '{node.output[0]}' from a stored tensor: {error}"
                ) from error

        overridable, quantized = any(v.overridable for v in values), any(v.quantized for v in values)
        return Constant(first.root, read, overridable, quantized, node.input[0], steps)

    def _constant_node(self, node: onnx.NodeProto) -> Constant | None:
        attribute = next(iter(node.attribute), onnx.AttributeProto())
        if attribute.type == onnx.AttributeProto.UNDEFINED or attribute.ref_attr_name:
            return None
        name, value = node.output[0], onnx.helper.get_attribute_value(attribute)
        if attribute.type == onnx.AttributeProto.TENSOR:
            return Constant(name, partial(read_tensor, value, self._folder))
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            return Constant(name, partial(_densify, value, self._folder))
        if attribute.type in (onnx.AttributeProto.FLOATS, onnx.AttributeProto.FLOAT):
            return Constant(name, partial(np.array, value, dtype=np.float32))
        if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.INT):
            return Constant(name, partial(np.array, value, dtype=np.int64))
        return None

    def chain(self, name: str) -> list[str]:
        """Names of the tensors from `name` back to its root."""
        names = [name]
        while (constant := self.find(names[-1])) and constant.source:
            names.append(constant.source)
        return names


def lists_all(model: Model) -> bool:
    """Whether every initializer is listed as an input.

    Before version 4 of the format all had to be, and exporters kept that habit. Where all are listed nobody meant
    to feed them; where a few are, somebody did.
    """
    stored = {t.name for t in model.graph.initializer}
    return model.proto.ir_version < 4 or (bool(stored) and stored <= {i.name for i in model.graph.input})


def overridable(model: Model) -> set[str]:
    """Names of the stored tensors that a user may feed another value for."""
    stored = set() if lists_all(model) else {tensor.name for tensor in model.graph.initializer}
    return stored & {value.name for value in model.graph.input}


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


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """Value of a stored tensor; one of external data is read from its place in its file.

    Raises
    ------
    LowRankError
        Where its data are damaged, or its external file is missing, too short, or outside the model's folder.
    """
    external = uses_external_data(tensor)
    size = stored_bytes(tensor)
    raw = read_external(tensor, folder) if external else b""
    try:
        if not external:
            if tensor.HasField("raw_data") and len(tensor.raw_data) != size:
                raise ValueError(f"{len(tensor.raw_data)} bytes for a shape of {list(tensor.dims)}, which has {size}")
            return numpy_helper.to_array(tensor)
        if onnx.TensorProto.DataType.Name(tensor.data_type) not in PACKED:
            return np.frombuffer(raw, dtype_of(tensor).newbyteorder("<")).reshape(tuple(tensor.dims))
        whole = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
        return numpy_helper.to_array(whole)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise LowRankError(f"tensor '{tensor.name}' is damaged ({one_line(error)}): export the model again") from error


def read_external(tensor: onnx.TensorProto, folder: Path) -> bytes:
    """Raw data of a tensor of external data.

    Raises
    ------
    LowRankError
        Where the file is missing, too short, or outside the model's folder.
    """
    with _external_file(tensor, folder) as (file, size):
        check_fits(f"tensor '{tensor.name}'", size, "the model is damaged, or needs a larger machine")
        return file.read(size)


def external_chunks(tensor: onnx.TensorProto, folder: Path) -> Iterator[bytes]:
    """As :func:`read_external`, ``COPIED`` bytes at a time."""
    with _external_file(tensor, folder) as (file, size):
        while size > 0 and (chunk := file.read(min(size, COPIED))):
            size -= len(chunk)
            yield chunk
    if size:
        raise LowRankError(f"the file of tensor '{tensor.name}' became shorter while it was read")


@contextmanager
def _external_file(tensor: onnx.TensorProto, folder: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file of a tensor's external data, at its place, and the bytes of the tensor."""
    path, offset = external_place(tensor, folder)
    size = stored_bytes(tensor)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size - offset < size:  # before memory is taken for what it claims
                raise LowRankError(f"{path} ends before tensor '{tensor.name}' does: was its copy interrupted?")
            file.seek(offset)
            yield file, size
    except OSError as error:
        raise LowRankError(f"{path}, which holds tensor '{tensor.name}', cannot be read ({error.strerror})") from error


def external_place(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int]:
    """File and offset of a tensor's external data.

    Raises
    ------
    LowRankError
        Where the file is not a regular file inside `folder`: a model must not read elsewhere.
    """
    said = {entry.key: entry.value for entry in tensor.external_data}
    path = external_file(tensor.name, said.get("location", ""), folder)
    try:
        offset = int(said.get("offset") or 0)
    except ValueError as error:
        raise LowRankError(f"tensor '{tensor.name}' is damaged ({error}): export the model again") from error
    if offset < 0:
        raise LowRankError(f"tensor '{tensor.name}' is damaged (its offset is {offset}): export the model again")
    if not path.is_file():
        raise LowRankError(f"tensor '{tensor.name}' is stored in {path}, which is not there: copy it beside the model")
    return path, offset


def _densify(sparse: onnx.SparseTensorProto, folder: Path) -> np.ndarray:
    """The whole of a sparse tensor.

    Raises
    ------
    LowRankError
        Where it is larger than this machine's memory, or its values have no place in it.
    """
    name, shape = sparse.values.name, tuple(sparse.dims)
    values, indices = read_tensor(sparse.values, folder), read_tensor(sparse.indices, folder)
    check_fits(f"sparse tensor '{name}'", abs(math.prod(shape)) * values.itemsize, "the model is damaged")
    try:
        dense = np.zeros(shape, dtype=values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise LowRankError(f"sparse tensor '{name}' is damaged ({one_line(error)}): export the model again") from error
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

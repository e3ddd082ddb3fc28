"""Writing a model: the old file or the whole new one, never a part, never over the source."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.graph.constants import external_place, read_tensor
from onnx_lowrank.graph.model import MAX_PROTO_BYTES, Model, all_graphs, serialize
from onnx_lowrank.types import LowRankError

EXTERNAL_FROM = 1024
"""Tensors of at least this many bytes go to the data file, where there is one."""

MARGIN = 1 << 27
"""Left for everything in a model that is not an initializer."""

ALIGNMENT = 4096
"""Of tensors in the data file, so that a runtime can map them."""


def check_destination(path: Path, source: Path | None) -> None:
    """See that a model can be written to `path`.

    Raises
    ------
    LowRankError
        Where the folder is missing, or the path is a folder or the source itself.
    """
    if path.is_dir():
        raise LowRankError(f"{path} is a folder: the path of a file to write was expected")
    if not path.parent.is_dir():
        raise LowRankError(f"the folder {path.parent} does not exist: make it first")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise LowRankError(f"{path} is the model that was given: choose another name for the result")
    if not os.access(path.parent, os.W_OK):
        raise LowRankError(f"the folder {path.parent} cannot be written to: choose another or change its permissions")


def save(model: Model, path: str | Path) -> None:
    """Write `model` to `path`, with its large tensors in ``path + '.data'`` where they were external or need to be.

    Both files are written under other names first and renamed when they are whole.

    Raises
    ------
    LowRankError
        As :func:`check_destination`.
    """
    path = Path(path)
    check_destination(path, model.path)
    tensors = [t for graph in all_graphs(model.graph) for t in graph.initializer]
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        part = Path(scratch) / path.name
        if any(map(uses_external_data, tensors)) or sum(map(_stored_bytes, tensors)) > MAX_PROTO_BYTES - MARGIN:
            data = path.with_name(path.name + ".data")
            _check_data_file(data, model, tensors)
            _write(part, serialize(_externalized(model, Path(scratch) / data.name)))
            os.replace(Path(scratch) / data.name, data)
        else:
            _write(part, serialize(model))
        os.replace(part, path)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor, from its shape: reading its data would copy it."""
    return math.prod(tensor.dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def _check_data_file(data: Path, model: Model, tensors: list[onnx.TensorProto]) -> None:
    sources = {external_place(t, model.folder)[0] for t in tensors if uses_external_data(t)}
    if data.exists() and data.resolve() in sources:
        raise LowRankError(f"{data} holds the weights of the model that was given: choose another name for the result")


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _externalized(model: Model, data: Path) -> Model:
    """A copy of `model` whose large tensors are in the file `data`, written tensor by tensor."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model.proto)
    with open(data, "wb") as file:
        for graph in all_graphs(bare.graph):
            for tensor in graph.initializer:
                if not uses_external_data(tensor) and _stored_bytes(tensor) < EXTERNAL_FROM:
                    continue
                value = read_tensor(tensor, model.folder)
                raw = onnx.numpy_helper.from_array(value).raw_data
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                offset = file.tell()
                file.write(raw)
                for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
                    tensor.ClearField(field)
                del tensor.external_data[:]
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, text in (("location", data.name), ("offset", offset), ("length", len(raw))):
                    tensor.external_data.add(key=key, value=str(text))
        file.flush()
        os.fsync(file.fileno())
    return Model(bare, data.parent)

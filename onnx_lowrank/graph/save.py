"""Writing a model: the old file or the whole new one, never a part, never over the source."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.files import scratch_folder
from onnx_lowrank.graph.constants import read_external, read_tensor, stored_bytes
from onnx_lowrank.graph.model import MAX_PROTO_BYTES, Model, all_graphs, serialize, stored_tensors
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
        As :func:`check_destination`; where a file of the model that was given would be overwritten; where the
        disk is full or fails.
    """
    path = Path(path)
    check_destination(path, model.path)
    _check_data_file(path, model)
    sizes = [stored_bytes(tensor) for graph in all_graphs(model.graph) for tensor in graph.initializer]
    external = any(map(uses_external_data, stored_tensors(model.proto))) or sum(sizes) > MAX_PROTO_BYTES - MARGIN
    data = path.with_name(path.name + ".data")
    if external:
        _check_data_file(data, model)
    try:
        with scratch_folder(path.parent, f".{path.name}-") as scratch:
            part, data_part = scratch / path.name, scratch / data.name
            if external:
                _write(part, serialize(_externalized(model, data_part)))
                _replace_both(data_part, data, part, path)
            else:
                _write(part, serialize(model))
                os.replace(part, path)
    except OSError as error:
        raise LowRankError(f"{path} cannot be written ({error.strerror or error}): nothing was changed") from error


def _check_data_file(path: Path, model: Model) -> None:
    if Path(os.path.realpath(path)) in model.data_files:
        raise LowRankError(f"{path} holds the weights of the model that was given: choose another name for the result")


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace_both(data_part: Path, data: Path, part: Path, path: Path) -> None:
    """Rename both, or neither: a model with the data of another is worth nothing."""
    before = data_part.with_name("before")
    if data.exists():
        os.replace(data, before)
    try:
        os.replace(data_part, data)
        os.replace(part, path)
    except BaseException:
        data.unlink(missing_ok=True)
        if before.exists():
            before.rename(data)
        raise


def _externalized(model: Model, data: Path) -> Model:
    """A copy of `model` whose large tensors are in the file `data`, written tensor by tensor."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model.proto)
    with open(data, "wb") as file:
        for tensor in _for_data_file(bare):
            raw = _raw(tensor, model.folder)
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


def _for_data_file(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Tensors that are external already, and large initializers. Those of strings have no raw data."""
    found = [tensor for tensor in stored_tensors(proto) if uses_external_data(tensor)]
    for tensor in (tensor for graph in all_graphs(proto.graph) for tensor in graph.initializer):
        fits = tensor.data_type != onnx.TensorProto.STRING and stored_bytes(tensor) >= EXTERNAL_FROM
        if fits and not uses_external_data(tensor):
            found.append(tensor)
    return found


def _raw(tensor: onnx.TensorProto, folder: Path) -> bytes:
    if uses_external_data(tensor):
        return read_external(tensor, folder)
    return (
        tensor.raw_data
        if tensor.HasField("raw_data")
        else onnx.numpy_helper.from_array(read_tensor(tensor, folder)).raw_data
    )

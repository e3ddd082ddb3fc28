"""Writing a model: the old file or the whole new one, never a part, never over the source."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.files import scratch_folder
from onnx_lowrank.graph.datafile import DataFile, for_data_file
from onnx_lowrank.graph.limits import stored_bytes
from onnx_lowrank.graph.model import MAX_PROTO_BYTES, Model, all_graphs, serialize, stored_tensors
from onnx_lowrank.types import LowRankError

MARGIN = 1 << 27
"""Left for everything in a model that is not an initializer."""


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
    with DataFile(data) as file:
        for tensor in for_data_file(bare):
            file.take(tensor, model.folder)
        file.sync()
    return Model(bare, data.parent)

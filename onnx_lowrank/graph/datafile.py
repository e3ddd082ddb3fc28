"""Files of external data: tensors one after the other, never more than a chunk of one in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import onnx
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.graph.constants import external_chunks, read_tensor, stored_bytes
from onnx_lowrank.graph.limits import HELD
from onnx_lowrank.graph.model import Model, all_graphs, stored_tensors

EXTERNAL_FROM = 1024
"""Tensors of at least this many bytes go to the data file, where there is one."""

ALIGNMENT = 4096
"""Of tensors in the data file, so that a runtime can map them."""

LARGE_BYTES = 1 << 30
"""External data of more bytes than this are never in memory all at once."""


class DataFile:
    """A file of external data while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 (closed where the block ends)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take(self, tensor: onnx.TensorProto, folder: Path) -> None:
        """Write the value of a tensor, which then refers to this file; its own external data are read from `folder`."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for chunk in _chunks(tensor, folder):
            self._file.write(chunk)
        for field in ("raw_data", *HELD):
            tensor.ClearField(field)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        length = self._file.tell() - offset
        for key, text in (("location", self._path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(text))

    def taken(self, tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
        """A copy of a tensor, which is changed, with its value in the file where that is large enough."""
        moved, bare = tensor, onnx.TensorProto()
        if fits(tensor):
            self.take(moved, folder)
        # a message of its own: what is taken out of another frees nothing while that is alive
        bare.CopyFrom(moved)
        return bare

    def sync(self) -> None:
        """See that what was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def fits(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor inside a model is worth a place in a data file. Those of strings have no raw data."""
    return tensor.data_type != onnx.TensorProto.STRING and stored_bytes(tensor) >= EXTERNAL_FROM


def for_data_file(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Tensors that are external already, and large initializers."""
    found = [tensor for tensor in stored_tensors(proto) if uses_external_data(tensor)]
    for tensor in (tensor for graph in all_graphs(proto.graph) for tensor in graph.initializer):
        if not uses_external_data(tensor) and fits(tensor):
            found.append(tensor)
    return found


def is_large(model: Model) -> bool:
    """Whether a model has more external data than is ever to be in memory."""
    outside = (tensor for tensor in stored_tensors(model.proto) if uses_external_data(tensor))
    return sum(map(stored_bytes, outside)) > LARGE_BYTES


def _chunks(tensor: onnx.TensorProto, folder: Path) -> Iterator[bytes]:
    if uses_external_data(tensor):
        yield from external_chunks(tensor, folder)
    elif tensor.HasField("raw_data"):
        yield tensor.raw_data
    else:
        yield onnx.numpy_helper.from_array(read_tensor(tensor, folder)).raw_data

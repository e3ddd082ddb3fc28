"""Where the data of stored tensors lie in the file of a model, told without reading them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import lru_cache

GRAPH, INITIALIZER, NAME, RAW_DATA = 7, 5, 8, 9
"""Numbers of the fields ``ModelProto.graph``, ``GraphProto.initializer``, ``TensorProto.name`` and ``raw_data``."""

VARINT, EIGHT_BYTES, SIZED, FOUR_BYTES = 0, 1, 2, 5
"""Kinds of fields in protobuf's format that have an end of their own."""


@lru_cache(maxsize=1)
def raw_places(path: str, size: int, changed: int) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of the raw data of each initializer of the main graph, by its name.

    Parameters
    ----------
    size, changed
        Of the file, in bytes and nanoseconds: another file of the same name is looked at again.

    Raises
    ------
    OSError, ValueError
        Where the file cannot be read, or is no model.
    """
    found = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for graph in _fields(data, (0, len(data)), GRAPH):
            for tensor in _fields(data, graph, INITIALIZER):
                for first, last in _fields(data, tensor, NAME):
                    name = data[first:last].decode()
                for first, last in _fields(data, tensor, RAW_DATA):
                    found[name] = first, last - first
    return found


def _fields(data: mmap.mmap, within: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Where the contents of the fields of one number are, in the message that lies `within`."""
    at, end = within
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            _, last = _varint(data, at)
        elif kind == SIZED:
            length, at = _varint(data, at)
            last = at + length
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            last = at + (8 if kind == EIGHT_BYTES else 4)
        else:
            raise ValueError(f"a field of kind {kind}")
        if last > end:
            raise ValueError("a field that goes on beyond its message")
        if number == wanted and kind == SIZED:
            yield at, last
        at = last


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at

"""Rows of ``.npz`` members and ``.npy`` files, read as they are needed and never by pickle."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from onnx_lowrank.data.pieces import Piece
from onnx_lowrank.types import LowRankError


@dataclass(frozen=True)
class Header:
    """What the beginning of an ``.npy`` member says."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    def describe(self) -> str:
        """Name, dtype and shape, as they appear in messages."""
        return f"{self.name} {self.dtype} {self.shape}"


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open archive; whatever is wrong with it while it is read becomes one `LowRankError`."""
    try:
        # a file of our own: it is closed even while streams of members are not
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise LowRankError(f"{path}: not a readable .npz archive ({error}); write it again with numpy.savez") from error


def read_headers(path: Path) -> dict[str, Header]:
    """The arrays of an archive by name, without their data."""
    with open_archive(path) as archive:
        headers = {}
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as stream:
                    header = _read_header(stream, member.filename[: -len(".npy")], path)
                    # Nothing is allocated by a header that promises more than the file holds.
                    expected = math.prod(header.shape) * header.dtype.itemsize
                    if not header.dtype.hasobject and expected != member.file_size - stream.tell():
                        raise LowRankError(
                            f"{path}: array {header.name!r} is damaged: its size is not that of {header.shape}"
                        )
                headers[header.name] = header
        return headers


def member_rows(archive: zipfile.ZipFile, header: Header, bounds: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Rows of one array, for increasing ``(first, last)``; no more than one answer is in memory at a time.

    An array in Fortran order has its rows scattered over the whole file, so that one alone is read whole.
    """
    with archive.open(f"{header.name}.npy") as stream:
        if header.fortran:
            whole = np.lib.format.read_array(stream, allow_pickle=False)
            yield from (np.ascontiguousarray(whole[first:last]) for first, last in bounds)
            return
        _read_header(stream, header.name, archive.filename)
        row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
        position = 0
        for first, last in bounds:
            stream.seek((first - position) * row_bytes, 1)
            rows = np.empty((last - first, *header.shape[1:]), header.dtype)
            if stream.readinto(rows.reshape(-1).view(np.uint8).data) != rows.nbytes:  # type: ignore[attr-defined]
                raise EOFError(f"array {header.name!r} ends early")
            position = last
            yield rows


def read_member(path: Path, header: Header) -> np.ndarray:
    """One small array, whole."""
    with open_archive(path) as archive:
        return next(member_rows(archive, header, [(0, header.shape[0])]))


def read_npz(
    path: Path,
    columns: Mapping[str, Header],
    labels: Header | None,
    start: int,
    stop: int | None,
    size: int,
    every: int = 1,
) -> Generator[Piece, None, None]:
    """Samples of an archive; `columns`: input -> its array. A `Reader` once its first three are bound."""
    samples = min(header.shape[0] for header in columns.values())
    bounds = list(_bounds(start, samples if stop is None else min(stop, samples), size, every))
    with open_archive(path) as archive:
        arrays = {name: member_rows(archive, header, bounds) for name, header in columns.items()}
        targets = None if labels is None else member_rows(archive, labels, bounds)
        for first, last in bounds:
            feeds = {name: next(rows) for name, rows in arrays.items()}
            yield Piece(feeds, None if targets is None else next(targets), last - first)


def map_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, mapped: only the parts that are used are read."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError, EOFError) as error:
        raise LowRankError(f"{path}: not a readable .npy file ({error}); write it again with numpy.save") from error


def read_npy(
    path: Path, name: str, start: int, stop: int | None, size: int, every: int = 1
) -> Generator[Piece, None, None]:
    """Samples of an ``.npy`` file for the input `name`. A `Reader` once its first two are bound."""
    array = map_npy(path)
    for first, last in _bounds(start, len(array) if stop is None else min(stop, len(array)), size, every):
        yield Piece({name: np.array(array[first:last], order="C")}, None, last - first)


def _bounds(start: int, stop: int, size: int, every: int) -> Iterator[tuple[int, int]]:
    if every > 1:  # one by one
        return ((first, first + 1) for first in range(start, stop, every))
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _read_header(stream: IO[bytes], name: str, path: object) -> Header:
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise LowRankError(f"{path}: {name!r} is not an array that can be read ({error})") from error
    return Header(name, shape, dtype, fortran)

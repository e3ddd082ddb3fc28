"""Pictures as samples: a folder of files, or an archive of pixels or of JPEG files end to end."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np

from onnx_lowrank.data.archives import Header, member_rows, open_archive, read_member
from onnx_lowrank.data.dataset import Dataset, fits, input_text, shape_text
from onnx_lowrank.data.pieces import Piece, Reader
from onnx_lowrank.data.preprocess import Preprocess, apply_preprocess, decode_picture
from onnx_lowrank.types import InputSpec, LowRankError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

NamedPicture: TypeAlias = "tuple[str, np.ndarray, np.ndarray | int | None]"
"""Name for messages, uint8 pixels, label."""

NamedPictures: TypeAlias = "Generator[NamedPicture, None, None]"


def open_picture_folder(path: Path, spec: InputSpec, preprocess: Preprocess) -> Dataset:
    """A folder of pictures in the order of their names.

    Class folders whose names are all whole numbers are the labels of those numbers; others, sorted as text, are 0, 1, 2...
    """
    folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    flat = _pictures(path.iterdir())
    if flat and folders:
        raise LowRankError(f"{path}: holds both pictures and folders: put every picture into a class folder, or none")
    if not flat and not folders:
        raise LowRankError(f"{path}: no pictures in it, expected {' '.join(SUFFIXES)}, or a folder for each class")
    numbered = all(folder.name.isdecimal() and len(folder.name) < 19 for folder in folders)  # 64 bits
    labels = [int(folder.name) for folder in folders] if numbered else list(range(len(folders)))
    if twice := [label for label, other in pairwise(sorted(labels)) if label == other]:
        raise LowRankError(f"{path}: two folders for class {twice[0]}: one for each class was expected")
    files: list[tuple[Path, int | None]] = [(file, None) for file in flat]
    for label, folder in zip(labels, folders, strict=True):
        found = _pictures(folder.rglob("*"))
        # Left out silently, it would shift the labels of all classes after it, where they have no numbers of their own.
        if not found and not numbered:
            raise LowRankError(f"{folder}: no pictures in this class folder: fill or remove it")
        files += [(file, label) for file in found]
    if not files:
        raise LowRankError(f"{path}: no pictures in any of its class folders, expected {' '.join(SUFFIXES)}")
    return Dataset(str(path), (spec,), partial(read_pictures, partial(_folder, files), spec, preprocess), len(files))


def open_picture_arrays(path: Path, images: Header, rows: Reader, spec: InputSpec, preprocess: Preprocess) -> Dataset:
    """Pixels in an array: uint8 (samples, height, width) or (samples, height, width, 1 or 3) in RGB order.

    `rows` reads them, with their labels, as they are stored.
    """
    if images.dtype != np.uint8 or len(images.shape) not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise LowRankError(
            f"{path}: {images.describe()} are no pictures: expected uint8 (samples, height, width) or "
            f"(samples, height, width, 1 or 3)"
        )
    read = partial(read_pictures, partial(_arrays, path, images.name, rows), spec, preprocess)
    return Dataset(str(path), (spec,), read, images.shape[0])


def open_jpeg_archive(
    path: Path, jpeg: Header, offsets: Header, labels: Header | None, spec: InputSpec, preprocess: Preprocess
) -> Dataset:
    """An archive with encoded files end to end: file i is ``jpeg[offsets[i]:offsets[i + 1]]``."""
    if jpeg.dtype != np.uint8 or len(jpeg.shape) != 1 or offsets.dtype.kind not in "iu" or len(offsets.shape) != 1:
        raise LowRankError(
            f"{path}: holds {jpeg.describe()} and {offsets.describe()}, "
            f"expected uint8 (bytes,) and integer (files + 1,)"
        )
    ends = read_member(path, offsets).astype(np.int64)
    if len(ends) == 0 or ends[0] < 0 or ends[-1] > jpeg.shape[0] or (np.diff(ends) < 0).any():
        raise LowRankError(f"{path}: offsets must rise from 0 to at most {jpeg.shape[0]}, the size of jpeg")
    read = partial(read_pictures, partial(_encoded, path, jpeg, ends, labels), spec, preprocess)
    return Dataset(str(path), (spec,), read, len(ends) - 1)


def read_pictures(
    pictures: partial[NamedPictures],
    spec: InputSpec,
    preprocess: Preprocess,
    start: int,
    stop: int | None,
    size: int,
    every: int = 1,
) -> Generator[Piece, None, None]:
    """Pictures to samples of the input, one by one. A `Reader` once its first three are bound."""
    taken = pictures(start, stop, size, every)
    with closing(taken):
        for where, picture, label in taken:
            try:
                values = apply_preprocess(picture, preprocess)
            except LowRankError as error:
                raise LowRankError(f"{where}: {error}") from error
            if not fits(values.shape, spec.shape[1:]):
                raise LowRankError(f"{where}: {_misfit(picture, values, spec, preprocess)}")
            sample = values.astype(spec.dtype)
            if spec.dtype.kind in "iu" and not np.array_equal(sample, values):
                raise LowRankError(
                    f"{where}: preprocessed values do not fit the model's input {input_text(spec)}: "
                    f"leave out scale, mean and std"
                )
            yield Piece({spec.name: sample[None]}, None if label is None else np.asarray(label)[None], 1)


def _misfit(picture: np.ndarray, values: np.ndarray, spec: InputSpec, preprocess: Preprocess) -> str:
    """Why a picture is not what the model takes, in terms of the preprocess file."""
    done = " and ".join(
        f"{name} = {list(value) if isinstance(value, tuple) else value}"
        for name, value in (("resize", preprocess.resize), ("crop", preprocess.crop))
        if value is not None
    )
    sample = shape_text(values.shape)
    return (
        f"a picture of {picture.shape[0]} x {picture.shape[1]} (height x width) with {done or 'neither resize nor crop'}, "
        f"channels = {preprocess.channels} and layout = {preprocess.layout} gives {sample}, "
        f"the model's input is {input_text(spec)}: correct the preprocess file"
    )


def _folder(
    files: Sequence[tuple[Path, int | None]], start: int, stop: int | None, size: int, every: int
) -> NamedPictures:
    for file, label in files[start:stop:every]:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise LowRankError(f"{file}: cannot be read ({error.strerror})") from error
        yield str(file), decode_picture(content, str(file)), label


def _arrays(path: Path, name: str, rows: Reader, start: int, stop: int | None, size: int, every: int) -> NamedPictures:
    index, pieces = start, rows(start, stop, size, every=every)
    with closing(pieces):
        for piece in pieces:
            for row, picture in enumerate(piece.feeds[name]):
                yield f"{path}: sample {index}", picture, None if piece.labels is None else piece.labels[row]
                index += every


def _encoded(
    path: Path,
    jpeg: Header,
    ends: np.ndarray,
    labels: Header | None,
    start: int,
    stop: int | None,
    size: int,
    every: int,
) -> NamedPictures:
    chosen = range(start, len(ends) - 1 if stop is None else min(stop, len(ends) - 1), every)
    with open_archive(path) as archive:
        files = member_rows(archive, jpeg, ((int(ends[i]), int(ends[i + 1])) for i in chosen))
        targets = None if labels is None else member_rows(archive, labels, ((i, i + 1) for i in chosen))
        for index, content in zip(chosen, files, strict=True):
            where = f"{path}: sample {index}"
            yield where, decode_picture(content.tobytes(), where), None if targets is None else next(targets)[0]


def _pictures(items: Iterator[Path]) -> list[Path]:
    return sorted(item for item in items if item.suffix.lower() in SUFFIXES and not item.name.startswith("."))

"""Samples in any order, as training takes them: read once, kept in memory or, where they are large, in a scratch file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lowrank.calibration.calibrate import HELD_OUT
from onnx_lowrank.data.dataset import Dataset
from onnx_lowrank.types import LowRankError

MEMORY = 1 << 31
"""Most bytes of samples kept in memory."""

READ = 256
"""Samples read at a time."""


@dataclass(frozen=True)
class Samples:
    """Arrays by name, first axis: samples; and their labels where there are any."""

    arrays: dict[str, np.ndarray]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return min(len(array) for array in self.arrays.values())

    def at(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The samples of these numbers, in this order."""
        labels = None if self.labels is None else self.labels[rows]
        return {name: np.asarray(array[rows]) for name, array in self.arrays.items()}, labels

    def require_labels(self) -> None:
        """See that there are labels.

        Raises
        ------
        LowRankError
            Where there are none.
        """
        if self.labels is None:
            raise LowRankError("--finetune labels takes samples with labels: give --train DATA with labels")

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the samples to train on, and of those held out: one in ``HELD_OUT``."""
        numbers = np.arange(len(self))
        held = numbers % HELD_OUT == HELD_OUT - 1
        if not held.any():
            raise LowRankError(
                f"{len(self)} samples are too few to train on: {HELD_OUT} at least, and hundreds to gain"
            )
        return numbers[~held], numbers[held]


def read_samples(data: Dataset, folder: Path) -> Samples:
    """All samples of `data`; those of more than ``MEMORY`` bytes in files in `folder`.

    Raises
    ------
    LowRankError
        Where samples differ in shape.
    """
    parts: list[dict[str, np.ndarray]] = []
    labels: list[np.ndarray] = []
    growing: dict[str, _Growing] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for feeds, marks in data.batches(READ):
        parts.append(feeds)
        arrays = dict(feeds)
        if marks is not None:
            labels.append(_whole(np.asarray(marks)))
            arrays["the labels"] = labels[-1]
        if lone := [name for name, array in arrays.items() if not array.ndim]:
            raise LowRankError(f"{data.name}: '{lone[0]}' has no axis of samples: it cannot be trained with")
        found = {name: array.shape[1:] for name, array in arrays.items()}
        shapes = shapes or found
        if uneven := [name for name, shape in found.items() if shapes.get(name) != shape]:
            raise LowRankError(
                f"{data.name}: samples of '{uneven[0]}' differ in shape: training takes samples of one shape"
            )
        if growing or sum(array.nbytes for part in parts for array in part.values()) > MEMORY:
            growing = growing or {
                name: _Growing(folder / f"samples{i}.bin", feeds[name]) for i, name in enumerate(feeds)
            }
            for name, each in growing.items():
                each.add([part[name] for part in parts])
            parts = []
    if growing:
        arrays = {name: each.array() for name, each in growing.items()}
    else:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Samples(arrays, np.concatenate(labels) if labels else None)


def _whole(labels: np.ndarray) -> np.ndarray:
    """Classes of any integer type as the one that losses take."""
    return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels


class _Growing:
    """An array that grows on disk."""

    def __init__(self, path: Path, example: np.ndarray) -> None:
        self._path, self._shape, self._dtype, self._count = path, example.shape[1:], example.dtype, 0
        path.write_bytes(b"")

    def add(self, arrays: Sequence[np.ndarray]) -> None:
        with self._path.open("ab") as file:
            for array in arrays:
                file.write(np.ascontiguousarray(array).tobytes())
                self._count += len(array)

    def array(self) -> np.ndarray:
        return np.memmap(self._path, self._dtype, "r", shape=(self._count, *self._shape))


def shuffled(rows: np.ndarray, size: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Batches of `rows` in random order; what does not fill one is left for another epoch, where there is one that does."""
    order = np.random.default_rng(seed).permutation(rows)
    for number in range(batches_of(len(rows), size)):
        yield order[number * size : (number + 1) * size]


def batches_of(samples: int, size: int) -> int:
    """How many batches :func:`shuffled` makes."""
    return max(1, samples // size)

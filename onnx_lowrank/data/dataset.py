"""What every source of data becomes: batches of feeds, regrouped, in the model's dtype, checked.

A source only yields `Piece`s, in order; how many samples each holds is its own affair. Everything that the model
asks of its feeds (names, dtype, shape, batch size, finite numbers) is seen to here, once for all sources.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_lowrank.data.pieces import Feeds, Piece, Reader, regroup
from onnx_lowrank.types import InputSpec, LowRankError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A stream of samples for one model; made by `open_data`, can be gone through any number of times.

    Parameters
    ----------
    name
        What messages call it.
    inputs
        The model's inputs.
    read
        The source.
    available
        Number of samples in the source, None where only reading it would tell.
    labelled
        True where every sample has a label, None where not yet known.
    start, stop, every
        The part of the source that is used, in samples, and of that one sample in so many.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    read: Reader = field(repr=False)
    available: int | None = None
    labelled: bool | None = None
    start: int = 0
    stop: int | None = None
    every: int = 1

    @property
    def samples(self) -> int | None:
        """Number of samples that `batches` yields; None where only reading the source would tell."""
        count = self._count
        return None if count is None else count - self.left_out

    @property
    def left_out(self) -> int:
        """Samples at the end that fill no batch, where a fixed number is taken at a time; 0 where only reading would tell."""
        return (self._count or 0) % (fixed_batch(self.inputs) or 1)

    @property
    def _count(self) -> int | None:
        if self.available is None:
            return None
        stop = self.available if self.stop is None else min(self.stop, self.available)
        return -(-max(0, stop - self.start) // self.every)

    def slice(self, start: int, stop: int | None = None) -> Dataset:
        """The samples from `start` to before `stop` (None: the end). A `stop` past the end is the end."""
        if start < 0 or (stop is not None and stop <= start):
            raise LowRankError(f"{self.name}: samples {start} to {stop} asked for, expected 0 <= start < stop")
        last = None if stop is None else self.start + stop * self.every
        ends = [end for end in (self.stop, last) if end is not None]
        part = replace(self, start=self.start + start * self.every, stop=min(ends, default=None))
        if part.samples == 0 or (part.stop is not None and part.start >= part.stop):
            held = f"{self.samples} samples" if self.samples is not None else f"less than {self.stop}"
            unit = f", taken {fixed_batch(self.inputs)} at a time" if fixed_batch(self.inputs) else ""
            raise LowRankError(
                f"{self.name}: nothing between samples {start} and {stop or 'the end'}: it has {held}{unit}"
            )
        return part

    def take(self, count: int) -> Dataset:
        """The first `count` samples, or all where there are fewer."""
        return self.slice(0, count)

    def spread(self, count: int) -> Dataset:
        """At most `count` samples from all over: samples often stand class by class. The first, of a source of unknown length."""
        if self.samples is None or self.samples <= count:
            return self.take(count)
        return replace(self, every=self.every * -(-self.samples // count))

    def skip(self, count: int) -> Dataset:
        """Everything but the first `count` samples."""
        return self.slice(count)

    def batches(self, size: int) -> Iterator[tuple[Feeds, np.ndarray | None]]:
        """Read the samples in order, in batches.

        Parameters
        ----------
        size
            Samples in a batch. The last one is smaller where the samples run out, and so is one before pictures of
            another size. A model whose inputs fix their first dimension decides itself: its batches have exactly that
            many samples, whatever `size` is, and the last samples that do not fill a batch are left out, with a
            warning in the log.

        Yields
        ------
        tuple of dict and ndarray or None
            Feeds in the model's dtype, and the labels of these samples (first axis: samples).

        Raises
        ------
        LowRankError
            For whatever the model cannot take: names, shapes, dtypes, numbers that are not finite; and for no samples.
        """
        if size < 1:
            raise LowRankError(f"batches of {size} samples asked for, expected 1 or more")
        return self._batches(fixed_batch(self.inputs), size)

    def _batches(self, fixed: int | None, size: int) -> Iterator[tuple[Feeds, np.ndarray | None]]:
        some = {"every": self.every} if self.every > 1 else {}
        pieces = self.read(self.start, self.stop, fixed or size, **some)
        with closing(pieces):
            yield from self._conformed(pieces, fixed, size)

    def _conformed(
        self, pieces: Iterable[Piece], fixed: int | None, size: int
    ) -> Iterator[tuple[Feeds, np.ndarray | None]]:
        position, short, labelled = self.start, 0, self.labelled
        for piece in regroup(pieces, fixed or size):
            if short:
                raise LowRankError(
                    f"{self.name}: the model takes batches of {fixed}, but the arrays change shape at sample "
                    f"{position}: bring all samples to one size, or export the model with a dynamic batch"
                )
            if labelled is not None and labelled != (piece.labels is not None):
                raise LowRankError(f"{self.name}: sample {position}: some samples have labels and others have none")
            labelled = piece.labels is not None
            if fixed is not None and piece.rows is not None and piece.rows < fixed:
                short = piece.rows
            else:
                yield conform(piece, self.inputs, f"{self.name}: ", position), piece.labels
            position += piece.samples * self.every
        if position - self.start == short * self.every:
            reason = f"the model takes {fixed} at a time and there are {short}" if short else "it is empty"
            hint = "; a function must give a new iterator at each call" if self.available is None else ""
            raise LowRankError(f"{self.name}: no samples: {reason}{hint}")
        if short:
            logger.warning(
                "%s: the last %d samples are left out: the model takes %d at a time", self.name, short, fixed
            )


def shape_text(shape: Sequence[int | str | None]) -> str:
    """A shape as in ``(N, 3, ?, ?)``."""
    return f"({', '.join('?' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def input_text(spec: InputSpec) -> str:
    """An input as in ``x float32 (N, 3, 32, 32)``."""
    return f"{spec.name} {spec.dtype} {shape_text(spec.shape)}"


def fixed_batch(inputs: Iterable[InputSpec]) -> int | None:
    """The batch size that the model insists on: the one fixed first dimension of its inputs, if there is one."""
    sizes = {size for spec in inputs for size in spec.shape[:1] if isinstance(size, int)}
    return sizes.pop() if len(sizes) == 1 else None


def fits(given: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether an array of the shape `given` is what an input of the shape `wanted` takes."""
    return len(given) == len(wanted) and all(
        not isinstance(size, int) or size == have for have, size in zip(given, wanted, strict=True)
    )


def conform(piece: Piece, inputs: Sequence[InputSpec], where: str, position: int = 0) -> Feeds:
    """The feeds of a piece in the model's dtype, checked; `where` and the sample number `position` begin messages."""
    feeds = {}
    for spec in inputs:
        array = piece.feeds[spec.name]
        if not fits(array.shape, spec.shape):
            raise LowRankError(
                f"{where}array {spec.name!r} has shape {shape_text(array.shape)} (first axis: samples), "
                f"the model's input is {input_text(spec)}{_other_layout(array.shape, spec.shape)}"
            )
        array = feeds[spec.name] = cast(array, spec, where)
        if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            first = 0 if piece.rows is None else int(np.argwhere(~finite)[0][0])
            raise LowRankError(
                f"{where}array {spec.name!r} is not finite (NaN or infinite as {spec.dtype}) in sample "
                f"{position + first}: correct or remove it"
            )
    return feeds


def _other_layout(given: tuple[int, ...], wanted: Sequence[int | str | None]) -> str:
    """A hint where the channels are at the other end."""
    if len(given) == 4:  # pictures
        for name, axes in (("NHWC", (0, 3, 1, 2)), ("NCHW", (0, 2, 3, 1))):
            if fits([given[axis] for axis in axes], wanted):
                return f": it looks like {name}: store array.transpose{axes}"
    return ""


def cast(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """The array in the dtype of the input: between floats, and between integers that keep their value."""
    if array.dtype == spec.dtype:
        return array
    kinds = array.dtype.kind + spec.dtype.kind
    if kinds == "ff":
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and that is reported with its sample
            return array.astype(spec.dtype)
    if kinds[0] in "iub" and kinds[1] in "iu":
        result = array.astype(spec.dtype)
        if np.array_equal(result, array):
            return result
        raise LowRankError(f"{where}array {spec.name!r} holds {array.dtype} values that do not fit {spec.dtype}")
    if kinds[0] in "iu" and kinds[1] == "f":
        raise LowRankError(
            f"{where}array {spec.name!r} holds {array.dtype}, the model's input is {input_text(spec)}: integer "
            f"pictures are converted as the preprocess file says, never guessed; give one (--preprocess), "
            f"or store {spec.dtype}"
        )
    raise LowRankError(
        f"{where}array {spec.name!r} holds {array.dtype}, which cannot be cast safely to the model's "
        f"{input_text(spec)}: store {spec.dtype}"
    )

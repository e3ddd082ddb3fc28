"""Pieces of a stream of samples: what sources yield, cut and joined to the batches asked for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Feeds: TypeAlias = dict[str, np.ndarray]
"""Input name -> array, what an inference takes."""


@dataclass(frozen=True)
class Piece:
    """Consecutive samples, as a source reads them.

    ``rows`` is their number, the first axis of every array; None for a feed whose arrays have no first axis in
    common: it can neither be cut nor joined, and counts as one sample.
    """

    feeds: Feeds
    labels: np.ndarray | None
    rows: int | None

    @property
    def samples(self) -> int:
        """How many samples this counts as."""
        return 1 if self.rows is None else self.rows


Reader: TypeAlias = Callable[..., "Generator[Piece, None, None]"]
"""``read(start, stop, size)``: the samples from `start` to `stop` (None: the end), at best `size` at a time.

One of a source of known length also takes ``every=n``: of these samples one in `n`. Whoever reads closes it, and with it what it
has open.
"""


def regroup(pieces: Iterable[Piece], size: int) -> Iterator[Piece]:
    """Cut and join pieces to `size` rows; fewer only at the end and before a piece of other shapes."""
    pending: list[Piece] = []
    held = 0
    for piece in pieces:
        if pending and not _joinable(pending[-1], piece):
            yield _join(pending)
            pending, held = [], 0
        if piece.rows is None:
            yield piece
            continue
        first = 0
        while held + piece.rows - first >= size:
            last = first + size - held
            yield _join([*pending, cut(piece, first, last)])
            pending, held, first = [], 0, last
        if first < piece.rows:
            pending.append(cut(piece, first, piece.rows))
            held += piece.rows - first
    if pending:
        yield _join(pending)


def window(pieces: Iterable[Piece], start: int, stop: int | None) -> Generator[Piece, None, None]:
    """The samples from `start` to `stop` of a source that can only be read from its beginning."""
    position = 0
    for piece in pieces:
        first, last = max(0, start - position), piece.samples
        if stop is not None:
            last = min(last, stop - position)
        if first < last:
            yield piece if piece.rows is None else cut(piece, first, last)
        position += piece.samples
        if stop is not None and position >= stop:
            return


def cut(piece: Piece, first: int, last: int) -> Piece:
    """Rows `first` to `last` of a piece, as views."""
    if (first, last) == (0, piece.rows):
        return piece
    feeds = {name: array[first:last] for name, array in piece.feeds.items()}
    return Piece(feeds, None if piece.labels is None else piece.labels[first:last], last - first)


def _joinable(one: Piece, other: Piece) -> bool:
    if one.rows is None or other.rows is None or (one.labels is None) != (other.labels is None):
        return False
    pairs = [(array, other.feeds[name]) for name, array in one.feeds.items()]
    if one.labels is not None and other.labels is not None:
        pairs.append((one.labels, other.labels))
    return all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)


def _join(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    feeds = {name: np.concatenate([piece.feeds[name] for piece in pieces]) for name in pieces[0].feeds}
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return Piece(feeds, np.concatenate(labels) if labels else None, sum(piece.samples for piece in pieces))

"""Channels that carry nothing on any sample left out, with all that is computed for them.

Trained networks are full of them: a ReLU that is never above zero, a depthwise filter that shrank to nothing. What such a
channel costs is no error's price, as a lower rank is: it is given back for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.graph.channels import Family, Kept, families, with_channels, with_ranges
from onnx_lowrank.graph.model import Model, serialize
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.types import Progress

LEAST_REACH = 1e-3
"""Share of what the channel of the farthest reach adds to what reads it, up to which a channel carries nothing."""


@dataclass(frozen=True)
class Dropped:
    """What was left out: channels, of how many tensors' worth of them."""

    channels: int
    families: int


def without_dead_channels(
    model: Model, shapes: Shapes, feeds: Sequence[Mapping[str, np.ndarray]], block: int, progress: Progress
) -> tuple[Model, Dropped]:
    """`model` without the channels that carry nothing on any sample; itself where there are none.

    A channel is left out where no position of any sample moves what reads it by more than ``LEAST_REACH`` of what the
    channel that reaches farthest does. Where nothing is padded it may be any number, as long as that is the same everywhere:
    it goes into the bias.

    Parameters
    ----------
    shapes
        Of its tensors, for one sample.
    feeds
        Samples, batch by batch.
    block
        Multiple that the channels left are kept to: kernels work on so many at once.
    """
    found = families(model, shapes)
    if not found:
        return model, Dropped(0, 0)
    ranks = {reading.tensor: reading.rank for family in found for reading in family.readings}
    ranges = _ranges(model, ranks, feeds, progress)
    kept = [each for family in found if (each := _kept(family, ranges, block))]
    if not kept:
        return model, Dropped(0, 0)
    gone = sum(each.family.size - len(each.channels) for each in kept)
    return with_channels(model, kept), Dropped(gone, len(kept))


def _kept(family: Family, ranges: Mapping[str, tuple[np.ndarray, np.ndarray]], block: int) -> Kept | None:
    """What stays of a family; None where all of it does."""
    farthest, values = np.zeros(family.size), {}
    for reading in family.readings:
        low, high = ranges[reading.tensor]
        if reading.takes_constants:
            values[reading.tensor] = (low + high) / 2
            moved = (high - low) / 2
        else:
            moved = np.maximum(np.abs(low), np.abs(high))
        reach = reading.norms * moved
        if not np.isfinite(reach).all():
            return None
        farthest = np.maximum(farthest, reach / (reach.max() or 1.0))
    alive = family.size - np.count_nonzero(farthest <= LEAST_REACH)
    count = min(family.size, max(1, -(-alive // block)) * block)
    if count == family.size:
        return None
    order = np.argsort(-farthest, kind="stable")
    return Kept(family, np.sort(order[:count]), values)


def _ranges(
    model: Model, ranks: Mapping[str, int], feeds: Sequence[Mapping[str, np.ndarray]], progress: Progress
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Least and largest number of every channel of the tensors called by the names of `ranks`, over all samples."""
    asked, outputs = with_ranges(model, ranks)
    session = Session(serialize(asked), RunSettings(threads=0, spin=False), folder=model.folder)
    seen: list[list[np.ndarray]] = []
    for number, batch in enumerate(feeds, 1):
        seen.append(session.run(batch, outputs))
        progress("dead channels", number, len(feeds))
    each = [np.array(values, dtype=np.float64) for values in zip(*seen, strict=True)]
    return {
        name: (low.min(axis=0), high.max(axis=0)) for name, low, high in zip(ranks, each[::2], each[1::2], strict=True)
    }

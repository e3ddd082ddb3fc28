"""Channels that carry nothing on any sample left out, with all that is computed for them.

Trained networks are full of them: a ReLU that is never above zero, a depthwise filter that shrank to nothing. What such a
channel costs is no error's price, as a lower rank is: it is given back for nothing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.graph.channels import Family, families
from onnx_lowrank.graph.drop_channels import Kept, shifted_biases, with_channels, with_ranges
from onnx_lowrank.graph.model import Model, serialize
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.types import Progress

LEAST_REACH = 1e-3
"""What all channels left out may move an output by at most, as a share of what the channel that moves it farthest does."""


@dataclass(frozen=True)
class Dropped:
    """Channels that were left out, and places of the layers that make them in the graph as it was."""

    channels: int
    makers: tuple[int, ...]


def without_dead_channels(
    model: Model,
    shapes: Shapes,
    feeds: Sequence[Mapping[str, np.ndarray]],
    block: int,
    progress: Progress,
    spared: Container[int] = (),
) -> tuple[Model, Dropped]:
    """`model` without the channels that carry nothing on any sample; itself where there are none.

    Channels are left out as long as together, at no position of any sample, they move an output of what reads them by more
    than ``LEAST_REACH`` of what the channel does that moves it farthest. For a convolution that pads nothing a channel may be any
    number, as long as that is the same everywhere: it goes into the bias. Elsewhere it has to be 0.

    Parameters
    ----------
    shapes
        Of its tensors, for one sample.
    feeds
        Samples, batch by batch.
    block
        Multiple that the channels left are kept to: kernels work on so many at once.
    spared
        Places of nodes in the graph that are to stay as they are.
    """
    found = [family for family in families(model, shapes) if not any(part.position in spared for part in family.parts)]
    ranks = {reading.tensor: reading.rank for family in found for reading in family.readings}
    ranges = _ranges(model, ranks, feeds, progress) if found else {}
    kept = [each for family in found if (each := _kept(family, ranges, block)) and _fits(model, each)]
    if not kept:
        return model, Dropped(0, ())
    makers = {place for each in kept for place in each.family.makers}
    return with_channels(model, kept), Dropped(sum(len(each.gone) for each in kept), tuple(sorted(makers)))


def _kept(family: Family, ranges: Mapping[str, tuple[np.ndarray, np.ndarray]], block: int) -> Kept | None:
    """What stays of a family; None where all of it does."""
    shares, values = [], {}
    for reading in family.readings:
        low, high = ranges[reading.tensor]
        if not np.isfinite([low, high]).all():
            return None
        spread = (high - low) / 2
        moved = np.maximum(np.abs(low), np.abs(high))
        if reading.takes_constants:
            values[reading.tensor], moved = (low + high) / 2, spread
        farthest = (reading.norms * spread).max(axis=1, keepdims=True)
        reach = reading.norms * moved  # (O, C)
        shares.append(np.divide(reach, farthest, out=np.where(reach > 0, np.inf, 0.0), where=farthest > 0))
    each = np.concatenate(shares)
    order = np.argsort(each.max(axis=0), kind="stable")
    dead = np.count_nonzero(np.cumsum(each[:, order], axis=1).max(axis=0) <= LEAST_REACH)
    count = min(family.size, max(1, -(-(family.size - dead) // block)) * block)
    return None if count == family.size else Kept(family, np.sort(order[family.size - count :]), values)


def _fits(model: Model, kept: Kept) -> bool:
    """Whether the biases that take what is left out hold it."""
    return all(np.isfinite(bias).all() for bias in shifted_biases(model, kept).values())


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

"""Models worth timing as wholes: for each kind of layer, method and a few ranks one, and mixes of all."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_lowrank.candidates import Group, price, spread
from onnx_lowrank.latency.pricing import Point, points_of
from onnx_lowrank.latency.timings import Place, Timings
from onnx_lowrank.subject import Subject
from onnx_lowrank.types import Candidate, Layer, Rank

POINTS = 3
"""Ranks of a method that are measured for each kind of layer; one more over two modes."""

MODELS = 128
"""Most models that are timed for one table."""

LEAST_SHARE = 0.01
"""Of the model's MACs, below which a kind of layer is not worth a model: its time is taken to follow its MACs."""

MIXES = 8
"""Models with all kinds of layers changed, beyond those."""


@dataclass(frozen=True)
class Part:
    """All groups of a kind by one method at one rank."""

    kind: str
    point: Point
    choices: tuple[Candidate, ...]

    @property
    def place(self) -> Place:
        return Place(self.kind, self.point[0])


@dataclass(frozen=True)
class Probe:
    """One model to time: one kind of layer changed, or, in a mix, all of them at once."""

    parts: tuple[Part, ...]

    @property
    def choices(self) -> tuple[Candidate, ...]:
        return tuple(choice for part in self.parts for choice in part.choices)


def digest(subject: Subject) -> str:
    """What tells models apart whose times differ: a hash of the layers and their sizes, not of the kernels' values."""
    lines = [f"{layer.name} {_of_layer(layer)}" for layer in subject.found.layers]
    return hashlib.sha256("\n".join([*lines, str(subject.cost.macs)]).encode()).hexdigest()[:32]


def _of_layer(layer: Layer) -> str:
    return f"{layer.op_type} {layer.spec} {layer.dtype} {layer.input_size} {layer.batch}"


def kind_of(group: Group) -> str:
    """All that the time of a group of layers depends on, its neighbours and the machine apart."""
    return "; ".join(map(_of_layer, group.layers))


def probes(
    subject: Subject, candidates: Sequence[Sequence[Candidate]], block: int, timings: Timings | None = None
) -> tuple[Probe, ...]:
    """The models worth timing, the most telling first, at most ``MODELS``.

    Parameters
    ----------
    candidates
        Of each group of the subject; further ones, over several groups, are left out.
    block
        What ranks are kept to.
    timings
        What is known already.
    """
    kinds: dict[str, list[Group]] = {}
    members: dict[str, Sequence[Candidate]] = {}
    for group, each in zip(subject.groups, candidates, strict=False):
        kinds.setdefault(kind_of(group), []).append(group)
        members.setdefault(kind_of(group), each)
    macs = {kind: sum(group.dense.cost.macs for group in groups) for kind, groups in kinds.items()}
    worth = [kind for kind in kinds if macs[kind] >= LEAST_SHARE * subject.cost.macs]
    queues = []
    for kind in sorted(worth, key=lambda kind: -macs[kind]):
        known = partial(_known, timings, kind)
        queues.append([(kind, point) for point in points_of(members[kind], partial(picked, block=block), known)])
    turns = (item for each in itertools.zip_longest(*queues) for item in each if item is not None)
    parts = [
        Part(kind, point, tuple(price(group, point[0], point[1], 0.0) for group in kinds[kind]))
        for kind, point in itertools.islice(turns, MODELS)
    ]
    return tuple(Probe((part,)) for part in parts)


def picked(ranks: Sequence[Rank], block: int) -> list[Rank]:
    """A few of `ranks` that stand for all: the middle, the highest and the lowest; over two modes, as :func:`spread` does.

    Those below one block take about as long as one block, and are left out where there are enough others.

    Examples
    --------
    >>> picked([(1,), (2,), (4,), (8,), (16,), (24,)], 8)
    [(16,), (24,), (8,)]
    """
    enough = [rank for rank in sorted(set(ranks)) if min(rank) >= block]
    left = enough if len(enough) >= POINTS else sorted(set(ranks))
    if not left or len(left[0]) > 1:
        return spread(left, POINTS)
    middle = (left[0][0] + left[-1][0]) / 2
    return list(dict.fromkeys([min(left, key=lambda rank: abs(rank[0] - middle)), left[-1], left[0]]))


def mixes(single: Sequence[Probe]) -> tuple[Probe, ...]:
    """Models in which every kind of layer is one of the chains that are timed alone: times do not quite add up."""
    by_kind: dict[str, list[Part]] = {}
    for probe in single:
        by_kind.setdefault(probe.parts[0].kind, []).append(probe.parts[0])
    rng = np.random.default_rng(0)
    return tuple(
        Probe(tuple(parts[rng.integers(len(parts))] for parts in by_kind.values()))
        for _ in range(MIXES if len(by_kind) > 1 else 0)
    )


def _known(timings: Timings | None, kind: str, method: str) -> Mapping[Rank, float]:
    return timings.of(Place(kind, method)) if timings else {}

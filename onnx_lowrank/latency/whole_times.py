"""What candidates take where only whole models can be timed: another engine, another device.

For each kind of layer, method and a few ranks there is one model in which all layers of that kind are such chains; what
it takes less or more than the original, run in turn with it, is shared out among them. What the layers take as they are
is not seen: it is at least the most that a chain was seen to save, and how much more only shifts time between the layers
and the rest, which no plan depends on.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from scipy.optimize import nnls

from onnx_lowrank.candidates import Group, price
from onnx_lowrank.graph.model import Model
from onnx_lowrank.latency.pricing import Point, StandIns, priced_together
from onnx_lowrank.latency.probes import Probe, kind_of, mixes, probes
from onnx_lowrank.latency.timings import Place, Timings
from onnx_lowrank.subject import Subject
from onnx_lowrank.types import Candidate, Cost, Plan, Progress, Rank, no_progress

TABLE_SECONDS = 240.0
"""Longest time that filling a table here may take, the mixes apart."""

MIXED = Place("mixes", "share of the savings of their parts")
"""Where it is kept how times add up."""

TELLING = 0.2
"""Share of the original's time that the parts of a mix have to save together, to say how savings add up."""

ADDING_UP = 0.25, 1.0
"""Bounds of that: nothing is taken to save more beside others than alone, which only noise would say."""

NO_TIME = 1e-3
"""Share of a layer's time that its chain takes at least: differences of two times may come out below zero."""

DOUBT, OWN_DOUBT, MACS_DOUBT = 0.03, 0.3, 0.5
"""Standard errors, as shares of a layer's time: of a line through what was measured, besides the measurement's own; and of what is
thought of chains that nothing was measured of: none for themselves, and for their MACs what they take in the layer."""

SEEN = 0.5
"""Share of a layer that the chain saving most stands for at least, when the layer's own time is told from it."""


class Engine(Protocol):
    """What times whole models beside the original."""

    def ratio(self, model: Model, *, thorough: bool = False) -> tuple[float, float]:
        """Median over rounds of the time of `model` over that of the original, run in turn; and its standard error."""


def take_in(timings: Timings, parts: Sequence[tuple[Place, Rank, int]], ratio: float, error: float) -> None:
    """Learn from one model.

    Of one kind of layer, what the ratio had been if only one of the groups had been changed is kept: it holds whatever layers
    are left out next time. Of a mix, what it saved over what its parts, which are known, saved alone.

    Parameters
    ----------
    parts
        Kind and method, rank, and number of groups.
    ratio
        Time of the model over that of the original.
    error
        Its standard error.
    """
    if len(parts) == 1:
        ((place, rank, count),) = parts
        timings.add(place, rank, 1 - (1 - ratio) / count)
        timings.add(_error_of(place), rank, error / count)
        return
    alone = [count * (1 - timings.of(place)[rank]) for place, rank, count in parts if rank in timings.of(place)]
    if len(alone) == len(parts) and sum(alone) >= TELLING:
        timings.add(MIXED, (1,), (1 - ratio) / sum(alone))


def _error_of(place: Place) -> Place:
    return Place(f"error of {place.layer}", place.method)


class WholeTimes:
    """Latency of the candidates of a model by times of whole models; to the planner the same as ``LatencyTable``."""

    def __init__(
        self,
        subject: Subject,
        timings: Timings,
        original_ms: float,
        block: int,
        engine: Engine | None = None,
        progress: Progress = no_progress,
        *,
        seed: int = 0,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Take in what is known.

        Parameters
        ----------
        timings
            What :func:`take_in` has learned.
        original_ms
            What the model takes as it is.
        block
            What ranks are kept to.
        engine
            What times models; None where only what is known counts.
        notes
            What the user should know of these times.
        """
        self._subject, self._timings, self._engine, self._progress = subject, timings, engine, progress
        self._stand_ins, self._original_ms = StandIns(subject, seed), original_ms
        self._block = block
        self._kinds = {group.names: kind_of(group) for group in subject.groups}
        self.measured = self.wanted = 0
        """Models timed, and how many there were to time."""
        self.notes = notes
        self._fit: _Fit | None = None

    usable = True
    """Whether times can be told apart."""

    @property
    def original(self) -> Cost:
        """Cost of the whole model as it was given."""
        return replace(self._subject.cost, latency_ms=self._original_ms)

    @property
    def rest(self) -> float:
        """What belongs to no group of layers, in milliseconds."""
        taken = math.fsum(self._ms(group) for group in self._subject.groups)
        return max(self._original_ms - taken, 0.0)

    def fill(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        """Time what it takes to tell the latency of every candidate, as far as ``TABLE_SECONDS`` go."""
        if self._engine is None:
            return
        every = probes(self._subject, candidates, self._block)
        waiting = probes(self._subject, candidates, self._block, self._timings)
        start, self.measured, self.wanted = time.perf_counter(), 0, len(waiting)
        for probe in waiting:
            if time.perf_counter() - start >= TABLE_SECONDS:
                break
            self._learn(probe)
            self.measured += 1
            self._progress("latency", self.measured, self.wanted)
        known = [probe for probe in every if probe.parts[0].point[1] in self._timings.of(probe.parts[0].place)]
        for probe in mixes(known) if waiting or not self._timings.of(MIXED) else ():
            self._learn(probe)
        self._timings.save()
        self._fit = None

    def _learn(self, probe: Probe) -> None:
        assert self._engine is not None
        parts = [(part.place, part.point[1], len(part.choices)) for part in probe.parts]
        take_in(self._timings, parts, *self._engine.ratio(self._stand_ins.model(probe.choices)[0]))

    def priced(self, candidates: Sequence[Sequence[Candidate]]) -> list[tuple[Candidate, ...]]:
        """`candidates` with their latency. A method not measured for a kind of which others were is taken to save none."""
        groups, found = self._subject.groups, self._subject.found.layers
        alone = []
        for group, members in zip(groups, candidates, strict=False):
            layer_ms, share_of = (
                self._ms(group),
                partial(self._fitted.share, self._kinds[group.names], group.dense.cost),
            )
            alone.append(
                tuple(
                    replace(c, cost=replace(c.cost, latency_ms=layer_ms * (1.0 if c.dense else share_of(c))))
                    for c in members
                )
            )
        layers = {name: self._ms(group) / len(group.names) for group in groups for name in group.names}
        return [*alone, *(priced_together(c, found, layers) for c in candidates[len(groups) :])]

    def check(self, plan: Plan) -> float:
        """Latency of a whole plan as a share of the original's: measured, or predicted where nothing measures here."""
        choices = [choice for choice in plan.choices if not choice.dense]
        if not choices:
            return 1.0
        if self._engine is None:
            return plan.ratio("latency")
        return self._engine.ratio(self._stand_ins.model(choices)[0], thorough=True)[0]

    @property
    def _fitted(self) -> _Fit:
        if self._fit is None:
            self._fit = _fit(self._subject, self._timings)
        return self._fit

    def _ms(self, group: Group) -> float:
        return self._original_ms * self._fitted.layers[self._kinds[group.names]]


@dataclass(frozen=True)
class _Fit:
    """Where the time of a model goes.

    Parameters
    ----------
    layers
        For each kind of group, its share of the time of the whole; together no more than 1.
    chains
        For each kind and method, what a chain takes for itself and for its MACs, as shares of the group's own.
    """

    layers: dict[str, float]
    chains: dict[str, dict[str, tuple[float, float]]]

    def share(self, kind: str, dense: Cost, candidate: Candidate) -> float:
        """Of the time of its group that a candidate takes."""
        known, macs = self.chains.get(kind, {}), candidate.cost.macs / max(dense.macs, 1)
        if not known:
            return macs
        if candidate.decomposition not in known:
            return 1.0
        own, each = known[candidate.decomposition]
        return max(own + each * macs, NO_TIME)


def _fit(subject: Subject, timings: Timings) -> _Fit:
    count = Counter(map(kind_of, subject.groups))
    groups = {kind_of(group): group for group in subject.groups}
    adding_up = float(np.clip(timings.of(MIXED).get((1,), 1.0), *ADDING_UP))
    seen: dict[str, dict[Point, tuple[float, float]]] = {kind: {} for kind in groups}
    for place, ranks in timings.places():
        if place.layer in seen:
            errors = timings.of(_error_of(place))
            for rank, ratio in ranks.items():
                seen[place.layer][place.method, rank] = adding_up * (1 - ratio), errors.get(rank, 0.0)
    # of the layers' own time, what was surely seen to go: among many that are measured, some are lucky
    sure = {kind: {p: saved - error for p, (saved, error) in points.items()} for kind, points in seen.items()}
    least = {kind: max([*points.values(), 0.0]) for kind, points in sure.items()}
    # the savings of all kinds together are no more than all there is
    squeeze = min(1.0, 1 / max(sum(count[kind] * share for kind, share in least.items()), 1e-9))
    least = {kind: squeeze * share for kind, share in least.items()}
    whole = {kind: _whole_share(groups[kind], sure[kind], least[kind], subject.cost.macs) for kind in groups}
    unseen = sum(count[kind] * (whole[kind] - least[kind]) for kind in groups)
    room = min(1.0, (1 - sum(count[kind] * share for kind, share in least.items())) / unseen) if unseen > 0 else 0.0
    layers = {kind: least[kind] + max(room, 0.0) * (whole[kind] - least[kind]) for kind in groups}
    chains: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, points in seen.items():
        for method in {method for method, _ in points}:
            known = [(rank, squeeze * s, e) for (of, rank), (s, e) in points.items() if of == method]
            chains.setdefault(kind, {})[method] = _line(groups[kind], method, known, layers[kind])
    return _Fit(layers, chains)


def _line(group: Group, method: str, points: Sequence[tuple[Rank, float, float]], whole: float) -> tuple[float, float]:
    """What chains of a method take for themselves and for their MACs, as shares of the group's own time and MACs.

    What was measured counts by how sure it is; beside it, a chain is thought to take what its MACs do in the layer.

    Parameters
    ----------
    points
        Rank, share of the model's time that was saved, and its standard error.
    whole
        Share of the model's time that the group takes.
    """
    if whole <= 0:
        return 0.0, 1.0
    rows, values = [[1 / OWN_DOUBT, 0.0], [0.0, 1 / MACS_DOUBT]], [0.0, 1 / MACS_DOUBT]
    for rank, saved, error in points:
        macs, doubt = price(group, method, rank, 0.0).cost.macs / max(group.dense.cost.macs, 1), error / whole + DOUBT
        rows.append([1 / doubt, macs / doubt])
        values.append((1 - saved / whole) / doubt)
    (own, each), _ = nnls(np.array(rows), np.array(values))
    return float(own), float(each)


def _whole_share(group: Group, saved: Mapping[Point, float], least: float, macs: int) -> float:
    """Share of the model's time that a group is thought to take: what saved most, and what was left of it by its MACs."""
    dense = group.dense.cost.macs
    if least <= 0:
        return dense / max(macs, 1)
    method, rank = max(saved, key=lambda point: saved[point])
    left = price(group, method, rank, 0.0).cost.macs / max(dense, 1)
    return least / max(1 - left, SEEN)

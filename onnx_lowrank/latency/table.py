"""What every candidate takes on this machine: measured where it counts, interpolated between.

MACs are a poor guide to time: a depthwise stage moves as much memory as a dense one, a chain that breaks a fusion pays
for the Add that was free, a rank one above a block costs a whole block. So chains are timed by the runtime's own profiler,
inside the network, where layouts and fusions are what they will be. In one measurement every layer of the network is
another chain at once, and layers that are alike share what is learned; a few dozen runs fill the table. The kernels are
random numbers: time does not depend on them.

Where the result is to be quantised, what is timed is quantised too, by ranges that are made up: the times are those of eight bits,
as shares of the original's in floating point.

Sums of such times miss what happens between the layers. So the whole of a plan is measured before any kernel is
fitted (:meth:`LatencyTable.check`), what is learned of its layers goes into the table, and the plan is made again.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from onnx_lowrank.cache import cache_folder
from onnx_lowrank.candidates import Group, price, spread
from onnx_lowrank.config import Config
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.owners import Owned, own_nodes, owners
from onnx_lowrank.graph.save import save
from onnx_lowrank.latency.pricing import Point, StandIns, points_of, priced, priced_together
from onnx_lowrank.latency.timings import Place, Timings
from onnx_lowrank.quantize import as_quantized
from onnx_lowrank.runtime import (
    AnySession,
    Profile,
    RunSettings,
    Timing,
    open_session,
    processor,
    profile_nodes,
    time_pair,
    typical,
    version,
)
from onnx_lowrank.subject import Subject
from onnx_lowrank.types import Candidate, Cost, Plan, Progress, Rank
from onnx_lowrank.verification.verify import Feeds
from onnx_lowrank.work.memory import give_back_memory

POINTS = 6
"""Ranks of a method that are measured for each kind of layer, for each mode and half as many again for a second."""

TABLE_SECONDS = 120.0
"""Longest time that filling the table may take: what is not measured by then is estimated from what is."""

WHOLE_MODELS = 8
"""Models with chains that are timed as a whole too, to learn what a run takes beside its nodes."""

CHECK_ROUNDS, CHECK_SECONDS, CHECK_LEAST = 40, 4.0, 0.5
"""Of the measurement of a whole: rounds, and the most and the least time for them."""


@dataclass(frozen=True)
class _Times:
    """Where the time of one network goes, in milliseconds.

    Parameters
    ----------
    layers
        What each layer takes, with what surrounds it.
    rest
        What belongs to no layer.
    """

    layers: dict[str, float]
    rest: float

    def of(self, group: Group) -> float:
        """What the layers of a group take together."""
        return sum(self.layers.get(name, 0.0) for name in group.names)


class _Bench:
    """A scratch folder, and the original in a session, beside which models are timed."""

    def __init__(self, given: Path | None, model: Model, feeds: Feeds, settings: RunSettings, folder: Path) -> None:
        """`model` is timed, from its file where `given` names it."""
        self._feeds, self._settings, self._folder = feeds, settings, folder
        self._latest: Path | None = None
        if given is None:
            given = folder / "original.onnx"
            save(model, given)
        self.path = given
        self.reference = open_session(given, settings)
        self.reference.check_times()

    def write(self, model: Model) -> Path:
        """Write a model in the place of the one before it."""
        if self._latest is not None:
            shutil.rmtree(self._latest)
        self._latest = Path(tempfile.mkdtemp(dir=self._folder))
        save(model, self._latest / "model.onnx")
        return self._latest / "model.onnx"

    def profile(self, path: Path) -> Profile:
        """Times of the nodes of a model."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        return profile_nodes(path, self.reference, self._feeds, self._settings, folder)


class LatencyTable:
    """Latency of the candidates of a model, on one provider with its threads and batch size."""

    def __init__(self, subject: Subject, config: Config, feeds: Feeds, progress: Progress, beginning: int = 0) -> None:
        """Measure the model as it is.

        Parameters
        ----------
        feeds
            What it is timed on.
        beginning
            Where the result is to be quantised, which part of it stays in floating point; see
            :func:`onnx_lowrank.quantize.beginnings`.

        Raises
        ------
        LowRankError
            Where ONNX Runtime refuses the model.
        """
        self._subject, self._feeds, self._progress = subject, feeds, progress
        self._settings = subject.settings(config)
        self._stand_ins = StandIns(subject, config.seed)
        self._quantize, self._beginning = config.quantize != "none", beginning
        self._base = self._deployed(subject.model)
        self._differs = self._base is not subject.given
        self._timings = Timings(self._environment(config), cache_folder())
        self.measured = self.wanted = 0
        """Points measured, and how many there were to measure."""
        self._references: list[float] = []
        self._aside_ms, self._nodes = 0.0, 0
        self._own_nodes = own_nodes(subject.model, subject.found)
        with self._bench() as bench:
            self._first = bench.profile(bench.path)
            self._owned = owners(self._base, self._own_nodes, self._first.optimized)
            self._whole_ms = typical(self._timing(bench, bench.reference).first_ms)
            self._share = 1 / self._speedup(bench) if self._differs else 1.0
        self._account(self._first, 1.0)
        self._kinds = {group.names: _kind(group, self._owned) for group in subject.groups}

    @property
    def usable(self) -> bool:
        """Whether times can be told apart: a provider that compiles whole parts of the graph does not say."""
        groups = self._subject.groups
        return 2 * sum(1 for group in groups if self._dense.of(group) > 0) >= len(groups) > 0

    @property
    def unrest(self) -> float:
        """How many times as long the model that stays the same took in the slowest measurement as in the fastest."""
        return max(self._references) / min(self._references) if self._references else 1.0

    @property
    def original(self) -> Cost:
        """Cost of the whole model as it was given."""
        return replace(self._subject.cost, latency_ms=self._whole / self._share)

    @property
    def rest(self) -> float:
        """What belongs to no group of layers, in milliseconds."""
        return self._whole - math.fsum(self._dense.of(group) for group in self._subject.groups)

    @property
    def _whole(self) -> float:
        """Of the model without a chain, quantised where the result is to be."""
        return math.fsum(self._dense.layers.values()) + self._dense.rest

    def fill(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        """Measure what it takes to tell the latency of every candidate, as far as ``TABLE_SECONDS`` go."""
        waiting = self._waiting(candidates)
        self.measured, self.wanted = 0, sum(map(len, waiting.values()))
        if not self.wanted:
            return
        start, models = time.perf_counter(), 0
        turns = {kind: itertools.cycle(points) for kind, points in waiting.items() if points}
        left = {(kind, *point) for kind, points in waiting.items() for point in points}
        with self._bench() as bench:
            while left and time.perf_counter() - start < TABLE_SECONDS:
                choices = []
                for group in self._subject.groups:
                    kind = self._kinds[group.names]
                    if kind in turns:  # again where others are not done: of many layers alike, the mean is surer
                        method, rank = next(turns[kind])
                        choices.append(price(group, method, rank, 0.0))
                        left.discard((kind, method, rank))
                self._learn(bench, choices, whole=models < WHOLE_MODELS)
                models += 1
                self.measured = self.wanted - len(left)
                self._progress("latency", self.measured, self.wanted)
        self._timings.save()

    def priced(self, candidates: Sequence[Sequence[Candidate]]) -> list[tuple[Candidate, ...]]:
        """`candidates` with their latency, as far as it is known now."""
        groups, layers = self._subject.groups, self._subject.found.layers
        alone = [
            priced(group, members, self._dense.of(group), partial(self._known, self._kinds[group.names]))
            for group, members in zip(groups, candidates, strict=False)
        ]
        return [*alone, *(priced_together(c, layers, self._dense.layers) for c in candidates[len(groups) :])]

    def check(self, plan: Plan) -> float:
        """Measured latency of a whole plan as a share of the original's; what is seen of its layers is learned."""
        choices = [choice for choice in plan.choices if not choice.dense]
        if not choices:
            return self._share
        with self._bench() as bench:
            ratio = self._learn(bench, choices, whole=True)
        self._timings.save()
        return ratio * self._share

    def _speedup(self, bench: _Bench) -> float:
        """How many times faster the model that is decomposed is than the one that was given: quantised, shortcuts folded."""
        with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
            given = self._subject.given
            first = _Bench(given.path, given, self._feeds, self._settings, Path(folder))
            return 1 / self._timing(bench, first.reference).speedup

    def _deployed(self, model: Model) -> Model:
        """A model as it is going to be run."""
        return as_quantized(model, self._subject.sample_shapes, self._beginning) if self._quantize else model

    def _timing(self, bench: _Bench, other: AnySession) -> Timing:
        """The model of a bench and another one in turn."""
        limits = {"seconds": CHECK_SECONDS, "least": CHECK_LEAST}
        timing = time_pair(bench.reference, other, self._feeds, rounds=CHECK_ROUNDS, **limits)
        self._references.append(typical(timing.first_ms))
        return timing

    def _account(self, profile: Profile, ratio: float) -> None:
        """Learn what a run takes beside its nodes from a model whose whole takes `ratio` of the original's time.

        Less what the profiler itself takes, which is more; it is shared out among the nodes of all models seen, so that a
        chain of three pays for two more.
        """
        spent = sum(profile.node_ms.values()) * self._first.reference_ms / profile.reference_ms
        self._aside_ms += ratio * self._whole_ms - spent
        self._nodes += len(profile.node_ms)
        self._dense = self._times(self._first, self._owned)

    @contextmanager
    def _bench(self) -> Iterator[_Bench]:
        """The original in a session, and a scratch folder; both go when the measurement is done."""
        with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
            given = None if self._differs else self._subject.given.path
            yield _Bench(given, self._base, self._feeds, self._settings, Path(folder))
        give_back_memory()

    def _environment(self, config: Config) -> dict[str, str]:
        """All that a time depends on besides the layer."""
        return {
            "provider": self._settings.provider_name,
            **{f"option {key}": value for key, value in self._settings.options},
            "onnxruntime": version(),
            "processor": processor(),
            "threads": str(config.threads),
            "batch": str(config.batch_size),
            **({"quantize": f"{config.quantize} from {self._beginning}"} if self._quantize else {}),
        }

    def _times(self, profile: Profile, owned: Sequence[Owned]) -> _Times:
        """Where the time of a network goes, as of when the original was measured."""
        drift, overhead = self._first.reference_ms / profile.reference_ms, self._aside_ms / max(self._nodes, 1)
        left = {name: max(ms * drift + overhead, 0.0) for name, ms in profile.node_ms.items()}
        layers: dict[str, float] = {}
        for node in owned:
            layers[node.layer] = layers.get(node.layer, 0.0) + left.pop(node.name, 0.0)
        return _Times(layers, math.fsum(left.values()))

    def _learn(self, bench: _Bench, choices: Sequence[Candidate], *, whole: bool) -> float:
        """Time the model with `choices` made, all at once; the share that its `whole` takes of the original's time."""
        groups = {group.names: group for group in self._subject.groups}
        model, nodes = self._stand_ins.model(choices)
        deployed = self._deployed(model)
        path = bench.write(deployed)
        profile, ratio = bench.profile(path), math.nan
        if whole:
            ratio = 1 / self._timing(bench, open_session(path, self._settings)).speedup
            self._account(profile, ratio)
        owned = owners(deployed, self._own_nodes | nodes, profile.optimized)
        times = self._times(profile, owned)
        for choice in choices:
            if choice.layers not in groups:
                continue
            group = groups[choice.layers]
            before, after = self._dense.of(group), times.of(group)
            if before > 0 and after > 0:
                self._timings.add(Place(self._kinds[group.names], choice.decomposition), choice.rank, after / before)
        return ratio

    def _waiting(self, candidates: Sequence[Sequence[Candidate]]) -> dict[str, list[Point]]:
        """For each kind of layer, what is to be measured: of every method the middle first, then the ends, then between."""
        waiting: dict[str, list[Point]] = {}
        for group, members in zip(self._subject.groups, candidates, strict=False):
            kind = self._kinds[group.names]
            if kind in waiting or self._dense.of(group) <= 0:
                continue
            waiting[kind] = points_of(members, partial(spread, count=POINTS), partial(self._known, kind))
        return waiting

    def _known(self, kind: str, method: str) -> dict[Rank, float]:
        return self._timings.of(Place(kind, method))


def _kind(group: Group, owned: Sequence[Owned]) -> str:
    """All that the time of a group of layers depends on, besides the machine."""
    return "; ".join(
        f"{layer.op_type} {layer.spec} {layer.dtype} {layer.input_size} {layer.batch} in "
        + " ".join(node.op_type for node in owned if node.layer == layer.name)
        for layer in group.layers
    )

"""What an error in one layer does to the outputs of the model, measured: the damage that an allocation adds up.

A relative error of 10 % is nothing in one layer and ruins the model in another. So each layer is
replaced, alone, by candidates of about a few sizes of error, and the model is run on from there on a few samples. Between
the sizes measured the damage is interpolated. A layer's damage is far from proportional to its error, which
is why one size is not enough: extrapolated from one, allocations come out worse than by the plain errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
from scipy.interpolate import PchipInterpolator

from onnx_lowrank.cache import UNKEPT, Kept
from onnx_lowrank.calibration.calibrate import Activations, Loaded, run_segment
from onnx_lowrank.candidates import Group, pareto, spread
from onnx_lowrank.data.feeds import count
from onnx_lowrank.decompositions import fits_to
from onnx_lowrank.decompositions.levels import NONE
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Cut, cuts, island_of, last_segment
from onnx_lowrank.layer_tasks import draft_of, group_task, loaded_task, methods_key
from onnx_lowrank.types import Candidate, Factorization, LayerStatistics, Progress
from onnx_lowrank.verification.metrics import METRICS
from onnx_lowrank.work.parallel import run_all
from onnx_lowrank.work.tasks import Work

ERRORS = (0.4, 0.12, 0.03)
"""Squared relative errors of a layer's output at about which its damage is measured."""

SHARE = 32.0
"""Work of the measurement in passes of the samples through the model: with more layers, each is seen on fewer of them."""

FEWEST = 16
"""Samples that a layer is seen on at least."""

ACTIVATIONS_BYTES = 1 << 31
"""Most bytes of the model's own activations held at a time: those before every layer that is looked at."""

STEEPEST = 2.0
"""Power of the error that a damage grows with, at most, outside the sizes measured; 1 at least."""

NOTHING = 1e-12
"""Damage below which no difference is told."""


def measured(
    model: Model,
    found: Found,
    groups: Sequence[Group],
    candidates: Sequence[Sequence[Candidate]],
    *,
    statistics: dict[str, LayerStatistics],
    feeds: list[dict[str, np.ndarray]],
    seed: int,
    work: Work,
    progress: Progress,
    kept: Kept = UNKEPT,
) -> list[tuple[Candidate, ...]]:
    """`candidates` with, in the place of errors of their layers, what these do to the model's outputs.

    The damage is the squared difference of all outputs over their variance, with only this group changed.
    """
    probes = [probe for group in candidates for probe in _probes(group)]
    if not probes:
        return [tuple(group) for group in candidates]
    made = _drafts(groups, probes, statistics, seed, work, progress)
    names = sorted({name for probe in probes for name in probe.layers})
    few = _few(feeds, len(probes), ACTIVATIONS_BYTES // _held_bytes(found, names))
    bench = cache(partial(_Bench, model, found, names, few))
    kept = kept.under("damage", names, few)
    damages: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for number, (probe, factorization) in enumerate(zip(probes, made, strict=True), 1):
        look = partial(_looked_at, bench, _Bench.damage, probe, factorization)
        damage = kept.result(look, probe.layers, probe.chains, factorization)
        damages.setdefault(probe.layers, []).append((probe.error, damage))
        progress("sensitivity", number, len(probes))
    return [
        tuple(replace(c, error=interpolated(damages[c.layers], c.error)) if not c.dense else c for c in group)
        for group in candidates
    ]


ACCURACY_RANKS = 4
"""Ranks of a layer that its accuracy is measured at, by each method."""


def agreeing(
    model: Model,
    found: Found,
    groups: Sequence[Group],
    candidates: Sequence[Sequence[Candidate]],
    *,
    feeds: list[dict[str, np.ndarray]],
    seed: int,
    work: Work,
    progress: Progress,
    kept: Kept = UNKEPT,
) -> list[tuple[Candidate, ...]]:
    """`candidates` with -log of the accuracy that is left when their layer alone is decomposed.

    Measured at a few ranks of each method, with a monotone cubic through them. Without labels, accuracy is the
    agreement with the original: our reading, since no labels are asked for.

    Parameters
    ----------
    candidates
        With -log of their energy levels as errors, which the cubics are drawn over.

    References
    ----------
    Kim, Khan & Kyung (2019), "Efficient Neural Network Compression", eq. 6: the measured metric.
    """
    probes: list[Candidate] = []
    for members in candidates:
        for method in sorted({c.decomposition for c in members if not c.dense}):
            by_rank = {c.rank: c for c in members if c.decomposition == method}
            probes += [by_rank[rank] for rank in spread(list(by_rank), ACCURACY_RANKS)]
    if not probes:
        return [tuple(group) for group in candidates]
    made = _drafts(groups, probes, {}, seed, work, progress)
    names = sorted({name for probe in probes for name in probe.layers})
    # all samples, as many at a time as fit: what few of them do not show would count as free of charge
    parts = list(_portions(feeds, ACTIVATIONS_BYTES // _held_bytes(found, names)))
    left = np.zeros(len(probes))
    for turn, part in enumerate(parts):
        bench = cache(partial(_Bench, model, found, names, part))
        agreement = kept.under("agreement", names, part)
        for number, (probe, factorization) in enumerate(zip(probes, made, strict=True)):
            look = partial(_looked_at, bench, _Bench.agreement, probe, factorization)
            share = agreement.result(look, probe.layers, probe.chains, factorization)
            left[number] += count(part) / count(feeds) * share
            progress("sensitivity", turn * len(probes) + number + 1, len(parts) * len(probes))
    points: dict[tuple[tuple[str, ...], str], dict[float, float]] = {}
    for probe, share in zip(probes, left, strict=True):
        measured_at = points.setdefault((probe.layers, probe.decomposition), {1.0: 1.0})
        measured_at.setdefault(math.exp(-probe.error), float(share))
    curves = {key: _curve(at) for key, at in points.items()}
    return [
        tuple(
            c if c.dense else replace(c, error=float(-np.log(curves[c.layers, c.decomposition](math.exp(-c.error)))))
            for c in group
        )
        for group in candidates
    ]


def _curve(points: dict[float, float]) -> Callable[[float], float]:
    """The monotone cubic through measured accuracies by level; level beyond them, and never 0."""
    x = sorted(points)
    y = np.maximum.accumulate([points[at] for at in x])
    if len(x) == 1:
        return lambda level: 1.0
    cubic = PchipInterpolator(x, y)
    return lambda level: float(np.clip(cubic(np.clip(level, x[0], x[-1])), NONE, 1.0))


def difference(outputs: Sequence[Sequence[np.ndarray]], reference: Sequence[Sequence[np.ndarray]]) -> float:
    """Squared difference of the outputs over their variance, batch by batch given; the mean over those of floats."""
    parts = []
    for got, wanted in zip(zip(*outputs, strict=True), zip(*reference, strict=True), strict=True):
        if wanted[0].dtype.kind != "f":
            continue
        one, two = (np.concatenate([each.astype(np.float64).ravel() for each in batches]) for batches in (got, wanted))
        parts.append(float(np.nan_to_num(np.square(one - two), nan=np.inf).mean() / max(np.var(two), NOTHING)))
    return float(np.mean(parts)) if parts else 0.0


def _probes(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates nearest to the errors that are measured."""
    lossy = [c for c in pareto(candidates) if not c.dense and c.error > NOTHING]
    if not lossy:
        return [c for c in candidates if not c.dense][:1]
    picks = [min(lossy, key=lambda c: abs(math.log(c.error / error))) for error in ERRORS]
    return [c for i, c in enumerate(picks) if c not in picks[:i]]


def interpolated(points: Sequence[tuple[float, float]], error: float) -> float:
    """Damage at `error` from measured (error, damage): a line in logarithms between them, and on with a slope of 1 to 2.

    Examples
    --------
    >>> round(interpolated([(0.1, 0.01), (0.4, 0.16)], 0.2), 4)
    0.04
    """
    if error <= 0:
        return 0.0
    known = sorted((math.log(max(e, NOTHING)), d) for e, d in points)
    x = np.array([e for e, _ in known])
    y = np.log(np.maximum(np.maximum.accumulate([d for _, d in known]), NOTHING))
    at = math.log(error)
    if len(x) == 1 or at < x[0] or at > x[-1]:
        end = 0 if at < x[0] else -1
        near = slice(0, 2) if end == 0 else slice(-2, None)
        rise = np.diff(y[near]) / np.maximum(np.diff(x[near]), 1e-3) if len(x) > 1 else np.array([1.5])
        return float(np.exp(y[end] + np.clip(rise[0], 1.0, STEEPEST) * (at - x[end])))
    return float(np.exp(np.interp(at, x, y)))


def _drafts(
    groups: Sequence[Group],
    probes: Sequence[Candidate],
    statistics: Mapping[str, LayerStatistics],
    seed: int,
    work: Work,
    progress: Progress,
) -> list[Factorization]:
    """Every probe factorised, quickly."""
    owners = {name: group for group in groups for name in group.names}
    tasks = []
    for probe in probes:
        group, seen = owners[probe.layers[0]], statistics.get(probe.layers[0])
        seen = seen if fits_to(probe.decomposition, seen) else None
        key = methods_key(probe.decomposition), probe.rank, seen, seed
        tasks.append(group_task(group, probe, seen, seed, size=group.layers[0].spec.params, key=key))
    return run_all(draft_of, tasks, loaded_task, work=work, progress=progress, stage="analyze")


def _held_bytes(found: Found, names: Sequence[str]) -> int:
    """Bytes that one sample takes before all layers called `names`: their inputs, and as much again that goes past them."""
    layers = [layer for layer in found.layers if layer.name in set(names)]
    return 8 * sum(layer.batch * layer.spec.in_channels * math.prod(layer.input_size) for layer in layers) or 1


def _portions(feeds: list[dict[str, np.ndarray]], most: int) -> Iterator[list[dict[str, np.ndarray]]]:
    """The batches, in portions of at most `most` samples, but of one batch at least."""
    portion: list[dict[str, np.ndarray]] = []
    for batch in feeds:
        if portion and count([*portion, batch]) > most:
            yield portion
            portion = []
        portion.append(batch)
    if portion:
        yield portion


def _few(feeds: list[dict[str, np.ndarray]], probes: int, fit: int) -> list[dict[str, np.ndarray]]:
    """The first samples, so many that all probes, each through half of the model, cost ``SHARE`` passes of all.

    No more than `fit` into memory, but ``FEWEST`` anyway.
    """
    left = max(FEWEST, min(int(2 * SHARE * count(feeds) / probes), fit))
    few = []
    for batch in feeds:
        size = count([batch])
        if left < size and any(len(value) != size for value in batch.values()):
            break
        few.append({name: value[:left] for name, value in batch.items()})
        left -= size
        if left <= 0:
            break
    return few or feeds[:1]


class _Bench:
    """The model in segments that stay loaded, with its own activations before every layer."""

    def __init__(self, model: Model, found: Found, names: Sequence[str], feeds: list[dict[str, np.ndarray]]) -> None:
        self._model = model
        self._cuts = list(cuts(model, found, names))
        self._last = last_segment(model, found, names)
        self._outputs = [o.name for o in model.graph.output]
        self._run = Loaded()
        self._before: list[Activations] = []
        alive = Activations([dict(batch) for batch in feeds])
        for cut in self._cuts:
            self._run(cut.before, alive)
            self._before.append(alive.copy())
            self._run(cut.alone, alive)
            alive.keep(cut.alive)
        self._run(self._last, alive)
        self._reference = self._results(alive)

    def damage(self, choice: Candidate, made: Factorization) -> float:
        """Squared difference of the outputs over their variance, with one choice made."""
        return difference(self._with(choice, made, mended=True), self._reference)

    def agreement(self, choice: Candidate, made: Factorization) -> float:
        """Share of samples that keep their class with one choice made; without classes, what the difference leaves."""
        results = self._with(choice, made, mended=False)
        scores = [METRICS["agreement"](got, wanted, None) for got, wanted in zip(results, self._reference, strict=True)]
        share = float(np.concatenate(scores).mean())
        return share if math.isfinite(share) else max(0.0, 1 - difference(results, self._reference))

    def _with(self, choice: Candidate, made: Factorization, *, mended: bool) -> list[list[np.ndarray]]:
        """The outputs with one choice made, its bias `mended` by the mean that is missed."""
        chains = dict(zip(choice.layers, choice.chains, strict=True))
        first = next(i for i, cut in enumerate(self._cuts) if cut.layer.name in chains)
        alive = self._before[first].copy()
        for index, cut in enumerate(self._cuts[first:], first):
            if index > first:
                self._run(cut.before, alive)
            self._run(cut.alone, alive)
            if cut.layer.name in chains:
                wanted = [batch[cut.output] for batch in alive.batches]
                run_segment(island_of(self._model, cut, chains[cut.layer.name], made.kernels[0]), alive)
                if mended and cut.bias is not None:
                    alive.shift(cut, _mean_missed(cut, wanted, [batch[cut.output] for batch in alive.batches]))
            alive.keep(cut.alive)
        self._run(self._last, alive)
        return self._results(alive)

    def _results(self, activations: Activations) -> list[list[np.ndarray]]:
        """The outputs, batch by batch."""
        return [[batch[name] for name in self._outputs] for batch in activations.batches]


def _looked_at(
    bench: Callable[[], _Bench],
    look: Callable[[_Bench, Candidate, Factorization], float],
    probe: Candidate,
    made: Factorization,
) -> float:
    """What a bench sees of a probe; it is only made where something is still to be seen."""
    return look(bench(), probe, made)


def _mean_missed(cut: Cut, wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> np.ndarray:
    """What the bias would have to make up for, (O,)."""
    rows = [np.moveaxis(w - g, cut.output_axis, -1) for w, g in zip(wanted, got, strict=True)]
    missed: np.ndarray = np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows]).mean(axis=0, dtype=np.float64)
    return missed

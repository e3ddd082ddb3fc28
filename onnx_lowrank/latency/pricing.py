"""Candidates priced by time: points worth measuring, what lies between them, and models made to measure them in.

What both tables of times have in common: one whose times come from a profiler, and one that knows whole models only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from onnx_lowrank.candidates import Group
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.splice import Replacement, splice
from onnx_lowrank.subject import Subject
from onnx_lowrank.types import Candidate, Chain, Layer, Rank

Point = tuple[str, Rank]
"""A method and a rank."""


class StandIns:
    """Models of a subject in which layers are chains with random kernels: time does not depend on their values."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self._subject, self._rng = subject, np.random.default_rng(seed)
        self._layers = {layer.name: layer for layer in subject.found.layers}
        self._gains: dict[str, float] = {}

    def model(self, choices: Sequence[Candidate]) -> tuple[Model, dict[str, tuple[str, ...]]]:
        """The model with `choices` made, all at once, and the names of the new nodes of each layer."""
        replacements = []
        for choice in choices:
            made: dict[tuple[tuple[int, ...], ...], list[np.ndarray]] = {}  # of a kernel that is shared there is one
            for name, chain in zip(choice.layers, choice.chains, strict=True):
                shapes = tuple(stage.spec.weight_shape for stage in chain)
                if shapes not in made:
                    made[shapes] = self._kernels(self._layers[name], chain)
                replacements.append(Replacement(name, choice.decomposition, choice.rank, chain, made[shapes]))
        return splice(self._subject.model, self._subject.found, replacements)

    def _kernels(self, layer: Layer, chain: Chain) -> list[np.ndarray]:
        """Random kernels of a chain that leaves activations about as large as the layer does: tiny ones would be slow."""
        gain = self._gain(layer)
        shapes = [stage.spec.weight_shape for stage in chain]
        kernels = [self._rng.standard_normal(s, dtype=np.float32) / math.sqrt(math.prod(s[1:])) for s in shapes]
        return [*kernels[:-1], kernels[-1] * np.float32(gain)]

    def _gain(self, layer: Layer) -> float:
        """How much larger a layer makes its input; its kernel is read once."""
        if layer.name not in self._gains:
            weight = layer.read_weight()
            norm = float(np.linalg.norm(weight.astype(np.float32).ravel()))
            self._gains[layer.name] = norm / math.sqrt(max(len(weight), 1))
        return self._gains[layer.name]


def points_of(
    candidates: Sequence[Candidate],
    pick: Callable[[Sequence[Rank]], Sequence[Rank]],
    known: Callable[[str], Mapping[Rank, float]],
) -> list[Point]:
    """What is to be measured of a kind of layer: of every method the first rank that is picked, then the second...

    Parameters
    ----------
    pick
        Ranks of a method that stand for all, the most telling first.
    known
        What is measured of a method already.
    """
    queues = []
    for method in sorted({c.decomposition for c in candidates if not c.dense}):
        ranks = pick([c.rank for c in candidates if c.decomposition == method])
        done = known(method)
        queues.append([(method, rank) for rank in ranks if rank not in done])
    return [point for each in itertools.zip_longest(*queues) for point in each if point is not None]


def priced(
    group: Group,
    candidates: Sequence[Candidate],
    dense_ms: float,
    known: Callable[[str], Mapping[Rank, float]],
) -> tuple[Candidate, ...]:
    """`candidates` of a group with their latency: where nothing is known of a method, in proportion to their MACs.

    Parameters
    ----------
    dense_ms
        What the group takes as it is.
    known
        For a method, shares of that time by rank.
    """
    dense = group.dense.cost
    shares: dict[Candidate, float] = {}
    for method in {c.decomposition for c in candidates if not c.dense}:
        members = [c for c in candidates if c.decomposition == method]
        measured = known(method)
        if measured:
            values = interpolated(measured, [c.rank for c in members])
        else:
            values = np.array([c.cost.macs / max(dense.macs, 1) for c in members])
        shares.update(zip(members, map(float, values), strict=True))
    return tuple(
        replace(c, cost=replace(c.cost, latency_ms=dense_ms * (1.0 if c.dense else shares[c]))) for c in candidates
    )


def priced_together(
    candidates: Sequence[Candidate], layers: Sequence[Layer], layer_ms: Mapping[str, float]
) -> tuple[Candidate, ...]:
    """Candidates over several layers: their time is taken to follow their MACs until the whole is checked."""
    names = candidates[0].layers
    before = sum(layer_ms.get(name, 0.0) for name in names)
    macs = sum(layer.macs for layer in layers if layer.name in names)
    return tuple(replace(c, cost=replace(c.cost, latency_ms=before * c.cost.macs / max(macs, 1))) for c in candidates)


def interpolated(known: Mapping[Rank, float], ranks: Sequence[Rank]) -> np.ndarray:
    """Latency at `ranks`, from that at others: what was measured is taken as it is.

    Along one mode a line between neighbours, and level below the smallest. Over two modes the chain's stages take time
    in proportion to either rank and to the product of both, and something of their own.

    Examples
    --------
    >>> interpolated({(8,): 0.2, (16,): 0.4}, [(4,), (8,), (12,), (24,)]).round(2).tolist()
    [0.2, 0.2, 0.3, 0.6]
    """
    points = np.array([list(rank) for rank in known], dtype=np.float64)
    shares = np.array(list(known.values()))
    wanted = np.array([list(rank) for rank in ranks], dtype=np.float64)
    if points.shape[1] == 1:
        order = np.argsort(points[:, 0])
        x, y = points[order, 0], np.maximum.accumulate(shares[order])
        values = np.interp(wanted[:, 0], x, y)
        if len(x) > 1:
            beyond = wanted[:, 0] > x[-1]
            values[beyond] += (wanted[beyond, 0] - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
        return values
    terms = _terms(points) / shares[:, None]
    weights, _ = nnls(terms, np.ones(len(shares)))
    values = _terms(wanted) @ weights
    return np.array([known.get(rank, value) for rank, value in zip(ranks, values, strict=True)])


def _terms(ranks: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(ranks)), ranks, ranks.prod(axis=1)])  # (n, 2) -> (n, 4)

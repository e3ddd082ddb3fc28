"""Layers refitted one after the other to what the compressed network before them delivers.

In topological order, each layer's chain is fitted to give the ORIGINAL output from the input that the chains before it
leave (asymmetric reconstruction), so that errors do not pile up: what one layer missed, the next can mend. All of it is
linear algebra on a few hundred unlabelled samples. The network is cut at its layers, and every segment runs once on
the original's activations and once on the compressed network's: the cost is linear in the number of layers.

References
----------
Zhang, Zou, He & Sun (2015), "Accelerating very deep convolutional networks for classification and detection", IEEE
TPAMI 38, section 3.3: the asymmetric target, there for channel SVD.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from onnx_lowrank.calibrate import (
    MAX_PATCH,
    Activations,
    input_rows,
    output_rows,
    patch_length,
    run_segment,
    sample,
    statistics,
)
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.decompositions.weighted import solve_spd
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Cut, cuts, island_of
from onnx_lowrank.types import Candidate, Factorization, LayerStatistics, Progress

logger = logging.getLogger(__name__)

RIDGE = 1e-3
"""Pull of the regression towards the original kernel, relative to the mean variance of the inputs."""

RECTIFIED_ROUNDS = 3
"""Fits after the first to targets that a following ReLU leaves free."""

SMALL_PATCH = 1024
"""Patches of fewer numbers than this are fitted on one thread."""

SWITCHED_OFF = 1e-3
"""Scale of a normalisation, relative to its largest, under which a channel counts as switched off."""


def refit(
    model: Model,
    found: Found,
    choices: Sequence[Candidate],
    feeds: list[dict[str, np.ndarray]],
    *,
    seed: int,
    progress: Progress,
) -> dict[tuple[str, ...], Factorization]:
    """Kernels and biases for `choices`, fitted in sequence.

    Parameters
    ----------
    model, found
        The original.
    choices
        Candidates that are not dense, in any order.
    feeds
        Samples, batch by batch.

    Returns
    -------
    dict
        A factorization for each choice, by the names of its layers.
    """
    by_layer = {name: choice for choice in choices for name in choice.layers}
    made: dict[tuple[str, ...], Factorization] = {}
    biases: dict[str, np.ndarray | None] = {}
    original = Activations([dict(batch) for batch in feeds])
    compressed = original.copy()
    progress("refit", 0, len(by_layer))
    for number, cut in enumerate(cuts(model, found, list(by_layer)), 1):
        if cut.before:
            run_segment(cut.before, original, compressed)
        run_segment(cut.alone, original)
        choice = by_layer[cut.layer.name]
        rng = np.random.default_rng([seed, number])
        seen = _Seen(cut, original, compressed, rng)
        chain = choice.chains[choice.layers.index(cut.layer.name)]
        dtype = cut.layer.dtype
        if choice.layers in made or not _fits(choice, cut):
            if choice.layers not in made:
                made[choice.layers] = _stored(_plain(choice, cut, rng), dtype)
            run_segment(island_of(model, cut, chain, made[choice.layers].kernels[0]), compressed)
            biases[cut.layer.name] = _correct_bias(seen, seen.targets(), compressed)
        else:
            fit = _Fit(choice, seen, rng)
            targets = seen.targets()
            for remaining in range(RECTIFIED_ROUNDS if seen.rectified else 0, -1, -1):
                made[choice.layers] = _stored(fit.round(targets), dtype)
                run_segment(island_of(model, cut, chain, made[choice.layers].kernels[0]), compressed)
                biases[cut.layer.name] = _correct_bias(seen, targets, compressed)
                if remaining:
                    targets = seen.targets(seen.reached())
        for each in (original, compressed):
            each.keep(cut.alive)
        progress("refit", number, len(by_layer))
    return {
        layers: replace(factorization, biases=tuple(biases[name] for name in layers))
        for layers, factorization in made.items()
    }


def _fits(choice: Candidate, cut: Cut) -> bool:
    """Whether the chain can be fitted to data: one plain layer with patches of bearable length."""
    spec = cut.layer.spec
    return len(choice.layers) == 1 and not spec.transposed and patch_length(spec) <= MAX_PATCH


def _plain(choice: Candidate, cut: Cut, rng: np.random.Generator) -> Factorization:
    """The factorization by the weights alone."""
    decomposition = find_decomposition(choice.decomposition)
    return lift.factorize(decomposition, [cut.layer.spec], [cut.layer.read_weight()], choice.rank, rng=rng)


class _Seen:
    """What is seen of one layer in both networks, at sampled positions: rows are positions, columns channels."""

    def __init__(self, cut: Cut, original: Activations, compressed: Activations, rng: np.random.Generator) -> None:
        self.cut = cut
        self._original, self._compressed = original, compressed
        samples = sum(len(batch[cut.output]) for batch in original.batches)
        self._where = sample(cut, (batch[cut.output] for batch in original.batches), rng, samples).where
        self._reference = self._rows(original, cut.output)
        follow = cut.follow
        channels = cut.layer.spec.out_channels
        self._scale = np.ones(channels) if follow.scale is None else follow.scale
        self._shift = np.zeros(channels) if follow.shift is None else follow.shift
        # a channel that the normalisation all but switches off cannot make up for anything
        self._usable = np.abs(self._scale) > SWITCHED_OFF * np.abs(self._scale).max()
        # what is added to the output, in both networks; only where it is known by now
        self._others: tuple[np.ndarray, np.ndarray] | None = None
        if follow.other in compressed.batches[0]:
            shapes = {batch[follow.other].shape == batch[cut.output].shape for batch in original.batches}
            if shapes == {True}:
                self._others = self._rows(original, follow.other), self._rows(compressed, follow.other)

    def _rows(self, activations: Activations, name: str) -> np.ndarray:
        pairs = zip(activations.batches, self._where, strict=True)
        return np.concatenate([output_rows(self.cut, batch[name], where) for batch, where in pairs])

    def inputs(self) -> np.ndarray:
        """Patches of the compressed network."""
        pairs = zip(self._compressed.batches, self._where, strict=True)
        return np.concatenate([input_rows(self.cut, batch[self.cut.source], where) for batch, where in pairs])

    def reached(self) -> np.ndarray:
        """Outputs of the chain, which has run on the compressed network."""
        return self._rows(self._compressed, self.cut.output)

    @property
    def weights(self) -> np.ndarray:
        """What each output channel counts for, (O,): the scale of the normalisation after it."""
        scale = np.abs(self._scale)
        return np.maximum(scale, SWITCHED_OFF * scale.max()) if scale.any() else np.ones_like(scale)

    @property
    def rectified(self) -> bool:
        """Whether a ReLU follows whose input is known in full."""
        return self.cut.follow.relu and (not self.cut.follow.other or self._others is not None)

    def targets(self, reached: np.ndarray | None = None) -> np.ndarray:
        """Outputs wanted: the original's, and what makes up for the other addend of a sum.

        With `reached`, what the chain gives now: where a ReLU cuts the original off and would cut this off too, any
        value below zero is as good, so it may stay as it is.
        """
        targets = self._reference
        if self._others is not None:
            missing = self._others[0] - self._others[1]
            targets = targets + np.where(self._usable, missing / np.where(self._usable, self._scale, 1.0), 0.0)
        if reached is not None and self.rectified:
            before, after = self._others or (0.0, 0.0)
            negative = self._scale * self._reference + self._shift + before <= 0
            allowed = np.minimum(self._scale * reached + self._shift + after, 0.0)
            free = (allowed - self._shift - after) / np.where(self._usable, self._scale, 1.0)
            targets = np.where(negative & self._usable, free, targets)
        return np.asarray(targets, dtype=np.float32)


class _Fit:
    """The fit of one layer's chain, in rounds."""

    def __init__(self, choice: Candidate, seen: _Seen, rng: np.random.Generator) -> None:
        self._choice, self._seen, self._rng = choice, seen, rng
        self._layer = seen.cut.layer
        self._weight = np.asarray(self._layer.read_weight(), dtype=np.float64)
        rows = seen.inputs()
        self._rows, self._statistics = rows, statistics(rows)
        if seen.cut.bias is None:  # nothing will take the mean, so the product has to give it
            self._statistics = replace(self._statistics, mean=np.zeros_like(self._statistics.mean))
        self._made: Factorization | None = None

    def round(self, targets: np.ndarray) -> Factorization:
        """Fit to `targets`, going on from the round before."""
        stats, cut = self._statistics, self._seen.cut
        targets = targets / np.float32(cut.gain)
        cross = (targets.T @ self._rows).astype(np.float64) / len(targets)
        if cut.bias is not None:
            cross -= np.outer(targets.mean(axis=0, dtype=np.float64), stats.mean)
        weights = self._seen.weights
        # on matrices of this size a second thread costs more than it brings
        with threadpool_limits(1 if len(stats.mean) < SMALL_PATCH else None):
            kernel = _regression(self._weight, self._layer.spec.group, cross, stats)
            self._made = lift.factorize(
                find_decomposition(self._choice.decomposition),
                [self._layer.spec],
                [kernel * weights.reshape(-1, *(1,) * (kernel.ndim - 1))],
                self._choice.rank,
                [stats],
                rng=self._rng,
                start=None if self._made is None else self._made.kernels,
            )
        *others, last = self._made.kernels[0]
        return replace(self._made, kernels=((*others, last / weights.reshape(-1, *(1,) * (last.ndim - 1))),))


def _regression(weight: np.ndarray, group: int, cross: np.ndarray, stats: LayerStatistics) -> np.ndarray:
    """The full-rank kernel that best gives the targets from the inputs, pulled towards `weight`.

    ``(E[y x^T] + l W)(E[x x^T] + l I)^{-1}`` of the centred moments, each group of channels by itself.
    """
    flat = weight.reshape(len(weight), -1)
    parts = []
    for index, block in enumerate(np.split(flat, group)):
        covariance = stats.of_group(index, group).covariance
        pull = RIDGE * np.trace(covariance) / len(covariance) or 1.0
        outs = slice(index * len(block), (index + 1) * len(block))
        ins = slice(index * len(covariance), (index + 1) * len(covariance))
        padded = covariance + pull * np.eye(len(covariance))
        parts.append(solve_spd(padded, (cross[outs, ins] + pull * block).T).T)
    return np.concatenate(parts).reshape(weight.shape)


def _stored(made: Factorization, dtype: np.dtype) -> Factorization:
    """Kernels in the model's precision, as they will be run."""
    with np.errstate(over="ignore"):
        return replace(made, kernels=tuple(tuple(k.astype(dtype) for k in kernels) for kernels in made.kernels))


def _correct_bias(seen: _Seen, targets: np.ndarray, compressed: Activations) -> np.ndarray | None:
    """The bias that gives the output its wanted mean; the compressed activations are corrected with it."""
    cut = seen.cut
    if cut.bias is None:
        return None
    shift = (targets - seen.reached()).mean(axis=0, dtype=np.float64)
    for batch in compressed.batches:
        value = batch[cut.output]
        shape = [1] * value.ndim
        shape[cut.output_axis] = -1
        batch[cut.output] = value + shift.reshape(shape).astype(value.dtype)
    return cut.bias + shift

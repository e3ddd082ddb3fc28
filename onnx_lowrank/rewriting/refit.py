"""Layers refitted one after the other to what the compressed network before them delivers.

In topological order, each layer's chain is fitted to give the ORIGINAL output from the input that the chains before it
leave (asymmetric reconstruction), so that errors do not pile up: what one layer missed, the next can mend. All of it is
linear algebra on a few hundred unlabelled samples. One sample in eight is held out from the fits, and decides between
them: how far a layer follows its samples away from its original kernel, and how often it is fitted. The network is cut at its layers, and every segment runs once on
the original's activations and once on the compressed network's: the cost is linear in the number of layers.

References
----------
Zhang, Zou, He & Sun (2015), "Accelerating very deep convolutional networks for classification and detection", IEEE
TPAMI 38, section 3.3: the asymmetric target, there for channel SVD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from onnx_lowrank.cache import UNKEPT, Kept
from onnx_lowrank.cache.keys import member_key
from onnx_lowrank.calibration.calibrate import (
    HELD_OUT,
    Activations,
    input_rows,
    output_rows,
    run_segment,
    sample,
)
from onnx_lowrank.calibration.moments import has_moment, is_long, moments_of
from onnx_lowrank.decompositions import find_decomposition, fits_to, goes_by_outputs, is_joint, lift
from onnx_lowrank.decompositions.joint_fit import SeenKernel
from onnx_lowrank.decompositions.joint_svd import JointSVD
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Cut, cuts, island_of
from onnx_lowrank.rewriting.regression import regression_of
from onnx_lowrank.types import Candidate, Chain, Factorization, Layer, LayerStatistics, Progress

RECTIFIED_ROUNDS = 3
"""Fits after the first, at most, to targets that a following ReLU leaves free."""

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
    statistics: Mapping[str, LayerStatistics] | None = None,
    seed: int,
    progress: Progress,
    kept: Kept = UNKEPT,
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
    statistics
        What layers see in the original, for those that are decomposed together or share a kernel.
    kept
        Fits of earlier runs on this model and machine: each is taken where all before it were the same.

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
    kept = kept.under("refit", list(by_layer), feeds, statistics or {}, seed)
    progress("refit", 0, len(by_layer))
    for number, cut in enumerate(cuts(model, found, list(by_layer)), 1):
        if cut.before:
            run_segment(cut.before, original, compressed)
        run_segment(cut.alone, original)
        choice = by_layer[cut.layer.name]
        member = member_key(find_decomposition(choice.decomposition))
        kept = kept.under(choice.layers, choice.rank, choice.chains, member)
        if (known := kept.get()) is not None:
            made[choice.layers], shift = known
            _put(model, cut, choice, made[choice.layers], compressed, shift)
        else:
            rng = np.random.default_rng([seed, number])
            seen = _Seen(model, cut, choice, original, compressed, rng)
            made[choice.layers], shift = _layer(seen, made.get(choice.layers), found, statistics or {}, rng)
            kept.put((made[choice.layers], shift))
        biases[cut.layer.name] = None if cut.bias is None else cut.bias + shift
        for each in (original, compressed):
            each.keep(cut.alive)
        progress("refit", number, len(by_layer))
    return {
        layers: replace(factorization, biases=tuple(biases[name] for name in layers))
        for layers, factorization in made.items()
    }


def _layer(
    seen: _Seen,
    before: Factorization | None,
    found: Found,
    statistics: Mapping[str, LayerStatistics],
    rng: np.random.Generator,
) -> tuple[Factorization, np.ndarray]:
    """One layer's fit and the shift of its bias, from what was made `before` for layers that it shares kernels with."""
    choice, cut = seen.choice, seen.cut
    together = is_joint(choice.decomposition) and len(choice.layers) > 1
    if before is None and (together or len(choice.layers) > 1 or not fits(choice.decomposition, [cut.layer])):
        before = _plain(choice, cut, found, statistics, rng).stored(cut.layer.dtype)
    if before is None:
        return _fitted(seen, rng)
    if not (together and has_moment(cut.layer.spec)):
        return before, seen.run(before, seen.targets())
    # what is shared is fixed by now: the layer's own is fitted
    index = choice.layers.index(cut.layer.name)
    new, shift = _fitted(seen, rng, before.of(index))
    kernels = list(before.kernels)
    kernels[index] = new.kernels[0]
    return replace(before, kernels=tuple(kernels)), shift


def _put(
    model: Model,
    cut: Cut,
    choice: Candidate,
    made: Factorization,
    compressed: Activations,
    shift: np.ndarray | None = None,
) -> None:
    """Run a layer's chain on the compressed network, and shift its output where it has a bias."""
    index = choice.layers.index(cut.layer.name)
    run_segment(island_of(model, cut, choice.chains[index], made.of(index)), compressed)
    if shift is not None and cut.bias is not None:
        compressed.shift(cut, shift)


def fits(decomposition: str, layers: Sequence[Layer]) -> bool:
    """Whether kernels of this form, of layers that are decomposed together, can be fitted to data: patches are not too long."""
    long = len(layers) == 1 and is_long(layers[0].spec) and goes_by_outputs(decomposition)
    return long or all(has_moment(layer.spec) for layer in layers)


def _plain(
    choice: Candidate, cut: Cut, found: Found, statistics: Mapping[str, LayerStatistics], rng: np.random.Generator
) -> Factorization:
    """The factorization of a layer by the weights alone, or of all that are decomposed together, by what they see."""
    decomposition, layers = find_decomposition(choice.decomposition), [cut.layer]
    if is_joint(choice.decomposition):
        by_name = {layer.name: layer for layer in found.layers}
        layers = [by_name[name] for name in choice.layers]
    known = all(fits_to(choice.decomposition, statistics.get(layer.name)) for layer in layers)
    seen = [statistics[layer.name] for layer in layers] if known else None
    weights = [layer.read_weight() for layer in layers]
    return lift.factorize(decomposition, [layer.spec for layer in layers], weights, choice.rank, seen, rng=rng)


def _fitted(
    seen: _Seen, rng: np.random.Generator, given: Sequence[np.ndarray] | None = None
) -> tuple[Factorization, np.ndarray]:
    """The fit with the least error on the samples held out, and the shift of its bias; the activations are left with it.

    Of the kernels `given`, what is shared with other layers stays as it is.
    """
    fit = _Fit(seen, rng, given)
    targets = seen.targets()
    best = fit.round(targets)
    shift, error = seen.run(best, targets), seen.error()
    for _ in range(RECTIFIED_ROUNDS if seen.rectified else 0):
        targets = seen.targets(seen.reached())
        made = fit.round(targets)
        new_shift, new_error = seen.run(made, targets), seen.error()
        if new_error >= error:
            seen.put(best, shift)
            break
        best, shift, error = made, new_shift, new_error
    return best, shift


class _Seen:
    """What is seen of one layer in both networks, at sampled positions: rows are positions, columns channels."""

    def __init__(
        self,
        model: Model,
        cut: Cut,
        choice: Candidate,
        original: Activations,
        compressed: Activations,
        rng: np.random.Generator,
    ) -> None:
        self.cut, self.choice = cut, choice
        self._model, self._compressed = model, compressed
        outputs = [batch[cut.output] for batch in original.batches]
        self._where = [sample(cut, output.shape, rng, sum(map(len, outputs))) for output in outputs]
        self.held = _held_out(cut, outputs, self._where)
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
    def chain(self) -> Chain:
        """What the layer becomes."""
        return self.choice.chains[self.choice.layers.index(self.cut.layer.name)]

    @property
    def weights(self) -> np.ndarray:
        """What each output channel counts for, (O,): its scale after normalisation, and in the kernels that read it."""
        reading = self.cut.follow.reading
        scale = np.abs(self._scale) * (1.0 if reading is None or reading.shape != self._scale.shape else reading)
        return np.maximum(scale, SWITCHED_OFF * scale.max()) if scale.any() else np.ones_like(scale)

    @property
    def rectified(self) -> bool:
        """Whether a ReLU or the like follows whose input is known in full."""
        return self.cut.follow.bounded and (not self.cut.follow.other or self._others is not None)

    def targets(self, reached: np.ndarray | None = None) -> np.ndarray:
        """Outputs wanted: the original's, and what makes up for the other addend of a sum.

        With `reached`, what the chain gives now: where a ReLU cuts the original off and would cut this off too, any
        value below zero is as good, so it may stay as it is. Likewise above an upper bound.
        """
        targets = self._reference
        before, after = self._others or (0.0, 0.0)
        if self._others is not None:
            targets = targets + np.where(self._usable, (before - after) / np.where(self._usable, self._scale, 1.0), 0.0)
        if reached is not None and self.rectified:
            wanted = self._scale * self._reference + self._shift + before
            now = self._scale * reached + self._shift + after
            low, high = self.cut.follow.low, self.cut.follow.high
            allowed = np.where(wanted <= low, np.minimum(now, low), np.maximum(now, high))
            free = (allowed - self._shift - after) / np.where(self._usable, self._scale, 1.0)
            targets = np.where(((wanted <= low) | (wanted >= high)) & self._usable, free, targets)
        return np.asarray(targets, dtype=np.float32)

    def run(self, made: Factorization, targets: np.ndarray) -> np.ndarray:
        """Run the chain on the compressed network, and shift its output to the mean wanted; the shift, (O,)."""
        self.put(made)
        if self.cut.bias is None:
            return np.zeros(targets.shape[1])
        shift: np.ndarray = (targets - self.reached()).mean(axis=0, dtype=np.float64)
        self._compressed.shift(self.cut, shift)
        return shift

    def put(self, made: Factorization, shift: np.ndarray | None = None) -> None:
        """Run the chain on the compressed network as it is, with its output shifted."""
        _put(self._model, self.cut, self.choice, made, self._compressed, shift)

    def error(self) -> float:
        """Mean squared difference in what goes on after the layer, on the samples held out."""
        held = self.held if self.held.any() else slice(None)
        before, after = (each[held] for each in self._others) if self._others else (0.0, 0.0)
        wanted = self._scale * self._reference[held] + before
        got = self._scale * self.reached()[held] + after
        if self.rectified:
            low, high = self.cut.follow.low, self.cut.follow.high
            wanted, got = (np.clip(each + self._shift, low, high) for each in (wanted, got))
        counts = self.weights / np.where(self._scale == 0, 1.0, np.abs(self._scale))
        return float(np.square((wanted - got) * counts).mean())


def _held_out(cut: Cut, outputs: Sequence[np.ndarray], where: Sequence[np.ndarray]) -> np.ndarray:
    """Which rows are of samples held out."""
    first, held = 0, []
    for output, at in zip(outputs, where, strict=True):
        owner = at[:, 0]
        if cut.output_axis != 1:  # rows of the flattened activation
            owner = owner * len(output) // (output.size // output.shape[cut.output_axis])
        held.append((first + owner) % HELD_OUT == HELD_OUT - 1)
        first += len(output)
    return np.concatenate(held)


def _scaled(kernel: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A kernel (O, ...) with each row times its number."""
    return kernel * by.astype(kernel.dtype).reshape(-1, *(1,) * (kernel.ndim - 1))


class _Fit:
    """The fit of one layer's chain, in rounds."""

    def __init__(self, seen: _Seen, rng: np.random.Generator, given: Sequence[np.ndarray] | None = None) -> None:
        self._seen, self._rng, self._given = seen, rng, given
        self._layer = seen.cut.layer
        inputs = seen.inputs()
        fitted = inputs[~seen.held]
        moments = moments_of(seen.cut)
        moments.add(fitted)
        self._statistics = moments.statistics()
        precise = np.float64 if self._statistics.patches is None else np.float32
        weight = lift.by_output(self._layer.spec, np.asarray(self._layer.read_weight(), dtype=precise))
        apart = inputs[seen.held]
        self._regression = regression_of(weight, self._layer.spec.group, self._statistics, fitted, apart)
        self._made: Factorization | None = None

    def round(self, targets: np.ndarray) -> Factorization:
        """Fit to `targets`, going on from the round before; kernels in the model's precision."""
        stats, cut, held = self._statistics, self._seen.cut, self._seen.held
        targets = targets / np.float32(cut.gain)
        wanted = targets[~held]
        mean = wanted.mean(axis=0, dtype=np.float64) if cut.bias is not None else np.zeros(wanted.shape[1])
        weights = self._seen.weights
        # on matrices of this size a second thread costs more than it brings
        with threadpool_limits(1 if len(stats.mean) < SMALL_PATCH else None):
            kernel = self._regression.kernel(wanted, mean, targets[held], weights)
            if self._given is not None:
                return self._own(kernel, self._given)
            made = lift.factorize(
                find_decomposition(self._seen.choice.decomposition),
                [self._layer.spec],
                [lift.in_onnx_order(self._layer.spec, _scaled(kernel, weights))],
                self._seen.choice.rank,
                [stats],
                rng=self._rng,
                start=None if self._made is None else self._made.kernels,
            )
        self._made = made
        *others, last = made.kernels[0]
        spec = self._seen.chain[-1].spec
        kernels = (*others, lift.in_onnx_order(spec, _scaled(lift.by_output(spec, last), 1 / weights)))
        return replace(made, kernels=(kernels,)).stored(self._layer.dtype)

    def _own(self, kernel: np.ndarray, given: Sequence[np.ndarray]) -> Factorization:
        """The kernels `given`, with what is the layer's own fitted to `kernel`."""
        decomposition = find_decomposition(self._seen.choice.decomposition)
        assert isinstance(decomposition, JointSVD)
        seen = SeenKernel(kernel, self._statistics.covariance, self._seen.weights)
        first, second = decomposition.refitted(seen, given)
        error = float(np.sqrt(seen.error(first, second)))
        self._given = (first, second)
        return Factorization(((first, second),), error).stored(self._layer.dtype)

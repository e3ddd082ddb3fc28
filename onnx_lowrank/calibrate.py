"""What a layer sees: patches of its input at sampled positions, and their moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Cut, Segment, cuts
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.types import ConvSpec, LayerStatistics, Progress

Batch = dict[str, np.ndarray]
"""An array for each input, or for each tensor alive: samples along the first axis."""

HELD_OUT = 8
"""One in so many samples is held out from all fits, and decides between them."""

POSITIONS = 64
"""Output positions sampled of each picture. Neighbouring patches say nearly the same: more of them add little."""

ROWS_BYTES = 1 << 29
"""Most bytes of patches held at a time, for one layer."""

CHEAP_MOMENT = 1 << 32
"""Multiplications for a moment that are never saved on."""

MOMENTS_BYTES = 1 << 30
"""Most bytes of moments summed up in one pass of the samples."""

MAX_PATCH = 8192
"""Longest patch whose moment is formed: beyond that the matrix alone takes half a gigabyte."""


class Activations:
    """Tensors alive at a cut of the model, batch by batch."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def copy(self) -> Activations:
        """A copy that can go its own way; the arrays are shared."""
        return Activations([dict(batch) for batch in self.batches])

    def shift(self, cut: Cut, by: np.ndarray) -> None:
        """Add one number for each channel, (O,), to a layer's output."""
        for batch in self.batches:
            value = batch[cut.output]
            shape = [1] * value.ndim
            shape[cut.output_axis] = -1
            batch[cut.output] = value + by.reshape(shape).astype(value.dtype)

    def keep(self, names: frozenset[str]) -> None:
        """Let go of every tensor but these."""
        self.batches = [{name: value for name, value in batch.items() if name in names} for batch in self.batches]


def count(feeds: Sequence[Batch]) -> int:
    """Samples in all batches."""
    return sum(len(next(iter(batch.values()))) for batch in feeds)


def held_apart(feeds: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Samples to fit on and samples held out, one in ``HELD_OUT``; too few samples are both.

    Where inputs differ in their length, as one does that is no sample's own, whole batches are held out.
    """
    fit: list[Batch] = []
    held: list[Batch] = []
    first = 0
    for number, batch in enumerate(feeds):
        lengths = {len(value) if value.ndim else 1 for value in batch.values()}
        if lengths == {1} or len(lengths) > 1:
            (held if number % HELD_OUT == HELD_OUT - 1 else fit).append(batch)
            continue
        (length,) = lengths
        apart = (first + np.arange(length)) % HELD_OUT == HELD_OUT - 1
        first += length
        for part, rows in ((fit, ~apart), (held, apart)):
            if rows.any():
                part.append({name: value[rows] for name, value in batch.items()})
    return (fit, held) if held else (list(feeds), list(feeds))


class Running:
    """A segment in a session, for inputs of the types that `batch` has."""

    def __init__(self, segment: Segment, batch: Mapping[str, np.ndarray]) -> None:
        self._segment = segment
        settings = RunSettings(threads=0, spin=False)
        self._session = Session(segment.serialize({name: batch[name].dtype for name in segment.inputs}), settings)

    def __call__(self, *activations: Activations) -> None:
        """Add to every batch what the nodes make of it."""
        for each in activations:
            for batch in each.batches:
                made = self._session.run({name: batch[name] for name in self._segment.inputs}, self._segment.outputs)
                batch.update(zip(self._segment.outputs, made, strict=True))


def run_segment(segment: Segment, *activations: Activations) -> None:
    """Run the nodes of a segment once on every batch."""
    Running(segment, activations[0].batches[0])(*activations)


class Loaded:
    """Segments that run again and again, each in the session that it had the first time."""

    def __init__(self) -> None:
        self._running: dict[int, Running] = {}

    def __call__(self, segment: Segment | None, activations: Activations) -> None:
        """Run a segment, which has to live as long as this does; nothing happens for None."""
        if segment is None:
            return
        if id(segment) not in self._running:
            self._running[id(segment)] = Running(segment, activations.batches[0])
        self._running[id(segment)](activations)


def sample(cut: Cut, output: np.ndarray, rng: np.random.Generator, samples: int) -> np.ndarray:
    """Choose positions of one batch.

    ``POSITIONS`` for each sample; fewer where the patches of all would not fit, or where the products of their moment
    would be more work than running the layer (and more than ``CHEAP_MOMENT``), as long as there are twice as many patches
    as numbers in one.

    Parameters
    ----------
    output
        The layer's output on the batch.
    samples
        How many there are in all batches.

    Returns
    -------
    array
        Indices (rows, 1 + spatial axes): the sample, then the position. For a product, (rows, 1): the row of the
        activation flattened to a matrix.
    """
    spec = cut.layer.spec
    length = patch_length(spec)
    run = 2 * math.prod(output.shape[2:]) * spec.out_channels // (length * spec.group)
    enough = max(run, -(-max(2 * length, CHEAP_MOMENT // length**2) // max(samples, 1)))
    fit = ROWS_BYTES // (4 * length * max(samples, 1))
    return _positions(cut, output, rng, max(1, min(POSITIONS, enough, fit)))


def _positions(cut: Cut, output: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    if cut.output_axis != 1:
        rows = output.size // output.shape[cut.output_axis]
        keep = min(rows, most * output.shape[0] if output.ndim > 2 else rows)
        return np.sort(rng.permutation(rows)[:keep])[:, None]
    spatial = output.shape[2:]
    total = math.prod(spatial)
    picked = np.stack([rng.permutation(total)[:most] for _ in range(len(output))])  # (N, P)
    owner = np.repeat(np.arange(len(output)), picked.shape[1])
    return np.stack([owner, *np.unravel_index(picked.ravel(), spatial)], axis=1)


def output_rows(cut: Cut, output: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The layer's output at sampled positions, (rows, out channels), float32."""
    if cut.output_axis != 1:
        return _as_rows(output, cut.output_axis)[where[:, 0]]
    index = (where[:, 0], slice(None), *where.T[1:])
    return np.asarray(output[index], dtype=np.float32)


def input_rows(cut: Cut, source: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The patches that the sampled outputs are computed from, (rows, in channels * prod(kernel)), float32."""
    if cut.output_axis != 1:
        return _as_rows(source, cut.source_axis)[where[:, 0]]
    spec = cut.layer.spec
    begins, ends = _padding(spec, source.shape[2:])
    padded = np.pad(source, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
    n, rows = spec.ndim, len(where)
    index: list[Any] = [where[:, 0].reshape(rows, *(1,) * n), slice(None)]
    for axis in range(n):
        taps = where[:, 1 + axis, None] * spec.strides[axis] + spec.dilations[axis] * np.arange(spec.kernel[axis])
        shape = [rows] + [1] * n
        shape[1 + axis] = spec.kernel[axis]
        index.append(taps.reshape(shape))
    taken = padded[tuple(index)]  # the indexed axes come first: (rows, kernel..., C)
    return np.moveaxis(taken, -1, 1).reshape(rows, -1).astype(np.float32, copy=False)


def _as_rows(array: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, -1)
    return np.asarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float32)


def _padding(spec: ConvSpec, size: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial axis, ``auto_pad`` resolved for this size."""
    if spec.auto_pad == "NOTSET":
        return list(spec.pads[: spec.ndim]), list(spec.pads[spec.ndim :])
    begins, ends = [], []
    for axis, length in enumerate(size):
        total = 0
        if spec.auto_pad.startswith("SAME"):
            extent = (spec.kernel[axis] - 1) * spec.dilations[axis] + 1
            total = max(0, (-(-length // spec.strides[axis]) - 1) * spec.strides[axis] + extent - length)
        small, large = total // 2, total - total // 2
        begins.append(small if spec.auto_pad == "SAME_UPPER" else large)
        ends.append(large if spec.auto_pad == "SAME_UPPER" else small)
    return begins, ends


class Moments:
    """Mean and second moment of patches, summed up batch by batch."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        length = patch_length(cut.layer.spec)
        self._sum, self._squares, self._fourth, self._count = np.zeros(length), np.zeros((length, length)), 0.0, 0

    def add(self, rows: np.ndarray) -> None:
        """Take in patches (rows, D): products in float32, which is far within the sampling error."""
        self._sum += rows.sum(axis=0, dtype=np.float64)
        self._squares += rows.T @ rows
        self._fourth += float(np.square(np.square(rows, dtype=np.float64).sum(axis=1)).sum())
        self._count += len(rows)

    def statistics(self) -> LayerStatistics:
        """The moments. Without a bias that could take the mean, the product has to give it: it is then said to be 0.

        From n patches, an entry of the moment has a relative error of about ``sqrt(2 / n)``. It is shrunk towards a
        multiple of the identity by as much as that costs least: few samples would else make directions that they do
        not happen to show look free of charge.

        References
        ----------
        Ledoit & Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices", section 3.3.
        """
        mean = self._sum / self._count if self._cut.bias is not None else np.zeros_like(self._sum)
        second = self._squares / self._count
        covariance = second - np.outer(mean, mean)
        scale = np.trace(covariance) / len(covariance)
        spread = float(np.square(covariance).sum()) - scale**2 * len(covariance)
        noise = max(self._fourth / self._count - float(np.square(second).sum()), 0.0) / self._count
        share = min(1.0, noise / spread) if spread > 0 else 0.0
        shrunk = (1 - share) * covariance + share * scale * np.eye(len(covariance))
        return LayerStatistics(mean, shrunk + np.outer(mean, mean), self._count)


def patch_length(spec: ConvSpec) -> int:
    """Length of the input patch of one output, over all groups."""
    return spec.in_channels * math.prod(spec.kernel)


def has_moment(spec: ConvSpec) -> bool:
    """Whether the moment of a layer's patches can be formed, and is of use."""
    return not spec.transposed and not spec.depthwise and patch_length(spec) <= MAX_PATCH


def collect(
    model: Model,
    found: Found,
    names: Sequence[str],
    feeds: Sequence[Batch],
    *,
    seed: int,
    progress: Progress,
) -> dict[str, LayerStatistics]:
    """Statistics of the inputs of the layers called `names` in the model as it is.

    Layers whose patches are too long for a moment, and transposed convolutions, have none. The samples pass one batch
    after the other, and once for each set of layers whose moments fit into memory together.
    """
    layers = {layer.name: layer for layer in found.layers}
    usable = sorted((n for n in names if has_moment(layers[n].spec)), key=lambda name: found.places[name].position)
    passes: list[list[str]] = []
    room = 0
    for name in usable:
        size = 8 * patch_length(layers[name].spec) ** 2
        if not passes or size > room:
            passes.append([])
            room = MOMENTS_BYTES
        passes[-1].append(name)
        room -= size
    seen: dict[str, LayerStatistics] = {}
    total = len(passes) * len(feeds)
    for number, part in enumerate(passes):
        done = partial(_report, progress, number * len(feeds), total)
        seen |= _one_pass(model, found, part, feeds, seed, done)
    return seen


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress("calibrate", before + done, total)


def _one_pass(
    model: Model,
    found: Found,
    names: Sequence[str],
    feeds: Sequence[Batch],
    seed: int,
    done: Callable[[int], None],
) -> dict[str, LayerStatistics]:
    places = list(cuts(model, found, names))
    running = Loaded()
    sums = [Moments(cut) for cut in places]
    samples = count(feeds)
    for number, batch in enumerate(feeds):
        alive = Activations([dict(batch)])
        for index, cut in enumerate(places):
            running(cut.before, alive)
            running(cut.alone, alive)
            (current,) = alive.batches
            where = sample(cut, current[cut.output], np.random.default_rng([seed, index, number]), samples)
            sums[index].add(input_rows(cut, current[cut.source], where))
            alive.keep(cut.alive)
        done(number + 1)
    return {cut.layer.name: each.statistics() for cut, each in zip(places, sums, strict=True)}

"""What a layer sees: patches of its input at sampled positions, and their moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnx_lowrank.cache import UNKEPT, Kept
from onnx_lowrank.calibration.moments import LONG_ROWS, has_moment, is_long, moments_of, patch_length
from onnx_lowrank.data.feeds import count
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Cut, Segment, cuts, sources
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

CHEAP_MOMENT = 1 << 34
"""Multiplications for a moment that are never saved on."""

MOMENTS_BYTES = 1 << 30
"""Most bytes of moments summed up in one pass of the samples."""

SOURCES_BYTES = 1 << 29
"""Most bytes of inputs of all layers held at a time."""


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


def few(feeds: Sequence[Batch], most: int) -> list[Batch]:
    """The first batches, until they hold `most` samples."""
    taken: list[Batch] = []
    for batch in feeds:
        if most <= 0:
            break
        taken.append(batch)
        most -= max((len(value) for value in batch.values() if value.ndim), default=1)
    return taken


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
        self._session = Session(
            segment.serialize({name: batch[name].dtype for name in segment.inputs}), settings, folder=segment.folder
        )

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


def sample(cut: Cut, shape: tuple[int, ...], rng: np.random.Generator, samples: int) -> np.ndarray:
    """Choose positions of one batch.

    ``POSITIONS`` for each sample; fewer where the patches of all would not fit, or where the products of their moment
    would be more than a quarter of the work of running the layer (and more than ``CHEAP_MOMENT``), as long as there are twice
    as many patches as numbers in one; ``LONG_ROWS`` in all where the patches are kept themselves.

    Parameters
    ----------
    shape
        Of the layer's output on the batch.
    samples
        How many there are in all batches; of a flattened activation, how many rows.

    Returns
    -------
    array
        Indices (rows, 1 + spatial axes): the sample, then the position. For a product, (rows, 1): the row of the
        activation flattened to a matrix.
    """
    spec = cut.layer.spec
    length = patch_length(spec)
    run = math.prod(shape[2:]) * spec.out_channels // (2 * length * spec.group)  # and half a moment mirrors the other
    enough = max(run, -(-max(2 * length, CHEAP_MOMENT // length**2) // max(samples, 1)))
    if is_long(spec):
        enough = LONG_ROWS // max(samples, 1)
    fit = ROWS_BYTES // (4 * length * max(samples, 1))
    where = _positions(cut, shape, rng, max(1, min(POSITIONS, enough, fit)))
    if is_long(spec):
        most = -(-min(LONG_ROWS, ROWS_BYTES // (4 * length)) * shape[0] // max(samples, 1))
        where = where[np.sort(rng.permutation(len(where))[:most])]
    return where


def _positions(cut: Cut, shape: tuple[int, ...], rng: np.random.Generator, most: int) -> np.ndarray:
    if cut.output_axis != 1:
        rows = math.prod(shape) // shape[cut.output_axis]
        keep = min(rows, most * shape[0] if len(shape) > 2 else rows)
        return np.sort(rng.permutation(rows)[:keep])[:, None]
    spatial = shape[2:]
    total = math.prod(spatial)
    picked = np.stack([rng.permutation(total)[:most] for _ in range(shape[0])])  # (N, P)
    owner = np.repeat(np.arange(shape[0]), picked.shape[1])
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
    n, rows = spec.ndim, len(where)
    index: list[Any] = [where[:, 0].reshape(rows, *(1,) * n), slice(None)]
    outside: list[np.ndarray] = []
    for axis, size in enumerate(source.shape[2:]):
        taps, beyond = _taps(spec, axis, size, where[:, 1 + axis])
        shape = [rows] + [1] * n
        shape[1 + axis] = spec.kernel[axis]
        outside.append(beyond.reshape(shape))
        index.append(taps.reshape(shape))
    taken = source[tuple(index)]  # the indexed axes come first: (rows, kernel..., C)
    for beyond in outside:  # padding, and zeros in between, are not there to be read
        if beyond.any():
            taken[np.broadcast_to(beyond, taken.shape[:-1])] = 0
    return np.moveaxis(taken, -1, 1).reshape(rows, -1).astype(np.float32, copy=False)


def _as_rows(array: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, -1)
    return np.asarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float32)


def _taps(spec: ConvSpec, axis: int, size: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each tap of a kernel reads along an axis for outputs `at`, (rows, k), and which of those read nothing."""
    stride, begin = spec.strides[axis], _padding(spec, axis, size)
    steps = spec.dilations[axis] * np.arange(spec.kernel[axis])
    if spec.transposed:
        places, between = np.divmod(at[:, None] + begin - steps, stride)
    else:
        places = at[:, None] * stride + steps - begin
        between = np.zeros_like(places)
    return places.clip(0, size - 1), (places < 0) | (places >= size) | (between != 0)


def _padding(spec: ConvSpec, axis: int, size: int) -> int:
    """Zeros before a spatial axis (for a transposed convolution: outputs cut off there), ``auto_pad`` resolved."""
    if spec.auto_pad == "NOTSET":
        return spec.pads[axis]
    if not spec.auto_pad.startswith("SAME"):
        return 0
    stride, extent = spec.strides[axis], (spec.kernel[axis] - 1) * spec.dilations[axis] + 1
    given = stride * (size - 1) + spec.output_padding[axis] - stride * size if spec.transposed else 0
    total = max(0, given + extent if spec.transposed else (-(-size // stride) - 1) * stride + extent - size)
    return total // 2 if spec.auto_pad == "SAME_UPPER" else total - total // 2


def collect(
    model: Model,
    found: Found,
    names: Sequence[str],
    feeds: Sequence[Batch],
    *,
    seed: int,
    progress: Progress,
    kept: Kept = UNKEPT,
) -> dict[str, LayerStatistics]:
    """Statistics of the inputs of the layers called `names` in the model as it is.

    Of layers whose patches are too long for a moment, the patches themselves. The samples pass one batch after the other, and once for each set of layers whose moments fit into memory together.
    """
    layers = {layer.name: layer for layer in found.layers}
    specs = {name: layers[name].spec for name in names}
    usable = sorted(
        (n for n in names if has_moment(specs[n]) or is_long(specs[n])), key=lambda n: found.places[n].position
    )
    passes: list[list[str]] = []
    room = 0
    for name in usable:
        size = ROWS_BYTES if is_long(specs[name]) else 8 * patch_length(specs[name]) ** 2
        if not passes or size > room:
            passes.append([])
            room = MOMENTS_BYTES
        passes[-1].append(name)
        room -= size
    seen: dict[str, LayerStatistics] = {}
    total = len(passes) * len(feeds)
    kept = kept.under("statistics", feeds, seed)
    for number, part in enumerate(passes):
        done = partial(_report, progress, number * len(feeds), total)
        # the samples of a layer depend on which pass it through together
        together = kept.under(part)
        known = {name: together.get(name) for name in part}
        if None in known.values():
            known = _one_pass(model, found, part, feeds, seed, done)
            for name, statistics in known.items():
                together.put(statistics, name)
        seen |= known
        done(len(feeds))
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
    segment = sources(model, found, names)
    running = Running(segment, feeds[0]) if segment else None
    sums = [moments_of(cut) for cut in places]
    samples, step = count(feeds), 0
    for number, batch in enumerate(feeds):
        for part in parts(batch, step):
            alive = Activations([part])
            if running:
                running(alive)
            (current,) = alive.batches
            held = sum(value.nbytes for value in current.values()) // count([part])
            step = step or max(1, SOURCES_BYTES // held)
            for index, cut in enumerate(places):
                source = current[cut.source]
                rng = np.random.default_rng([seed, index, number])
                shape = cut.output_shape(source.shape)
                # rows of a flattened activation are more than its samples
                total = samples * shape[0] // count([part])
                sums[index].add(input_rows(cut, source, sample(cut, shape, rng, total)))
        done(number + 1)
    return {cut.layer.name: each.statistics() for cut, each in zip(places, sums, strict=True)}


def parts(batch: Batch, step: int) -> Iterator[Batch]:
    """A batch, at most `step` samples at a time (0: all); whole where its inputs differ in length."""
    lengths = {len(value) if value.ndim else 0 for value in batch.values()}
    (length, *others) = lengths
    if others or not step or length <= step:
        yield dict(batch)
        return
    for first in range(0, length, step):
        yield {name: value[first : first + step] for name, value in batch.items()}

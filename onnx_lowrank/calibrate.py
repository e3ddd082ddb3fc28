"""What a layer sees: patches of its input at sampled positions, and their moments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Cut, Segment, cuts
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.types import ConvSpec, LayerStatistics, Progress

POSITIONS = 64
"""Output positions sampled of each picture. Neighbouring patches say nearly the same: more of them add little."""

ROWS_BYTES = 1 << 29
"""Most bytes of patches held at a time, for one layer."""

MAX_PATCH = 8192
"""Longest patch whose moment is formed: beyond that the matrix alone takes half a gigabyte."""


class Activations:
    """Tensors alive at a cut of the model, batch by batch."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = batches

    def copy(self) -> Activations:
        """A copy that can go its own way; the arrays are shared."""
        return Activations([dict(batch) for batch in self.batches])

    def keep(self, names: frozenset[str]) -> None:
        """Let go of every tensor but these."""
        self.batches = [{name: value for name, value in batch.items() if name in names} for batch in self.batches]


def run_segment(segment: Segment, *activations: Activations, threads: int = 0) -> None:
    """Run the nodes of a segment on every batch, adding what they make."""
    first = activations[0].batches[0]
    settings = RunSettings(threads=threads, spin=False)
    session = Session(segment.serialize({name: first[name].dtype for name in segment.inputs}), settings)
    for each in activations:
        for batch in each.batches:
            made = session.run({name: batch[name] for name in segment.inputs}, segment.outputs)
            batch.update(zip(segment.outputs, made, strict=True))


@dataclass(frozen=True)
class Sampling:
    """The positions of a layer's output at which it is looked at, for each batch.

    Parameters
    ----------
    where
        For each batch, indices (rows, 1 + spatial axes): the sample, then the position. For a product, (rows, 1):
        the row of the activation flattened to a matrix.
    """

    where: tuple[np.ndarray, ...]


def sample(cut: Cut, outputs: Iterator[np.ndarray], rng: np.random.Generator, samples: int) -> Sampling:
    """Choose positions: ``POSITIONS`` for each sample, fewer where the patches would not fit.

    Parameters
    ----------
    outputs
        The layer's output, batch by batch.
    samples
        How many there are in all.
    """
    spec = cut.layer.spec
    patch = spec.params // spec.weight_shape[0] * spec.group
    most = max(1, min(POSITIONS, ROWS_BYTES // (4 * max(patch, 1) * max(samples, 1))))
    return Sampling(tuple(_positions(cut, output, rng, most) for output in outputs))


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


def statistics(rows: np.ndarray) -> LayerStatistics:
    """Moments of patches (rows, D): the matrix in float32 products, which is far within the sampling error."""
    count = len(rows)
    mean = rows.mean(axis=0, dtype=np.float64)
    second = (rows.T @ rows).astype(np.float64) / count
    return LayerStatistics(mean, second, count)


def patch_length(spec: ConvSpec) -> int:
    """Length of the input patch of one output, over all groups."""
    return spec.weight_shape[1] * spec.group * math.prod(spec.kernel)


def collect(
    model: Model,
    found: Found,
    names: Sequence[str],
    feeds: list[dict[str, np.ndarray]],
    *,
    seed: int,
    progress: Progress,
) -> dict[str, LayerStatistics]:
    """Statistics of the inputs of the layers called `names` in the model as it is.

    Layers whose patches are too long for a moment, and transposed convolutions, have none.
    """
    alive = Activations([dict(batch) for batch in feeds])
    seen: dict[str, LayerStatistics] = {}
    samples = sum(len(next(iter(batch.values()))) for batch in feeds)
    for number, cut in enumerate(cuts(model, found, names), 1):
        for segment in (cut.before, cut.alone):
            if segment:
                run_segment(segment, alive)
        spec = cut.layer.spec
        if not spec.transposed and patch_length(spec) <= MAX_PATCH:
            rng = np.random.default_rng([seed, number])
            where = sample(cut, (batch[cut.output] for batch in alive.batches), rng, samples).where
            pairs = zip(alive.batches, where, strict=True)
            stats = statistics(np.concatenate([input_rows(cut, batch[cut.source], at) for batch, at in pairs]))
            # without a bias to take the mean, the product has to give it
            seen[cut.layer.name] = stats if cut.bias is not None else replace(stats, mean=np.zeros_like(stats.mean))
        alive.keep(cut.alive)
        progress("calibrate", number, len(names))
    return seen

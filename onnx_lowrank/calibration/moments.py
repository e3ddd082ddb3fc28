"""Moments of what a layer sees: mean and covariance of its patches, or the patches themselves where those are long."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg.blas import dger, ssymv, ssyrk

from onnx_lowrank.graph.segments import Cut
from onnx_lowrank.types import ConvSpec, LayerStatistics

MAX_PATCH = 8192
"""Longest patch whose moment is formed: beyond that the matrix alone takes half a gigabyte."""

LONGEST_PATCH = 65536
"""Longest patch that is looked at: beyond that the patches of a few thousand samples take half a gigabyte."""

LONG_ROWS = 4096
"""Patches kept, at most, where no moment is formed of them."""

FEW_ROWS = 2048
"""Patches worth a product of their own."""

TILE = 256
"""Rows and columns of a matrix that are mirrored together."""


def patch_length(spec: ConvSpec) -> int:
    """Length of the input patch of one output, over all groups."""
    return spec.in_channels * math.prod(spec.kernel)


def has_moment(spec: ConvSpec) -> bool:
    """Whether the moment of a layer's patches can be formed, and is of use."""
    return not spec.depthwise and patch_length(spec) <= MAX_PATCH


def is_long(spec: ConvSpec) -> bool:
    """Whether a layer's patches are too long for their moment, and can stand for it themselves."""
    return not spec.depthwise and MAX_PATCH < patch_length(spec) <= LONGEST_PATCH


def moments_of(cut: Cut) -> Moments | Patches:
    """What sums up the patches of a layer."""
    return Patches(cut) if is_long(cut.layer.spec) else Moments(cut)


class Patches:
    """Patches too long for a moment, kept batch by batch."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Take in patches (rows, D)."""
        self._rows.append(rows)

    def statistics(self) -> LayerStatistics:
        """The patches, less their mean where a bias can take that, and how far their covariance is shrunk."""
        patches = np.concatenate(self._rows)
        self._rows = []
        count, length = patches.shape
        mean = patches.mean(axis=0, dtype=np.float64) if self._cut.bias is not None else np.zeros(length)
        patches -= mean.astype(np.float32)
        norms = np.einsum("nd,nd->n", patches, patches, dtype=np.float64)
        tiles = (patches[i : i + TILE] for i in range(0, count, TILE))
        # the squares of the covariance's entries are as many in the smaller matrix of the patches' products
        squared = math.fsum(float(np.square(tile @ patches.T, dtype=np.float64).sum()) for tile in tiles) / count**2
        share, variance = shrunk(squared, float(np.square(norms).mean()), float(norms.mean()), count, length)
        return LayerStatistics(mean, np.empty((0, 0)), count, patches, (share, variance))


def shrunk(squared: float, fourth: float, trace: float, count: int, length: int) -> tuple[float, float]:
    """How much of a covariance from `count` patches to replace by a multiple of the identity, and that multiple.

    Parameters
    ----------
    squared, trace
        Sum of the covariance's squared entries, and its trace.
    fourth
        Mean of the patches' norms to the fourth.

    References
    ----------
    Ledoit & Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices", section 3.3.
    """
    variance = trace / length
    noise, spread = max(fourth - squared, 0.0) / count, squared - variance**2 * length
    return (min(1.0, noise / spread) if spread > 0 else 0.0), variance


class Moments:
    """Mean and second moment of patches, summed up batch by batch."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        length = patch_length(cut.layer.spec)
        self._sum, self._fourth, self._count = np.zeros(length), 0.0, 0
        self._upper = np.zeros((length, length), dtype=np.float32, order="F")
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Take in patches (rows, D); the products of few cost less together."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= FEW_ROWS:
            self._take()

    def _take(self) -> None:
        """Add up what waits: in float32, which is far within the sampling error."""
        if not self._waiting:
            return
        rows = np.ascontiguousarray(np.concatenate(self._waiting))
        self._waiting = []
        self._sum += rows.sum(axis=0, dtype=np.float64)
        # a moment is symmetric: half of the products are enough
        self._upper = ssyrk(1.0, rows.T, beta=1.0, c=self._upper, overwrite_c=True)
        self._fourth += float(np.square(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)).sum())
        self._count += len(rows)

    def statistics(self) -> LayerStatistics:
        """The moments. Without a bias that could take the mean, the product has to give it: it is then said to be 0.

        From n patches, an entry of the moment has a relative error of about ``sqrt(2 / n)``. It is shrunk towards a
        multiple of the identity by as much as that costs least: few samples would else make directions that they do
        not happen to show look free of charge.

        The noise is that of the moment, which is more than that of the covariance; but patches of one sample are alike, and
        tell less than so many of their own. Counted sample by sample, the noise of the covariance is 0.65 to 1.3 times as large
        (layers of a ResNet-56, 16 to 256 pictures), and fits by either differ by a few per cent.

        References
        ----------
        Ledoit & Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices", section 3.3.
        """
        self._take()
        mean = self._sum / self._count if self._cut.bias is not None else np.zeros_like(self._sum)
        # all that is wanted of the covariance is told by the half that is there: the whole is large, and written once
        squared, energy = _squared(self._upper) / self._count**2, float(mean @ mean)
        along = float(mean @ ssymv(1.0, self._upper, mean.astype(np.float32))) / self._count
        noise = max(self._fourth / self._count - squared, 0.0) / self._count
        scale = (np.trace(self._upper, dtype=np.float64) / self._count - energy) / len(mean)
        spread = squared - 2 * along + energy**2 - scale**2 * len(mean)
        share = min(1.0, noise / spread) if spread > 0 else 0.0
        second = _mirrored(self._upper, (1 - share) / self._count)
        if share and energy:
            second = dger(share, mean, mean, a=second, overwrite_a=True)
        np.einsum("dd->d", second)[...] += share * scale
        return LayerStatistics(mean, second, self._count)


def together(seen: Sequence[LayerStatistics]) -> LayerStatistics:
    """What layers see that read the same kernel, and have a bias each: the mean, which those take, is said to be 0.

    Of patches that are not too long for their moment.
    """
    samples = sum(each.samples for each in seen)
    moment = sum(each.covariance * (each.samples / samples) for each in seen)
    return LayerStatistics(np.zeros_like(seen[0].mean), np.asarray(moment), samples)


def _squared(upper: np.ndarray) -> float:
    """Sum of the squares of a symmetric matrix of which `upper` holds one half, in column order, and zeros."""
    rows, diagonal = upper.T, np.diag(upper).astype(np.float64)
    half = math.fsum(float(np.vdot(part, part)) for part in (rows[i : i + TILE] for i in range(0, len(rows), TILE)))
    return 2 * half - float(diagonal @ diagonal)


def _mirrored(upper: np.ndarray, factor: float) -> np.ndarray:
    """The symmetric matrix, in float64 and times `factor`, of which `upper` holds one half."""
    whole = np.empty(upper.shape, np.float64, order="F")
    np.multiply(upper, factor, out=whole, dtype=np.float64)
    for first in range(0, len(whole), TILE):
        here = slice(first, first + TILE)
        whole[here, here] = np.triu(whole[here, here]) + np.triu(whole[here, here], 1).T
        for other in range(first + TILE, len(whole), TILE):
            there = slice(other, other + TILE)
            whole[there, here] = whole[here, there].T
    return whole

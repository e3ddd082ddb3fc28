"""The full-rank kernel that best gives a layer's targets from its inputs: ridge regression, pulled towards its own kernel.

With rows of inputs X and targets Y, both less their means, a kernel W and a pull l, the kernel ``W + D`` of least
``|Y - X (W + D)^T|^2 / n + l |D|^2``: with the rest ``E = Y - X W^T``, by the covariance of the inputs, which is shrunk,
``D = E^T X / n (X^T X / n + l I)^{-1}``, or where that is too large, by the products of the rows,
``D = E^T (X X^T + n l I)^{-1} X``, which need not be shrunk.

References
----------
Saunders, Gammerman & Vovk (1998), "Ridge regression learning algorithm in dual variables", eq. 7: the second form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from onnx_lowrank.decompositions.weighted import solve_spd
from onnx_lowrank.types import LayerStatistics

RIDGES = (1e-3, 1e-2, 1e-1, np.inf)
"""Pulls towards the layer's own kernel, relative to the mean variance of the inputs; the last keeps it."""


class Regression(ABC):
    """Kernels for targets that change from round to round, at the pull that suits samples held out.

    Parameters
    ----------
    weight
        The layer's own kernel, (O, ...), rows by output channel.
    group
        Groups of channels, each regressed by itself.
    statistics
        Of the inputs that are fitted to.
    apart
        Rows of the inputs held out, (n, D) over all groups, float32.
    """

    def __init__(self, weight: np.ndarray, group: int, statistics: LayerStatistics, apart: np.ndarray) -> None:
        self._weight, self._group, self._statistics = weight, group, statistics
        self._apart = apart - statistics.mean.astype(np.float32)
        self._ridge: float | None = None

    def kernel(self, wanted: np.ndarray, mean: np.ndarray, apart: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The kernel for targets `wanted`, (n, O), less their `mean`; it is of the shape of the layer's own.

        The pull is chosen the first time, by the targets of the rows held `apart`, with `weights` of the channels, (O,).
        """
        self._aim(wanted - self._made - mean.astype(np.float32))
        if self._ridge is None:
            self._ridge = self._best(apart - mean, weights) if len(apart) else RIDGES[0]
        return self._at(self._ridge)

    def _best(self, wanted: np.ndarray, weights: np.ndarray) -> float:
        """The pull with the least error on the rows held out."""
        return RIDGES[int(np.argmin([np.square((wanted - self._held(ridge)) * weights).sum() for ridge in RIDGES]))]

    @cached_property
    @abstractmethod
    def _made(self) -> np.ndarray:
        """What the layer's own kernel makes of the inputs less their mean, (n, O)."""

    @abstractmethod
    def _aim(self, missed: np.ndarray) -> None:
        """Take what the layer's own kernel misses of the targets of this round, (n, O)."""

    @abstractmethod
    def _at(self, ridge: float) -> np.ndarray:
        """The kernel with this pull."""

    @abstractmethod
    def _held(self, ridge: float) -> np.ndarray:
        """What it makes of the rows held out, less the mean of what is fitted: (rows, O)."""


class ByMoments(Regression):
    """By the moments of the inputs."""

    def __init__(
        self, weight: np.ndarray, group: int, statistics: LayerStatistics, inputs: np.ndarray, apart: np.ndarray
    ) -> None:
        super().__init__(weight, group, statistics, apart)
        self._inputs = inputs

    @cached_property
    def _made(self) -> np.ndarray:
        kernel = self._weight.astype(np.float32)
        made = by_group(self._inputs, kernel, self._group)
        return made - by_group(self._statistics.mean[None].astype(np.float32), kernel, self._group)

    def _aim(self, missed: np.ndarray) -> None:
        cross = (missed.T @ self._inputs).astype(np.float64) / len(missed)
        cross -= np.outer(missed.mean(axis=0, dtype=np.float64), self._statistics.mean)
        self._cross = cross

    def _at(self, ridge: float) -> np.ndarray:
        group, stats = self._group, self._statistics
        if ridge == np.inf:
            return self._weight
        parts = []
        for index, cross in enumerate(np.split(self._cross, group)):
            covariance = stats.of_group(index, group).covariance
            pull = ridge * np.trace(covariance) / len(covariance) or 1.0
            ins = slice(index * len(covariance), (index + 1) * len(covariance))
            parts.append(solve_spd(covariance + pull * np.eye(len(covariance)), cross[:, ins].T).T)
        return self._weight + np.concatenate(parts).reshape(self._weight.shape)

    def _held(self, ridge: float) -> np.ndarray:
        return by_group(self._apart, self._at(ridge).astype(np.float32), self._group)


class ByPatches(Regression):
    """By the products of the rows, for patches too long for a moment; in float32, as these are."""

    @cached_property
    def _made(self) -> np.ndarray:
        return by_group(self._patches, self._weight, self._group)

    def _aim(self, missed: np.ndarray) -> None:
        self._missed = np.split(missed.astype(np.float64), self._group, axis=1)

    def _at(self, ridge: float) -> np.ndarray:
        if ridge == np.inf:
            return self._weight
        parts = zip(self._duals(ridge), np.split(self._patches, self._group, axis=1), strict=True)
        change = np.concatenate([dual.T @ patches for dual, patches in parts])
        return self._weight + change.reshape(self._weight.shape)

    def _held(self, ridge: float) -> np.ndarray:
        if ridge == np.inf:
            return self._own
        parts = zip(self._alike, self._duals(ridge), strict=True)
        return self._own + np.concatenate([alike @ dual for alike, dual in parts], axis=1)

    @cached_property
    def _own(self) -> np.ndarray:
        """What the layer's own kernel makes of the rows held out, (rows, O)."""
        return by_group(self._apart, self._weight, self._group)

    @cached_property
    def _alike(self) -> list[np.ndarray]:
        """Products of the rows held out with those fitted to, of each group, (rows, n)."""
        sides = (np.split(rows, self._group, axis=1) for rows in (self._apart, self._patches))
        return [held @ patches.T for held, patches in zip(*sides, strict=True)]

    @property
    def _patches(self) -> np.ndarray:
        """The inputs less their mean, (n, D)."""
        assert self._statistics.patches is not None
        return self._statistics.patches

    @cached_property
    def _products(self) -> list[np.ndarray]:
        """Products of the rows of each group, (n, n)."""
        parts = np.split(self._patches, self._group, axis=1)
        return [(patches @ patches.T).astype(np.float64) for patches in parts]

    def _duals(self, ridge: float) -> list[np.ndarray]:
        """What each row adds to the kernel, for each group (n, O / g)."""
        duals = []
        for products, missed in zip(self._products, self._missed, strict=True):
            pull = ridge * np.trace(products) / (self._patches.shape[1] // self._group) or 1.0
            duals.append(solve_spd(products + pull * np.eye(len(products)), missed).astype(np.float32))
        return duals


def by_group(rows: np.ndarray, kernel: np.ndarray, group: int) -> np.ndarray:
    """What a kernel (O, D / g...) makes of rows of inputs (n, D): (n, O)."""
    blocks = np.split(kernel.reshape(len(kernel), -1), group)
    parts = zip(np.split(rows, group, axis=1), blocks, strict=True)
    return np.concatenate([part @ block.T for part, block in parts], axis=1)


def regression_of(
    weight: np.ndarray, group: int, statistics: LayerStatistics, inputs: np.ndarray, apart: np.ndarray
) -> Regression:
    """The regression in the form that what the layer has seen allows."""
    if statistics.patches is None:
        return ByMoments(weight, group, statistics, inputs, apart)
    return ByPatches(weight, group, statistics, apart)

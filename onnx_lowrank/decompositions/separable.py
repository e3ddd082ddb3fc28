"""``separable``: a kernel as a sum of depthwise separable ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.decompositions.matrix import is_pointwise, pointwise
from onnx_lowrank.decompositions.weighted import (
    SHORT,
    DepthwiseMap,
    WeightedFit,
    interpolated_errors,
    iterations_of,
    level,
    variable_projection,
)
from onnx_lowrank.linalg import squared_norm, tail_energy
from onnx_lowrank.types import Chain, ConvSpec, Factorization, LayerStatistics, Rank, Stage


class Separable:
    """A depthwise kernel with r filters for each input channel, 1x1 to O: r depthwise separable convolutions, summed.

    Strides are on the first stage, so that the second runs at the output's resolution: where a convolution has strides,
    this costs less than ``cp3`` for the same error. Runtimes are fast at it for r = 1; ONNX Runtime's CPU
    provider has no fast kernel for more filters than channels.

    References
    ----------
    Guo, Li, Lin, Feng & Chen (2018), "Network Decoupling: From Regular to Depthwise Separable Convolutions", BMVC,
    theorem 1: the slice of each input channel by its singular value decomposition, exact at the kernel's size.

    Examples
    --------
    >>> [s.spec.weight_shape for s in Separable().chain([ConvSpec((64, 32, 3, 3))], (2,))[0]]
    [(64, 1, 3, 3), (64, 64, 1, 1)]
    """

    name = "separable"

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        return "its kernel is pointwise: there is no spatial part to separate" if is_pointwise(specs[0]) else None

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        out, _, *kernel = specs[0].weight_shape
        return (min(out, math.prod(kernel)),)

    def chain(self, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
        spec, (r,) = specs[0], rank
        out, inner = spec.weight_shape[:2]
        depthwise = spec.stage(inner * r, 1, range(spec.ndim), group=inner)
        return ((Stage(depthwise), Stage(spec.stage(out, inner * r))),)

    def errors(
        self,
        weights: Sequence[np.ndarray],
        ranks: Sequence[Rank],
        statistics: Sequence[LayerStatistics] | None = None,
    ) -> np.ndarray:
        wanted = [r for (r,) in ranks]
        if statistics is not None:
            moment = statistics[0].covariance
            return interpolated_errors(lambda r: self._weighted(weights[0], moment, r, SHORT)[1].error, wanted)
        values = np.linalg.svd(_slices(weights[0]), compute_uv=False)
        return tail_energy(np.linalg.norm(values, axis=0))[wanted]

    def estimate_rank(self, weights: Sequence[np.ndarray], estimator: Callable[[np.ndarray], int]) -> Rank:
        """The largest of the estimates for the slices of the input channels, which share one."""
        return (max(estimator(each) for each in _slices(weights[0])),)

    def factorize(
        self,
        weights: Sequence[np.ndarray],
        rank: Rank,
        statistics: Sequence[LayerStatistics] | None = None,
        *,
        rng: np.random.Generator,
        start: Sequence[Sequence[np.ndarray]] | None = None,
        draft: bool = False,
    ) -> Factorization:
        """Kernels of `rank`, every product with its scale split evenly between the stages."""
        weight, (r,) = weights[0], rank
        if statistics is not None:
            begin = None if start is None else start[0][0]
            moment, iterations = statistics[0].covariance, iterations_of(start, draft, weights[0][0].size)
            taps, fit = self._weighted(weight, moment, r, iterations, begin)
            outer, error = fit.outer, fit.error
        else:
            slices = _slices(weight)
            left, values, right = (part[..., :r] for part in _svd(slices))
            left = left * values[:, None]
            error = squared_norm(slices - left @ right.swapaxes(1, 2)) / (squared_norm(slices) or 1.0)
            taps = right.swapaxes(1, 2).reshape(-1, right.shape[1])
            outer = np.moveaxis(left, 1, 0).reshape(len(weight), -1)
        outer, taps = level(outer, taps)
        kernels = taps.reshape(-1, 1, *weight.shape[2:]), pointwise(outer, weight.ndim - 2)
        return Factorization((kernels,), math.sqrt(error))

    def _weighted(
        self, weight: np.ndarray, moment: np.ndarray, rank: int, iterations: int, begin: np.ndarray | None = None
    ) -> tuple[np.ndarray, WeightedFit]:
        """Depthwise kernels (I * rank, k) of least output error, going on from some or from the slices' own."""
        if begin is None:
            begin = _svd(_slices(weight))[2][..., :rank].swapaxes(1, 2)
        start = np.asarray(begin, dtype=np.float64).reshape(weight.shape[1] * rank, -1)
        target = np.asarray(weight, dtype=np.float64).reshape(len(weight), -1)
        fit = variable_projection(target, moment, DepthwiseMap(weight.shape[1]), start, iterations=iterations)
        return fit.parameters, fit


def _slices(weight: np.ndarray) -> np.ndarray:
    """The kernel of each input channel as a matrix: (O, I, k...) -> (I, O, k)."""
    out, inner = weight.shape[:2]
    return np.moveaxis(np.asarray(weight, dtype=np.float64).reshape(out, inner, -1), 1, 0)


def _svd(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors (I, O, n), values (I, n), right vectors (I, k, n) of every slice."""
    left, values, right = np.linalg.svd(slices, full_matrices=False)
    return left, values, right.swapaxes(1, 2)

"""SVD between the channels: ``svd`` of pointwise layers, ``channel_svd`` and ``channel_svd_in`` of larger kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lowrank.decompositions.matrix import MatrixDecomposition, is_pointwise, pointwise
from onnx_lowrank.decompositions.weighted import (
    SHORT,
    fit_first_stage,
    interpolated_errors,
    leading_outputs,
    level,
    output_spectrum,
)
from onnx_lowrank.linalg import tail_energy
from onnx_lowrank.types import ConvSpec, Factorization, LayerStatistics


class SVD(MatrixDecomposition):
    """Gemm, MatMul or 1x1 convolution as two of them: matrix (O, I) to (r, I) and (O, r).

    A stride stays on the first stage: the positions that it skips are never computed.

    Examples
    --------
    >>> SVD().chain([ConvSpec((64, 32))], (8,))[0][0].spec.weight_shape
    (8, 32)
    """

    name = "svd"
    by_outputs = True
    """The fit to samples needs only the covariance of the outputs, and so can be had for patches of any length."""

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        return None if is_pointwise(specs[0]) else "its kernel spans positions: channel_svd is the SVD for it"

    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        out, inner = spec.weight_shape[:2]
        return spec.stage(rank, inner, range(spec.ndim)), spec.stage(out, rank)

    def matricize(self, weight: np.ndarray) -> np.ndarray:
        return weight.reshape(weight.shape[0], -1)  # (O, I, k...) -> (O, I*k)

    def tensorize(self, left: np.ndarray, right: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return right.reshape(-1, *shape[1:]), pointwise(left, len(shape) - 2)

    def weighted_errors(self, weight: np.ndarray, seen: LayerStatistics, ranks: Sequence[int]) -> np.ndarray:
        energies = output_spectrum(seen.output_covariance(self.matricize(weight)))
        tails = tail_energy(np.sqrt(energies))
        return tails[np.minimum(ranks, len(tails) - 1)]

    def weighted_fit(
        self, weight: np.ndarray, seen: LayerStatistics, rank: int, iterations: int, start: np.ndarray | None
    ) -> Factorization:
        """Closed form: the projection of the outputs on their `rank` principal directions."""
        target = self.matricize(weight)
        # a rank beyond the outputs' number exists only for the mirror image of a tall matrix: nothing is lost
        outputs = seen.output_covariance(target)
        basis = leading_outputs(outputs, min(rank, len(target)))
        left = np.zeros((len(target), rank), target.dtype)
        left[:, : basis.shape[1]] = basis
        right = left.T @ target
        missed = target - left @ right
        total = float(np.trace(outputs))
        error = np.sqrt(max(seen.output_energy(missed), 0.0) / total) if total > 0 else 0.0
        return Factorization((self.tensorize(*level(left, right), weight.shape),), float(error))


class ChannelSVD(SVD):
    """The kernel to r channels, then 1x1 to O: matrix (O, I*k).

    References
    ----------
    Zhang, Zou, He & Sun (2015), "Accelerating very deep convolutional networks", eq. 3 (there with data).
    """

    name = "channel_svd"

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        return "its kernel is pointwise: svd is the SVD for it" if is_pointwise(specs[0]) else None


class ChannelSVDIn(ChannelSVD):
    """1x1 to r channels, then the kernel to O: matrix (O*k, I), the mirror image of :class:`ChannelSVD`."""

    name = "channel_svd_in"
    by_outputs = False

    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        out, inner = spec.weight_shape[:2]
        return spec.stage(rank, inner), spec.stage(out, rank, range(spec.ndim))

    def matricize(self, weight: np.ndarray) -> np.ndarray:
        return np.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1])  # (O, I, k...) -> (O*k, I)

    def tensorize(self, left: np.ndarray, right: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        second = np.moveaxis(left.reshape(shape[0], *shape[2:], -1), -1, 1)  # (O*k, r) -> (O, r, k...)
        return pointwise(right, len(shape) - 2), second

    def weighted_errors(self, weight: np.ndarray, seen: LayerStatistics, ranks: Sequence[int]) -> np.ndarray:
        moment = seen.covariance
        return interpolated_errors(lambda rank: fit_first_stage(weight, moment, rank, SHORT)[1].error, ranks)

    def weighted_fit(
        self, weight: np.ndarray, seen: LayerStatistics, rank: int, iterations: int, start: np.ndarray | None
    ) -> Factorization:
        stage, fit = fit_first_stage(weight, seen.covariance, rank, iterations, start=start)
        second = fit.outer.reshape(len(weight), rank, *weight.shape[2:])
        return Factorization(((pointwise(stage, weight.ndim - 2), second),), float(np.sqrt(fit.error)))

"""``spatial_svd``: a kernel split between its first spatial axis and the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lowrank.decompositions.matrix import MatrixDecomposition
from onnx_lowrank.decompositions.weighted import SHORT, fit_first_stage, interpolated_errors, level
from onnx_lowrank.types import ConvSpec, Factorization, LayerStatistics


class SpatialSVD(MatrixDecomposition):
    """A kh x 1 convolution to r channels, then 1 x kw to O: matrix (kw*O, kh*I).

    In three dimensions the first stage spans the first axis and the second the other two.

    References
    ----------
    Jaderberg, Vedaldi & Zisserman (2014), "Speeding up convolutional neural networks with low rank
    expansions", scheme 2; Tai, Xiao, Zhang, Wang & E (2016), "Convolutional neural networks with low-rank
    regularization", theorem 1: the closed form.

    Examples
    --------
    >>> [s.spec.weight_shape for s in SpatialSVD().chain([ConvSpec((64, 32, 3, 5))], (8,))[0]]
    [(8, 32, 3, 1), (64, 8, 1, 5)]
    """

    name = "spatial_svd"

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        kernel = specs[0].kernel
        if len(kernel) < 2 or kernel[0] == 1 or max(kernel[1:]) == 1:
            return "its kernel has no second spatial axis to split off"
        return None

    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        out, inner = spec.weight_shape[:2]
        return spec.stage(rank, inner, [0]), spec.stage(out, rank, range(1, spec.ndim))

    def matricize(self, weight: np.ndarray) -> np.ndarray:
        rows = np.moveaxis(weight, (0, 1, 2), (0, -2, -1))  # (O, I, kh, kw...) -> (O, kw..., I, kh)
        return rows.reshape(-1, weight.shape[1] * weight.shape[2])

    def tensorize(self, left: np.ndarray, right: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        out, inner, first, *rest = shape
        ones = (1,) * len(rest)
        second = np.moveaxis(left.reshape(out, *rest, -1), -1, 1)  # (O*kw, r) -> (O, r, kw...)
        return right.reshape(-1, inner, first, *ones), second[:, :, None]

    def weighted_errors(self, weight: np.ndarray, seen: LayerStatistics, ranks: Sequence[int]) -> np.ndarray:
        columns, moment = self._columns(weight), seen.covariance
        return interpolated_errors(lambda rank: fit_first_stage(columns, moment, rank, SHORT)[1].error, ranks)

    def weighted_fit(
        self, weight: np.ndarray, seen: LayerStatistics, rank: int, iterations: int, start: np.ndarray | None
    ) -> Factorization:
        stage, fit = fit_first_stage(self._columns(weight), seen.covariance, rank, iterations, start=start)
        second, first = level(fit.outer.reshape(len(weight), rank, -1).swapaxes(1, 2).reshape(-1, rank), stage)
        return Factorization((self.tensorize(second, first, weight.shape),), float(np.sqrt(fit.error)))

    def _columns(self, weight: np.ndarray) -> np.ndarray:
        """The kernel as one whose input channels are the first stage's taps: (O, I, kh, kw...) -> (O, I*kh, kw*...)."""
        return weight.reshape(len(weight), weight.shape[1] * weight.shape[2], -1)

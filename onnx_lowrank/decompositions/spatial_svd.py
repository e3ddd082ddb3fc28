"""``spatial_svd``: a kernel split between its first spatial axis and the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lowrank.decompositions.matrix import MatrixDecomposition
from onnx_lowrank.decompositions.weighted import (
    FURTHER,
    LONG,
    SHORT,
    SpatialMap,
    WeightedFit,
    block_mean,
    interpolated_errors,
    level,
    root_and_inverse,
    unit_rows,
    variable_projection,
)
from onnx_lowrank.linalg import leading_basis
from onnx_lowrank.types import ConvSpec, Factorization


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

    def weighted_errors(self, weight: np.ndarray, moment: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
        return interpolated_errors(lambda rank: self._fit(weight, moment, rank, SHORT)[1].error, ranks)

    def weighted_fit(
        self, weight: np.ndarray, moment: np.ndarray, rank: int, start: np.ndarray | None
    ) -> Factorization:
        stage, fit = self._fit(weight, moment, rank, LONG if start is None else FURTHER, start)
        right, left = level(fit.outer.reshape(len(weight), rank, -1).swapaxes(1, 2).reshape(-1, rank), stage)
        return Factorization((self.tensorize(right, left, weight.shape),), float(np.sqrt(fit.error)))

    def _fit(
        self, weight: np.ndarray, moment: np.ndarray, rank: int, iterations: int, begin: np.ndarray | None = None
    ) -> tuple[np.ndarray, WeightedFit]:
        """First stage (rank, I*kh), and the second after it, (O, rank * kw).

        Started from the principal directions of the matrix in whitened coordinates of its columns.
        """
        out, inner, first = weight.shape[:3]
        target = weight.reshape(out, -1)
        rest = target.shape[1] // (inner * first)
        root, unwhiten = root_and_inverse(block_mean(moment, inner * first, rest, keep="outer"))
        if begin is None:
            start = leading_basis(root @ self.matricize(weight).T, rank).T
        else:
            start = unit_rows(begin.reshape(rank, -1) @ root)
        mapped = SpatialMap(unwhiten, rest)
        fit = variable_projection(target, moment, mapped, start, iterations=iterations)
        return mapped.stage(fit.parameters), fit

"""What the decompositions that factorise one matrix have in common: the truncated SVD of a matricised kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.decompositions.weighted import iterations_of
from onnx_lowrank.linalg import tail_energy
from onnx_lowrank.randomized import low_rank, spectrum
from onnx_lowrank.types import Chain, ConvSpec, Factorization, LayerStatistics, Rank, Stage


class MatrixDecomposition(ABC):
    """A kernel read as one matrix and factorised into two stages by its truncated SVD.

    The SVD is optimal among all factorisations of its rank (Eckart & Young 1936), so the tail of the squared
    singular values is the error of every rank at once.
    """

    name: str

    @abstractmethod
    def refuses(self, specs: Sequence[ConvSpec]) -> str | None: ...

    @abstractmethod
    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        """The two convolutions of the chain."""

    @abstractmethod
    def matricize(self, weight: np.ndarray) -> np.ndarray:
        """The kernel as a matrix; rows belong to the second stage's kernel, columns to the first's."""

    @abstractmethod
    def tensorize(self, left: np.ndarray, right: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Kernels (first, second) from the factors of a kernel of `shape`."""

    @abstractmethod
    def weighted_errors(self, weight: np.ndarray, seen: LayerStatistics, ranks: Sequence[int]) -> np.ndarray:
        """Squared relative errors of the output, for what the layer has `seen`."""

    @abstractmethod
    def weighted_fit(
        self, weight: np.ndarray, seen: LayerStatistics, rank: int, iterations: int, start: np.ndarray | None
    ) -> Factorization:
        """The fit of least output error; an iterative one takes `iterations` from the first stage's kernel `start` on."""

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        first, second = (stage.weight_shape for stage in self.stages(specs[0], 1))
        return (min(int(np.prod(first)), int(np.prod(second))),)

    def chain(self, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
        return (tuple(Stage(stage) for stage in self.stages(specs[0], rank[0])),)

    def errors(
        self,
        weights: Sequence[np.ndarray],
        ranks: Sequence[Rank],
        statistics: Sequence[LayerStatistics] | None = None,
    ) -> np.ndarray:
        picks = [rank[0] for rank in ranks]
        if statistics is not None:
            return self.weighted_errors(_precise(weights[0], statistics[0]), statistics[0], picks)
        return tail_energy(spectrum(self.matricize(weights[0])))[picks]

    def estimate_rank(self, weights: Sequence[np.ndarray], estimator: Callable[[np.ndarray], int]) -> Rank:
        return (estimator(self.matricize(weights[0])),)

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
        if statistics is not None:
            weight, begin = _precise(weights[0], statistics[0]), None if start is None else start[0][0]
            return self.weighted_fit(weight, statistics[0], rank[0], iterations_of(start, draft, weight[0].size), begin)
        matrix = self.matricize(weights[0])
        left, right, error = low_rank(matrix, rank[0], rng)
        return Factorization((self.tensorize(left, right, weights[0].shape),), error)


def _precise(weight: np.ndarray, seen: LayerStatistics) -> np.ndarray:
    """A kernel in float64; in float32 where it is as long as the patches that are `seen`, which are so too."""
    return np.asarray(weight, np.float64 if seen.patches is None else np.float32)


def pointwise(kernel: np.ndarray, ndim: int) -> np.ndarray:
    """A matrix (out, in) as the kernel of a pointwise convolution with `ndim` spatial axes."""
    return kernel.reshape(*kernel.shape, *(1,) * ndim)


def is_pointwise(spec: ConvSpec) -> bool:
    """True where every spatial size of the kernel is 1, as in a Gemm, a MatMul or a 1x1 convolution."""
    return all(size == 1 for size in spec.kernel)

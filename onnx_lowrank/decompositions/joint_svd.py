"""``joint_left``, ``joint_right``, ``joint_both``: layers of one shape in one subspace, with kernels stored once.

Kernels are read as matrices as in ``spatial_svd``: W_i with rows (O, kw) and columns (I, kh), the second stage's kernel
from the left factor and the first stage's from the right one (for pointwise kernels and products: O and I). With one
layer alone, all three are what ``spatial_svd`` is.

References
----------
Chen, Zhou, Sun & Huang (2023), "Joint matrix decomposition for deep convolutional neural networks compression",
Neurocomputing 516 (arXiv 2107.04386): sections 3.2 to 3.4. There the matrix is transposed, so that the first stage's
kernel is the left factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.decompositions.joint_fit import SeenKernel, least_squares
from onnx_lowrank.decompositions.weighted import interpolated_errors
from onnx_lowrank.linalg import fix_signs, singular_values, squared_norm, tail_energy
from onnx_lowrank.types import Chain, ConvSpec, Factorization, LayerStatistics, Part, Rank, Stage

LEFT, RIGHT = "left", "right"
"""Tags of the shared kernels: the first stage's, and the second's."""

ALTERNATIONS, FEW = 30, 4
"""Of the two halves of ``joint_both``: the paper's for a result, and those that only predict."""


ROUNDS = 8
"""Turns between own and shared kernels in a fit to samples."""


class JointSVD(ABC):
    """A decomposition of several layers at once. Every kernel counts by its relative error, whatever its norm.

    Stacked as they are, kernels of large norm would have the shared factor to themselves.
    """

    name: str

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        if len({_common(spec) for spec in specs}) > 1:
            return "its layers differ in their operators or in the sizes of their kernels"
        return self.objection(specs)

    @abstractmethod
    def objection(self, specs: Sequence[ConvSpec]) -> str | None:
        """Why layers with kernels of one size cannot share what this shares."""

    @abstractmethod
    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank: ...

    @abstractmethod
    def factors(self, matrices: Sequence[np.ndarray], rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Left (rows, rank) and right (rank, columns) of each matrix, which have unit norm."""

    @abstractmethod
    def joined(self, specs: Sequence[ConvSpec], rank: int) -> tuple[Chain, ...]:
        """The chain of each layer, with tags on what is shared."""

    def chain(self, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
        chains = self.joined(specs, rank[0])
        if len(specs) > 1:
            return chains
        return tuple(tuple(Stage(stage.spec) for stage in chain) for chain in chains)

    @abstractmethod
    def errors_of(self, matrices: Sequence[np.ndarray], ranks: Sequence[int]) -> np.ndarray:
        """Mean squared relative error over the matrices for each rank."""

    def errors(
        self,
        weights: Sequence[np.ndarray],
        ranks: Sequence[Rank],
        statistics: Sequence[LayerStatistics] | None = None,
    ) -> np.ndarray:
        picks = [rank for (rank,) in ranks]
        if statistics is None:
            return self.errors_of(_unit(weights)[0], picks)
        seen = _seen(weights, statistics)
        return interpolated_errors(lambda rank: self._weighted(weights, seen, rank, rounds=1)[1], picks)

    def estimate_rank(self, weights: Sequence[np.ndarray], estimator: Callable[[np.ndarray], int]) -> Rank:
        return (max(estimator(_matrix(weight)) for weight in weights),)

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
            rounds = 1 if draft else ROUNDS
            made, error = self._weighted(weights, _seen(weights, statistics), rank[0], rounds)
            return Factorization(tuple(made), float(np.sqrt(error)))
        return self._plain(weights, rank[0])

    def _plain(self, weights: Sequence[np.ndarray], rank: int) -> Factorization:
        """By the kernels alone."""
        matrices, norms = _unit(weights)
        made = self.factors(matrices, rank)
        missed = [squared_norm(m - left @ right) for m, (left, right) in zip(matrices, made, strict=True)]
        kernels = tuple(
            self.with_norm(_first(right, w.shape), _second(left, w.shape), norm)
            for w, norm, (left, right) in zip(weights, norms, made, strict=True)
        )
        return Factorization(kernels, float(np.sqrt(np.mean(missed))))

    def _weighted(
        self, weights: Sequence[np.ndarray], seen: Sequence[SeenKernel], rank: int, rounds: int
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
        """Least error of the outputs, relative in each layer: own kernels and shared ones in turn, and its mean square.

        Each step is a linear least-squares problem, solved by conjugate gradients from where it stands, so that the error
        never rises.
        """
        plain = self._plain(weights, rank).kernels
        made = [self.refitted(one, kernels) for one, kernels in zip(seen, plain, strict=True)]
        for _ in range(rounds - 1 if len(weights) > 1 else 0):
            made = self._reshared(seen, made)
            made = [self.refitted(one, kernels) for one, kernels in zip(seen, made, strict=True)]
        return made, float(np.mean([one.error(*kernels) for one, kernels in zip(seen, made, strict=True)]))

    def refitted(self, seen: SeenKernel, kernels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """A layer's kernels with what is its own fitted to what it sees, and what is shared as it was, bit by bit."""
        first, second = (np.asarray(kernel, dtype=np.float64) for kernel in kernels)
        own = [~mask for mask in self._shared(first.shape, second.shape)]
        fitted = least_squares([seen], [(first, second)], own)
        return fitted[0]

    def _reshared(
        self, seen: Sequence[SeenKernel], made: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """All layers with what they share fitted to all of them."""
        return least_squares(seen, made, self._shared(made[0][0].shape, made[0][1].shape))

    @abstractmethod
    def shared(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Which ranks of the first and of the second stage are shared."""

    def _shared(self, first: tuple[int, ...], second: tuple[int, ...]) -> list[np.ndarray]:
        rows, columns = self.shared(first[0])
        return [rows.reshape(-1, *(1,) * (len(first) - 1)), columns.reshape(1, -1, *(1,) * (len(second) - 2))]

    @abstractmethod
    def with_norm(self, first: np.ndarray, second: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
        """The kernels of a layer whose norm is `norm`, which goes into what is not shared."""


class JointLeft(JointSVD):
    """LJSVD: one first stage for all layers, a second stage of its own for each.

    Examples
    --------
    >>> [s.shared for s in JointLeft().chain([ConvSpec((8, 6, 3, 3))] * 2, (4,))[1]]
    ['left', None]
    """

    name = "joint_left"

    def objection(self, specs: Sequence[ConvSpec]) -> str | None:
        same = len({spec.weight_shape[1] for spec in specs}) == 1
        return None if same else "its layers differ in their input channels, and share no first stage"

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        sizes = [_sizes(spec) for spec in specs]
        return (min(sizes[0][1], sum(rows for rows, _ in sizes)),)

    def joined(self, specs: Sequence[ConvSpec], rank: int) -> tuple[Chain, ...]:
        return tuple((Stage(_stages(s, rank)[0], LEFT), Stage(_stages(s, rank)[1])) for s in specs)

    def errors_of(self, matrices: Sequence[np.ndarray], ranks: Sequence[int]) -> np.ndarray:
        return tail_energy(singular_values(np.concatenate(matrices)))[list(ranks)]

    def factors(self, matrices: Sequence[np.ndarray], rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        shared = _leading(sum(m.T @ m for m in matrices), rank).T
        return [(m @ shared.T, shared) for m in matrices]

    def shared(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(rank, bool), np.zeros(rank, bool)

    def with_norm(self, first: np.ndarray, second: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
        return first, second * norm


class JointRight(JointSVD):
    """RJSVD: a first stage of its own for each layer, one second stage for all.

    Layers may differ in their input channels: with the half as wide first layer of a stage among them this is the paper's
    RJSVD-1, without it RJSVD-2.

    Examples
    --------
    >>> [s.shared for s in JointRight().chain([ConvSpec((8, 6, 3, 3)), ConvSpec((8, 3, 3, 3))], (4,))[1]]
    [None, 'right']
    """

    name = "joint_right"

    def objection(self, specs: Sequence[ConvSpec]) -> str | None:
        same = len({spec.weight_shape[0] for spec in specs}) == 1
        return None if same else "its layers differ in their output channels, and share no second stage"

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        sizes = [_sizes(spec) for spec in specs]
        return (min(sizes[0][0], sum(columns for _, columns in sizes)),)

    def joined(self, specs: Sequence[ConvSpec], rank: int) -> tuple[Chain, ...]:
        return tuple((Stage(_stages(s, rank)[0]), Stage(_stages(s, rank)[1], RIGHT)) for s in specs)

    def errors_of(self, matrices: Sequence[np.ndarray], ranks: Sequence[int]) -> np.ndarray:
        return tail_energy(singular_values(np.concatenate(matrices, axis=1)))[list(ranks)]

    def factors(self, matrices: Sequence[np.ndarray], rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        shared = _leading(sum(m @ m.T for m in matrices), rank)
        return [(shared, shared.T @ m) for m in matrices]

    def shared(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(rank, bool), np.ones(rank, bool)

    def with_norm(self, first: np.ndarray, second: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
        return first * norm, second


class JointBoth(JointSVD):
    """Bi-JSVD: ``W_i ~ L_i R + L R_i`` with R and L shared: an LJSVD and an RJSVD of what the other leaves, in turn.

    Each half is optimal given the other, so that the error never rises. The terms need no branches: kernels are
    joined along the rank, the shared part with the layer's own. The rank is that of both together; the first
    half has the odd one.

    Examples
    --------
    >>> chain = JointBoth().chain([ConvSpec((8, 6, 3, 3))] * 2, (5,))[0]
    >>> [(stage.spec.weight_shape, [(part.ranks, part.shared) for part in stage.parts]) for stage in chain]
    [((5, 6, 3, 1), [(3, 'left'), (2, None)]), ((8, 5, 1, 3), [(3, None), (2, 'right')])]
    """

    name = "joint_both"

    def objection(self, specs: Sequence[ConvSpec]) -> str | None:
        if not specs[0].ndim:
            return "products are not joined on both sides: use joint_left or joint_right"
        same = len({spec.weight_shape for spec in specs}) == 1
        return None if same else "its layers differ in their channels"

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        rows, columns = _sizes(specs[0])
        return (2 * min(columns, rows * len(specs)),)

    def joined(self, specs: Sequence[ConvSpec], rank: int) -> tuple[Chain, ...]:
        left, right = _halves(rank)
        first = ((left, LEFT), (right, None))
        second = ((left, None), (right, RIGHT))
        chains = []
        for spec in specs:
            stages = zip(_stages(spec, rank), (first, second), strict=True)
            chains.append(
                tuple(
                    Stage(stage, parts=tuple(Part(ranks, tag, axis) for ranks, tag in parts if ranks))
                    for axis, (stage, parts) in enumerate(stages)
                )
            )
        return tuple(chains)

    def errors_of(self, matrices: Sequence[np.ndarray], ranks: Sequence[int]) -> np.ndarray:
        def reached(rank: int) -> float:
            made = self._alternated(matrices, rank, FEW)[0]
            return float(np.mean([squared_norm(m - a @ b) for m, (a, b) in zip(matrices, made, strict=True)]))

        return interpolated_errors(reached, ranks)

    def factors(self, matrices: Sequence[np.ndarray], rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return self._alternated(matrices, rank, ALTERNATIONS)[0]

    def objective(self, weights: Sequence[np.ndarray], rank: int, alternations: int) -> list[float]:
        """Mean squared relative error after each alternation."""
        return self._alternated(_unit(weights)[0], rank, alternations)[1]

    def _alternated(
        self, matrices: Sequence[np.ndarray], rank: int, alternations: int
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[float]]:
        left_rank, right_rank = _halves(rank)
        right = [np.zeros_like(m) for m in matrices]
        by_left: list[tuple[np.ndarray, np.ndarray]] = []
        by_right: list[tuple[np.ndarray, np.ndarray]] = []
        trace: list[float] = []
        for _ in range(alternations):
            by_left = JointLeft().factors([m - r for m, r in zip(matrices, right, strict=True)], left_rank)
            left = [a @ b for a, b in by_left]
            by_right = JointRight().factors([m - part for m, part in zip(matrices, left, strict=True)], right_rank)
            right = [a @ b for a, b in by_right]
            missed = [squared_norm(m - a - b) for m, a, b in zip(matrices, left, right, strict=True)]
            trace.append(float(np.mean(missed)))
            if len(trace) > 1 and trace[-2] - trace[-1] < 1e-12:
                break
        joined = [
            (np.concatenate([a, c], axis=1), np.concatenate([b, d]))
            for (a, b), (c, d) in zip(by_left, by_right, strict=True)
        ]
        return joined, trace

    def shared(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        left = np.arange(rank) < _halves(rank)[0]
        return left, ~left

    def with_norm(self, first: np.ndarray, second: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
        left, _ = _halves(len(first))
        first, second = first.copy(), second.copy()
        first[left:] *= norm
        second[:, :left] *= norm
        return first, second


def _seen(weights: Sequence[np.ndarray], statistics: Sequence[LayerStatistics]) -> list[SeenKernel]:
    return [SeenKernel(weight, stats.covariance) for weight, stats in zip(weights, statistics, strict=True)]


def _halves(rank: int) -> tuple[int, int]:
    return rank - rank // 2, rank // 2


def _common(spec: ConvSpec) -> tuple[object, ...]:
    return spec.kernel, spec.group, spec.transposed


def _sizes(spec: ConvSpec) -> tuple[int, int]:
    """Rows and columns of the matrix."""
    columns = spec.weight_shape[1] * (spec.kernel[0] if spec.ndim else 1)
    return spec.params // columns, columns


def _stages(spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
    out, inner = spec.weight_shape[:2]
    return spec.stage(rank, inner, range(min(spec.ndim, 1))), spec.stage(out, rank, range(1, spec.ndim))


def _matrix(weight: np.ndarray) -> np.ndarray:
    """(O, I, kh, kw...) -> (O*kw..., I*kh), and (O, I) as it is."""
    if weight.ndim == 2:
        return weight
    rows = np.moveaxis(weight, (1, 2), (-2, -1))  # (O, I, kh, kw...) -> (O, kw..., I, kh)
    return rows.reshape(-1, weight.shape[1] * weight.shape[2])


def _first(right: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(r, I*kh) -> (r, I, kh, 1...)."""
    return right.reshape(-1, shape[1], *shape[2:3], *(1,) * (len(shape) - 3))


def _second(left: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(O*kw..., r) -> (O, r, 1, kw...)."""
    rows = left.reshape(shape[0], *shape[3:], left.shape[1])
    kernel = np.moveaxis(rows, -1, 1)  # (O, kw..., r) -> (O, r, kw...)
    return kernel[:, :, None] if len(shape) > 2 else kernel


def _unit(weights: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """Matrices of unit norm, and their norms; zeros stay zeros."""
    matrices = [np.asarray(_matrix(weight), dtype=np.float64) for weight in weights]
    norms = [float(np.sqrt(squared_norm(m))) or 1.0 for m in matrices]
    return [m / norm for m, norm in zip(matrices, norms, strict=True)], norms


def _leading(moment: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors (n, rank) of the largest eigenvalues; zeros beyond their number."""
    vectors = fix_signs(np.linalg.eigh(moment)[1][:, ::-1][:, :rank])
    return np.pad(vectors, [(0, 0), (0, rank - vectors.shape[1])])

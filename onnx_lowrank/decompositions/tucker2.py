"""``tucker2``: low rank in the output and the input channels, the kernel in between kept whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.decompositions.matrix import is_pointwise, pointwise
from onnx_lowrank.linalg import leading_basis, mode_dot, squared_norm, unfold
from onnx_lowrank.types import Chain, ConvSpec, Factorization, LayerStatistics, Rank, Stage


@dataclass(frozen=True)
class Tucker2:
    """1x1 to r_in, the kernel to r_out, 1x1 to O. The rank is ``(r_out, r_in)``.

    Started from the higher-order SVD and refined by orthogonal iterations (HOOI), each of which is optimal
    given the other mode, so that the error never rises.

    Parameters
    ----------
    iterations
        Most HOOI sweeps over both modes.
    tolerance
        Stop when a sweep lowers the squared relative error by less than this.

    References
    ----------
    De Lathauwer, De Moor & Vandewalle (2000), "On the best rank-1 and rank-(R1, ..., RN) approximation",
    algorithm 4.2. Kim, Park, Yoo, Choi, Yang & Shin (2016), "Compression of deep convolutional neural networks
    for fast and low power mobile applications", section 3.

    Examples
    --------
    >>> [s.spec.weight_shape for s in Tucker2().chain([ConvSpec((64, 32, 3, 3))], (16, 8))[0]]
    [(8, 32, 1, 1), (16, 8, 3, 3), (64, 16, 1, 1)]
    """

    iterations: int = 20
    tolerance: float = 1e-7

    name = "tucker2"

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        return "its kernel is pointwise: svd says the same with one stage fewer" if is_pointwise(specs[0]) else None

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        out, inner = specs[0].weight_shape[:2]
        positions = int(np.prod(specs[0].kernel))
        return min(out, inner * positions), min(inner, out * positions)

    def chain(self, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
        spec, (r_out, r_in) = specs[0], rank
        out, inner = spec.weight_shape[:2]
        core = spec.stage(r_out, r_in, range(spec.ndim))
        return ((Stage(spec.stage(r_in, inner)), Stage(core), Stage(spec.stage(out, r_out))),)

    def errors(self, weights: Sequence[np.ndarray], ranks: Sequence[Rank]) -> np.ndarray:
        """Error of the higher-order SVD, for all pairs at once: an upper bound that HOOI lowers a little.

        The bases of the full HOSVD are orthonormal, so the energy of a truncation is the energy of the
        corner of the core that it keeps: a two-dimensional cumulative sum.
        """
        weight = np.asarray(weights[0], dtype=np.float64)
        core = weight
        for mode in (0, 1):
            core = mode_dot(core, leading_basis(unfold(weight, mode), weight.shape[mode]).T, mode)
        kept = np.square(core).sum(axis=tuple(range(2, core.ndim))).cumsum(axis=0).cumsum(axis=1)
        total = kept[-1, -1]
        if total == 0:
            return np.zeros(len(ranks))
        return np.array([max(0.0, 1.0 - kept[r_out - 1, r_in - 1] / total) for r_out, r_in in ranks])

    def estimate_rank(self, weights: Sequence[np.ndarray], estimator: Callable[[np.ndarray], int]) -> Rank:
        return estimator(unfold(weights[0], 0)), estimator(unfold(weights[0], 1))

    def factorize(
        self,
        weights: Sequence[np.ndarray],
        rank: Rank,
        statistics: Sequence[LayerStatistics] | None = None,
        *,
        rng: np.random.Generator,
    ) -> Factorization:
        weight = np.asarray(weights[0], dtype=np.float64)
        r_out, r_in = rank
        total = squared_norm(weight) or 1.0
        basis_in = leading_basis(unfold(weight, 1), r_in)
        previous, converged = np.inf, False
        for _ in range(self.iterations):
            basis_out = leading_basis(unfold(mode_dot(weight, basis_in.T, 1), 0), r_out)
            reduced = mode_dot(weight, basis_out.T, 0)
            basis_in = leading_basis(unfold(reduced, 1), r_in)
            core = mode_dot(reduced, basis_in.T, 1)
            error = max(0.0, 1.0 - squared_norm(core) / total)
            if previous - error < self.tolerance:
                converged = True
                break
            previous = error
        residual = weight - mode_dot(mode_dot(core, basis_out, 0), basis_in, 1)
        ndim = weight.ndim - 2
        return Factorization(
            ((pointwise(basis_in.T, ndim), core, pointwise(basis_out, ndim)),),
            float(np.sqrt(squared_norm(residual) / total)),
            converged,
            "" if converged else f"the error still fell after {self.iterations} sweeps: more of them, or a higher rank",
        )

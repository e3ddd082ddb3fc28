"""``tucker2``: low rank in the output and the input channels, the kernel in between kept whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.decompositions.matrix import is_pointwise, pointwise
from onnx_lowrank.decompositions.weighted import (
    SHORT,
    fit_first_stage,
    interpolated_errors,
    iterations_of,
    output_spectrum,
)
from onnx_lowrank.linalg import fix_signs, leading_basis, mode_dot, squared_norm, unfold
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

    def errors(
        self,
        weights: Sequence[np.ndarray],
        ranks: Sequence[Rank],
        statistics: Sequence[LayerStatistics] | None = None,
    ) -> np.ndarray:
        """Error of the higher-order SVD, for all pairs at once: an upper bound that HOOI lowers a little.

        The bases of the full HOSVD are orthonormal, so the energy of a truncation is the energy of the
        corner of the core that it keeps: a two-dimensional cumulative sum.
        """
        weight = np.asarray(weights[0], dtype=np.float64)
        if statistics is not None:
            return self._weighted_errors(weight, statistics[0], ranks)
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
        start: Sequence[Sequence[np.ndarray]] | None = None,
        draft: bool = False,
    ) -> Factorization:
        weight = np.asarray(weights[0], dtype=np.float64)
        r_out, r_in = rank
        if statistics is not None:
            begin = None if start is None else start[0][0]
            return self._weighted_fit(
                weight, statistics[0].covariance, rank, iterations_of(start, draft, weight[0].size), begin
            )
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

    def _weighted_errors(self, weight: np.ndarray, seen: LayerStatistics, ranks: Sequence[Rank]) -> np.ndarray:
        """Of the output: for some r_in the input stage is fitted, and the spectrum after it tells every r_out."""
        moment = seen.covariance
        total = seen.output_energy(weight.reshape(len(weight), -1)) or 1.0
        tails: dict[int, np.ndarray] = {}

        def fit(r_in: int) -> float:
            stage, found = fit_first_stage(weight, moment, r_in, SHORT)
            dense = mode_dot(found.outer.reshape(len(weight), r_in, *weight.shape[2:]), stage.T, 1)
            dense = dense.reshape(len(weight), -1)
            energies = output_spectrum(dense @ moment @ dense.T)
            tails[r_in] = np.append(np.cumsum(energies[::-1])[::-1], 0.0) / total
            return found.error

        inner = interpolated_errors(fit, [r_in for _, r_in in ranks])
        fitted = np.array(sorted(tails))
        nearest = [int(fitted[np.abs(fitted - r_in).argmin()]) for _, r_in in ranks]
        outer = [tails[near][min(r_out, len(weight))] for (r_out, _), near in zip(ranks, nearest, strict=True)]
        return inner + np.array(outer)

    def _weighted_fit(
        self, weight: np.ndarray, moment: np.ndarray, rank: Rank, iterations: int, start: np.ndarray | None
    ) -> Factorization:
        r_out, r_in = rank
        stage, fit = fit_first_stage(weight, moment, r_in, iterations, r_out, start)
        ndim = weight.ndim - 2
        # the restricted last factor has rank r_out: an orthonormal basis of its columns, and what goes before it
        basis = np.linalg.svd(fit.outer, full_matrices=False)[0][:, :r_out]
        last = np.zeros((len(weight), r_out))
        last[:, : basis.shape[1]] = fix_signs(basis)
        core = (last.T @ fit.outer).reshape(r_out, r_in, *weight.shape[2:])
        return Factorization(((pointwise(stage, ndim), core, pointwise(last, ndim)),), float(np.sqrt(fit.error)))

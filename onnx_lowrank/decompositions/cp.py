"""``cp3`` and ``cp4``: a kernel as a sum of rank-one terms, written as a chain with depthwise stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_lowrank.decompositions.cp_algebra import Factors, balance, component_norms, relative_residual
from onnx_lowrank.decompositions.cp_algorithms import EXACT, Fit, als, error_preserving_correction, tensor_power
from onnx_lowrank.decompositions.cp_starts import (
    OrthogonalTerms,
    compress,
    full_rank,
    generic_rank,
    orthogonal_terms,
    pencil_start,
)
from onnx_lowrank.decompositions.matrix import is_pointwise, pointwise
from onnx_lowrank.decompositions.weighted import (
    SHORT,
    RankOneMap,
    WeightedFit,
    block_mean,
    interpolated_errors,
    iterations_of,
    root_and_inverse,
    variable_projection,
)
from onnx_lowrank.linalg import squared_norm, unfold, unit_columns
from onnx_lowrank.types import Chain, ConvSpec, Factorization, LayerStatistics, LowRankError, Rank, Stage

ALGORITHMS = ("als", "tpm", "tpm+als")
COMBINE: dict[str, Callable[[int, int], int]] = {
    "max": max,
    "min": min,
    "mean": lambda a, b: (a + b + 1) // 2,
    "sum": lambda a, b: a + b,
}
POOR = 0.95
"""A fit above this share of its closed-form start's error got nowhere: the start was next to a stationary point."""
CHEAP = 1_000_000
"""Multiplications for a large product of a sweep (rank times entries) under which starts cost next to nothing."""
START = 6
"""Sweeps of ALS before a weighted fit."""
PENALTY = 3e-4
"""Of the output energies of single terms, in weighted fits: with it they reach lower errors than without, by terms a fifth as large."""
SWEEPS, TYPICAL = 6, 30
"""Sweeps of the fits that calibrate a prediction, and those to which they are extrapolated."""


@dataclass(frozen=True)
class CP3:
    """1x1 to r channels, a depthwise kernel over all spatial axes, 1x1 to O: a CP of the (O, k, I) tensor.

    Parameters
    ----------
    algorithm
        ``als``: alternating least squares from the closed-form start. ``tpm``: tensor power method, one component at
        a time. ``tpm+als``: the second, refined by the first.
    iterations
        Most sweeps of ALS, and most power iterations for a component.
    tolerance
        ALS stops when a sweep lowers the relative error by less than this share of it; a power iteration, when it
        raises the component's norm by less than a hundredth of that.
    starts
        Random starts that ALS tries beside the closed form, as long as the fit is poor or degenerate, and for small
        layers always (there the best is also taken to a tenth of the tolerance). Elsewhere they are not worth their time:
        for kernels of 64 x 64 x 9 with power-law spectra the best of six starts is 1 or 2 % better than the first, for
        16 x 16 x 9 up to 10 %.
    ridge
        Weight of the squared component norms in ALS where they reach `norm_limit`, relative to the squared error; it
        grows with their square.
    norm_limit
        Sum of squared component norms over the kernel's above which a fit is degenerate: it is corrected at the
        same error, and reported where that does not help. The rounding of an fp16 or INT8 chain grows with its root.
    combine
        How `estimate_rank` joins the ranks of the two channel modes: ``max``, ``min``, ``mean`` or ``sum``.

    References
    ----------
    Lebedev, Ganin, Rakhuba, Oseledets & Lempitsky (2015), "Speeding-up convolutional neural networks using fine-tuned
    CP-decomposition", section 3; Astrid & Lee (2017), "CP-decomposition with tensor power method for convolutional
    neural networks compression", section III.

    Examples
    --------
    >>> [s.spec.weight_shape for s in CP3().chain([ConvSpec((64, 32, 3, 3))], (48,))[0]]
    [(48, 32, 1, 1), (48, 1, 3, 3), (64, 48, 1, 1)]
    """

    algorithm: str = "als"
    iterations: int = 150
    tolerance: float = 5e-4
    starts: int = 8
    ridge: float = 0.05
    norm_limit: float = 10.0
    combine: str = "max"

    name = "cp3"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("algorithm", self.algorithm, ALGORITHMS),
            ("combine", self.combine, tuple(COMBINE)),
        ):
            if value not in known:
                raise LowRankError(f"CP {field} {value!r}: one of {', '.join(known)} was expected")
        if self.iterations < 1:
            raise LowRankError(f"CP iterations {self.iterations}: at least 1 was expected")

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        return "its kernel is pointwise: svd says the same with one stage fewer" if is_pointwise(specs[0]) else None

    def axes(self, kernel: tuple[int, ...]) -> list[list[int]]:
        """Spatial axes that each depthwise stage spans, which are one mode of the tensor."""
        return [list(range(len(kernel)))]

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        """The rank at which the closed-form start is complete; CP itself may be exact sooner."""
        return (full_rank(self._shape(specs[0].weight_shape)),)

    def chain(self, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
        spec, (r,) = specs[0], rank
        depthwise = [Stage(spec.stage(r, 1, axes, group=r)) for axes in self.axes(spec.kernel)]
        return ((Stage(spec.stage(r, spec.weight_shape[1])), *depthwise, Stage(spec.stage(spec.weight_shape[0], r))),)

    def errors(
        self,
        weights: Sequence[np.ndarray],
        ranks: Sequence[Rank],
        statistics: Sequence[LayerStatistics] | None = None,
    ) -> np.ndarray:
        """Squared error of the closed-form start for every rank, times what ALS is seen to gain on it.

        The terms of the start are orthogonal, so its error is the tail of their sorted energies: a bound for all
        ranks at once. ALS at a rank lowers it by a factor that changes slowly with the rank; :func:`predict` finds
        it at two ranks by short fits.
        """
        if statistics is not None:
            return interpolated_errors(
                lambda r: self._weighted(weights[0], statistics[0].covariance, r, SHORT)[1].error, [r for (r,) in ranks]
            )
        predicted = predict(self._tensor(weights[0]), ridge=self.ridge)
        return predicted[np.minimum([rank[0] for rank in ranks], len(predicted) - 1)]

    def estimate_rank(self, weights: Sequence[np.ndarray], estimator: Callable[[np.ndarray], int]) -> Rank:
        """The larger of the estimates for the unfoldings along the output and the input channels.

        A CP of rank r has multilinear ranks of at most r, so no smaller number can hold both. `combine` selects another.
        """
        rank = COMBINE[self.combine](estimator(unfold(weights[0], 0)), estimator(unfold(weights[0], 1)))
        return (min(rank, full_rank(self._shape(weights[0].shape))),)

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
        """Kernels of `rank`, balanced: every stage carries an equal root of each component's weight."""
        if statistics is not None:
            factors, weighted = self._weighted(
                weights[0],
                statistics[0].covariance,
                rank[0],
                iterations_of(start, draft, weights[0][0].size),
                None if start is None else start[0],
            )
            return Factorization((self._kernels(balance(factors), weights[0].shape),), math.sqrt(weighted.error))
        weight, (r,) = weights[0], rank
        tensor = self._tensor(weight)
        norm = math.sqrt(squared_norm(tensor))
        if norm == 0:
            return Factorization((self._kernels([np.zeros((n, r)) for n in tensor.shape], weight.shape),), 0.0)
        fit, next_step = self._fit(tensor / norm, r, rng)
        factors = balance((fit.factors[0] * norm, *fit.factors[1:]))
        kernels = self._kernels(factors, weight.shape)
        return Factorization((kernels,), fit.relative_error, not next_step, next_step)

    def _weighted(
        self,
        weight: np.ndarray,
        moment: np.ndarray,
        rank: int,
        iterations: int,
        begin: Sequence[np.ndarray] | None = None,
    ) -> tuple[Factors, WeightedFit]:
        """Factors of the fit of least output error, going on from kernels or from ALS sweeps in whitened channels."""
        tensor = self._tensor(weight)
        out, *small, inner = tensor.shape
        target = np.asarray(weight, dtype=np.float64).reshape(out, -1)  # patches are (I, k...)
        root, unwhiten = root_and_inverse(block_mean(moment, inner, math.prod(small), keep="outer"))
        if begin is None:
            core, bases = compress(tensor @ root)
            begun = als(core, _best_terms(core, rank).factors(rank), iterations=START, tolerance=0.0, ridge=self.ridge)
            _, *taps, channels = (unit_columns(basis @ f) for basis, f in zip(bases, begun.factors, strict=True))
        else:
            channels = unit_columns(root @ begin[0].reshape(rank, inner).T)
            taps = [unit_columns(kernel.reshape(rank, -1).T) for kernel in begin[1:-1]]
        mapped = RankOneMap(unwhiten, tuple(small))
        start = np.concatenate([channels.T, *(tap.T for tap in taps)], axis=1)
        found = variable_projection(target, moment, mapped, start, iterations=iterations, penalty=PENALTY)
        stage, *depthwise = mapped.stages(found.parameters)
        return (found.outer, *(tap.T for tap in depthwise), stage.T), found

    def _fit(self, tensor: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[Fit, str]:
        """Best fit of a tensor of norm 1, and what to try where it is not to be trusted."""
        core, bases = compress(tensor)
        terms = _best_terms(core, rank)
        start = Fit(terms.factors(rank), math.sqrt(_error(terms, rank)))
        if start.relative_error < EXACT:
            fit = start
        elif self.algorithm == "als":
            fit = self._fit_als(core, start, rng)
        else:
            fit = tensor_power(core, rank, iterations=self.iterations, tolerance=self.tolerance / 100)
            if self.algorithm == "tpm+als":
                fit = min(fit, self._als(core, fit.factors), key=lambda f: f.relative_error)
        if self._degenerate(fit):
            fit = error_preserving_correction(core, fit)
        next_step = ""
        if self._degenerate(fit):
            next_step = (
                f"its components cancel each other (squared norms {_norm(fit):.3g} times the kernel's): "
                "another rank, or algorithm tpm"
            )
        elif not fit.converged:
            next_step = f"the error still fell after {self.iterations} iterations: more of them, or a higher rank"
        factors = tuple(basis @ factor for basis, factor in zip(bases, fit.factors, strict=True))
        return Fit(factors, relative_residual(tensor, factors), fit.converged), next_step

    def _fit_als(self, core: np.ndarray, start: Fit, rng: np.random.Generator) -> Fit:
        """ALS from the closed form, from random starts where that leads nowhere good; never worse than the start."""
        rank = start.factors[0].shape[1]
        pencil = pencil_start(core, rank)
        fits = [self._als(core, start.factors if pencil is None else pencil)]
        cheap = rank * core.size < CHEAP
        while len(fits) <= self.starts and (
            self._degenerate(fits[-1]) or fits[-1].relative_error > (EXACT if cheap else POOR * start.relative_error)
        ):
            fits.append(self._als(core, [rng.standard_normal((n, rank)) for n in core.shape]))
        # a degenerate fit must be better by as much as its norm is beyond the limit
        best = min(fits, key=lambda fit: fit.relative_error * max(1.0, _norm(fit) / self.norm_limit))
        if cheap and best.relative_error > EXACT:
            finer = replace(self._als(core, best.factors, self.tolerance / 10), converged=best.converged)
            best = min(best, finer, key=lambda fit: fit.relative_error)
        return best if best.relative_error < start.relative_error else replace(start, converged=best.converged)

    def _als(self, core: np.ndarray, start: Sequence[np.ndarray], tolerance: float | None = None) -> Fit:
        return als(
            core,
            start,
            iterations=self.iterations,
            tolerance=self.tolerance if tolerance is None else tolerance,
            ridge=self.ridge,
            norm_limit=self.norm_limit,
        )

    def _degenerate(self, fit: Fit) -> bool:
        return _norm(fit) > self.norm_limit

    def _shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Modes of the tensor of a kernel: output channels, one for each depthwise stage, input channels."""
        out, inner, *kernel = weight_shape
        small = (math.prod(kernel[axis] for axis in axes) for axes in self.axes(tuple(kernel)))
        return (out, *small, inner)

    def _tensor(self, weight: np.ndarray) -> np.ndarray:
        moved = np.moveaxis(np.asarray(weight, dtype=np.float64), 1, -1)  # (O, I, k...) -> (O, k..., I)
        return np.ascontiguousarray(moved).reshape(self._shape(weight.shape))

    def _kernels(self, factors: Sequence[np.ndarray], weight_shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        kernel = weight_shape[2:]
        depthwise = [
            factor.T.reshape(-1, 1, *(size if axis in axes else 1 for axis, size in enumerate(kernel)))
            for factor, axes in zip(factors[1:-1], self.axes(kernel), strict=True)
        ]
        return pointwise(factors[-1].T, len(kernel)), *depthwise, pointwise(factors[0], len(kernel))


class CP4(CP3):
    """1x1 to r channels, a depthwise kernel for each spatial axis in turn, 1x1 to O: a CP of (O, k1, k2, ..., I).

    Axes along which the kernel has size 1 belong to the first depthwise stage, which keeps their strides.

    Examples
    --------
    >>> [s.spec.weight_shape for s in CP4().chain([ConvSpec((64, 32, 3, 5))], (48,))[0]]
    [(48, 32, 1, 1), (48, 1, 3, 1), (48, 1, 1, 5), (64, 48, 1, 1)]
    """

    name = "cp4"

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        if sum(size > 1 for size in specs[0].kernel) < 2:
            return "its kernel has no second spatial axis to split off: cp3 says the same with one stage fewer"
        return None

    def axes(self, kernel: tuple[int, ...]) -> list[list[int]]:
        first, *others = [axis for axis, size in enumerate(kernel) if size > 1]
        flat = [axis for axis, size in enumerate(kernel) if size == 1]
        return [sorted([first, *flat]), *([axis] for axis in others)]


def predict(tensor: np.ndarray, *, ridge: float) -> np.ndarray:
    """Squared relative error of a CP fit of `tensor` (O, k..., I), for r = 0 .. full rank; not increasing.

    The bound of the closed-form start times a factor, which is 1 at rank 0 and measured at two more ranks, an eighth
    and a third of the generic rank: a few sweeps of ALS, extrapolated as a power of their number. Between these ranks
    its logarithm is linear in the logarithm of the rank. Beyond them it falls as ``(1 - x)^1.5``, `x` being the
    share of the generic rank, at which almost any tensor is matched. The power is a fit to kernels of
    several spectra, on which the prediction is 0.7 to 1.4 times the squared error at up to half of the generic rank,
    and 0.5 to 2.5 times up to 0.9 of it (down to 0.2 for the tensors that are nearly matrices).
    """
    core, _ = compress(tensor)
    if core.size == 0:
        return np.zeros(1)
    starts = [orthogonal_terms(core, fixed) for fixed in (0, -1)]
    length = min(len(terms.errors) for terms in starts)
    bound = np.min([terms.errors[:length] for terms in starts], axis=0)
    ranks = np.arange(length)
    generic = generic_rank(core.shape)
    anchors, logs = [0], [0.0]
    for share in (1 / 8, 1 / 3):
        rank = max(1, round(share * generic))
        if anchors[-1] < rank < length and bound[rank] > EXACT**2:
            start = min(starts, key=lambda terms: _error(terms, rank)).factors(rank)
            history = als(core, start, iterations=SWEEPS, tolerance=0.0, ridge=ridge).history
            # error ~ sweeps^-p, from the sweeps at a third and at the end of the short fit
            early = history[min(SWEEPS // 3, len(history)) - 1]
            power = math.log(max(early, EXACT) / max(history[-1], EXACT)) / math.log(3)
            reached = history[-1] * (TYPICAL / SWEEPS) ** -power
            anchors.append(rank)
            logs.append(min(0.0, math.log(max(reached, EXACT) ** 2 / bound[rank])))
    factor = np.exp(np.interp(np.log1p(ranks), np.log1p(anchors), logs))
    left = np.maximum(1 - ranks / generic, 0.05)
    factor *= np.minimum(1.0, left / left[anchors[-1]]) ** 1.5
    return np.minimum.accumulate(bound * factor)


def _best_terms(core: np.ndarray, rank: int) -> OrthogonalTerms:
    """The closed form that is better at `rank`, of the two."""
    return min((orthogonal_terms(core, fixed) for fixed in (0, -1)), key=lambda terms: _error(terms, rank))


def _error(terms: OrthogonalTerms, rank: int) -> float:
    return float(terms.errors[min(rank, terms.energies.size)])


def _norm(fit: Fit) -> float:
    """Sum of the squared component norms of a fit of a tensor of norm 1."""
    return float(np.square(component_norms(fit.factors)).sum())

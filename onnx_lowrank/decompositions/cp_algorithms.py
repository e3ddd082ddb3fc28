"""Canonical polyadic (CP) approximation of a tensor of any number of modes: ``X ~ sum_r a_r (x) b_r (x) ... (x) z_r``.

A tensor comes with its two large modes first and last and its small ones between, ``(O, k..., I)`` for a kernel:
the two products that cost something are then one GEMM each, the first mode against all others. Factors are
matrices ``(n_mode, rank)``. The *norm* of a fit is the sum of its squared component norms over the squared norm of the
tensor: 1 where components are orthogonal, large where they cancel each other (a degenerate fit), and its square root
is how much a rounding of the components is amplified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.optimize

from onnx_lowrank.decompositions.cp_algebra import (
    EPS,
    Factors,
    component_norms,
    contract_first,
    hadamard,
    khatri_rao,
    mttkrp_first,
    mttkrp_rest,
    relative_residual,
    ridge_solve,
)
from onnx_lowrank.linalg import squared_norm, unfold, unit_columns

EXACT = 1e-12
"""Relative error at which a fit is exact: eps times the condition that its normal equations may have."""
CANCELLATION = 1e-10
"""Squared relative error under which ``|X|^2 - 2 <X, Y> + |Y|^2`` has fewer than six digits left."""
SINGLE = 1e-4
"""Squared relative error above which products with the tensor may be rounded to float32: a thousand times its eps."""
LARGE = 10_000_000
"""Multiplications of a product with the tensor below which float32 would not save time."""
HISTORY = 5
"""Sweeps that the extrapolation remembers, and over which progress is averaged."""


@dataclass(frozen=True)
class Fit:
    """Factors of a tensor and how far they got.

    Parameters
    ----------
    factors
        One for each mode, shape (n_mode, rank).
    relative_error
        ``||X - Y||_F / ||X||_F``, from the residual itself.
    converged
        False where the iterations ran out.
    history
        Relative error after each sweep (the best so far) or each component.
    """

    factors: Factors
    relative_error: float
    converged: bool = True
    history: tuple[float, ...] = field(default=(), repr=False)


def als(
    tensor: np.ndarray,
    start: Sequence[np.ndarray],
    *,
    iterations: int,
    tolerance: float,
    ridge: float,
    norm_limit: float = 10.0,
) -> Fit:
    """Alternating least squares with a ridge, extrapolated over its sweeps.

    Given the others, a factor solves the normal equations ``A (G + lambda I) = M``, with `G` the Hadamard product of
    the others' Gram matrices and `M` the matricised tensor times their Khatri-Rao product. The others have unit
    columns, so that the ridge penalises the sum of squared component norms. Its weight is `ridge` times the squared
    relative error reached, times the square of the norm over `norm_limit`. So it costs a benign fit next to nothing and
    vanishes on the way to an exact one, while it holds a degenerate fit, whose norm would grow as one over the squared
    error without end, near the limit.

    A sweep is two large GEMMs whatever the number of modes: `M` of the first mode, and the first mode contracted
    out, which serves all the others. Sweeps converge slowly (swamps); Anderson extrapolation over the last few reaches
    in a given number of them what takes plain sweeps two to three times as many. Where it raises the
    error, the plain sweep is taken instead and the history forgotten. Of a large tensor with a large error the two GEMMs are
    in float32; everything else, and the error returned, is in float64.

    Parameters
    ----------
    tensor
        Two or more modes, the large ones first and last.
    start
        Factors to start from.
    iterations
        Most sweeps.
    tolerance
        Converged when the relative error falls by less than this share of itself a sweep, averaged over five.
    ridge
        Weight of the squared component norms at the limit, relative to the squared error.
    norm_limit
        Norm (over that of the tensor) beyond which components count as cancelling each other.

    References
    ----------
    Kolda & Bader (2009), "Tensor decompositions and applications", figure 3.3. Phan, Tichavsky & Cichocki (2013),
    "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC", section III (shared contractions). Walker & Ni
    (2011), "Anderson acceleration for fixed-point iterations", eq. 2.1.
    """
    total = squared_norm(tensor)
    first, rest = start[0], [unit_columns(factor) for factor in start[1:]]
    # the given first factor belongs to the given scale of the others
    first = first * component_norms(start[1:])
    best: tuple[float, list[np.ndarray]] = (math.inf, [])
    plain: list[np.ndarray] | None = None
    memory = _Anderson()
    history: list[float] = []
    error, converged = math.inf, False
    weight = ridge * min(1.0, squared_norm(first) / (norm_limit * total)) ** 2
    single = tensor.astype(np.float32) if tensor.size * len(rest[0].T) > LARGE else tensor
    for sweep in range(iterations):
        source = single if error > SINGLE else tensor
        grams = [factor.T @ factor for factor in rest]
        product, gram = mttkrp_first(source, rest), hadamard(grams)
        if sweep == 0:
            error = min(1.0, _squared_error(total, product, first, gram * (first.T @ first)))
        previous = error
        first = ridge_solve(product, gram, weight * error)
        first_gram = first.T @ first
        norms = np.sqrt(np.diag(first_gram))
        weight = ridge * (float(norms @ norms) / (norm_limit * total)) ** 2
        error = _squared_error(total, product, first, gram * first_gram)
        if error < CANCELLATION:
            error = relative_residual(tensor, [first, *rest]) ** 2
        if error < best[0]:
            best = error, [first, *rest]
        history.append(math.sqrt(best[0]))
        if history[-1] < EXACT or _stalled(history, tolerance):
            converged = True
            break
        if plain is not None and error > previous:
            rest, plain, memory, error = plain, None, _Anderson(), previous
            continue
        before, rest = np.concatenate(rest), list(rest)
        partial = contract_first(source, unit_columns(first))
        norms[norms == 0] = 1.0
        gram = first_gram / np.outer(norms, norms)
        for mode in reversed(range(len(rest))):
            others = hadamard([gram, *grams[:mode], *grams[mode + 1 :]])
            rest[mode] = unit_columns(ridge_solve(mttkrp_rest(partial, rest, mode), others, weight * error))
            grams[mode] = rest[mode].T @ rest[mode]
        plain = rest
        cuts = np.cumsum([len(factor) for factor in rest])[:-1]
        rest = [unit_columns(factor) for factor in np.split(memory.next(before, np.concatenate(rest)), cuts)]
    factors = tuple(best[1])
    return Fit(factors, relative_residual(tensor, factors), converged, tuple(history))


def _stalled(history: Sequence[float], tolerance: float) -> bool:
    """True when the last sweeps lowered the error by less than `tolerance` of it each, on average."""
    return len(history) > HISTORY and history[-1 - HISTORY] - history[-1] < HISTORY * tolerance * history[-1]


def _squared_error(total: float, product: np.ndarray, factor: np.ndarray, gram: np.ndarray) -> float:
    """Squared relative error from the products of the normal equations, without forming the residual."""
    return max(0.0, (total - 2 * float(np.vdot(product, factor)) + float(gram.sum())) / total)


class _Anderson:
    """Anderson extrapolation of a fixed-point map over the last `HISTORY` differences."""

    def __init__(self) -> None:
        self.count = 0
        self.last: tuple[np.ndarray, np.ndarray] | None = None

    def next(self, argument: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Where to apply the map next, after it took `argument` to `value`."""
        step, flat = (value - argument).ravel(), value.ravel()
        if self.last is None:
            self.last = step, flat
            self.steps, self.values = np.zeros((HISTORY, flat.size)), np.zeros((HISTORY, flat.size))
            return value
        oldest = self.count % HISTORY
        self.steps[oldest], self.values[oldest] = step - self.last[0], flat - self.last[1]
        self.last, self.count = (step, flat), self.count + 1
        known = min(self.count, HISTORY)
        gram = self.steps[:known] @ self.steps[:known].T
        # without a ridge two nearly parallel differences would be given huge opposite weights
        gram += (1e-4 * np.trace(gram) + np.finfo(float).tiny) * np.eye(known)
        weights = np.linalg.solve(gram, self.steps[:known] @ step)
        return value - (weights @ self.values[:known]).reshape(value.shape)


def tensor_power(tensor: np.ndarray, rank: int, *, iterations: int, tolerance: float) -> Fit:
    """Greedy CP by the tensor power method: one component at a time by power iterations, then deflation.

    Each component starts from the strongest slice along the last mode and is iterated until its norm grows by less than
    `tolerance` of itself, at most `iterations` times. Components do not diverge: each takes its energy from what those
    before it left, so the error falls with every one, and its value after each of them is the history.

    References
    ----------
    Allen (2012), "Sparse higher-order principal components analysis", algorithm 1. Astrid & Lee (2017),
    "CP-decomposition with tensor power method for convolutional neural networks compression", section III.
    """
    residual = np.array(tensor, dtype=np.float64)
    flat = residual.reshape(len(residual), -1)
    factors = tuple(np.zeros((n, rank)) for n in tensor.shape)
    total, history, converged = squared_norm(tensor) or 1.0, [], True
    for r in range(rank):
        vectors, done = _strongest(residual, iterations, tolerance)
        converged &= done
        for factor, vector in zip(factors, vectors, strict=True):
            factor[:, r] = vector
        flat -= np.outer(vectors[0], khatri_rao([v[:, None] for v in vectors[1:]]))
        history.append(math.sqrt(squared_norm(residual) / total))
    return Fit(factors, relative_residual(tensor, factors), converged, tuple(history))


def _strongest(tensor: np.ndarray, iterations: int, tolerance: float) -> tuple[list[np.ndarray], bool]:
    """Rank-one approximation by power iterations: vectors, the first with the norm, and whether they converged."""
    flat = tensor.reshape(len(tensor), -1)
    slot = int(np.square(flat).sum(axis=0).reshape(-1, tensor.shape[-1]).sum(axis=0).argmax())
    strongest = tensor[..., slot]
    rest = [np.linalg.svd(unfold(strongest, mode), full_matrices=False)[0][:, 0] for mode in range(1, strongest.ndim)]
    rest.append(np.eye(tensor.shape[-1])[slot])
    norm = 0.0
    for _ in range(iterations):
        first = flat @ khatri_rao([v[:, None] for v in rest])[:, 0]
        previous, norm = norm, float(np.linalg.norm(first))
        if norm - previous <= tolerance * norm:
            return [first, *rest], True
        partial = (first @ flat).reshape(*tensor.shape[1:], 1)
        for mode in reversed(range(len(rest))):
            columns = [v[:, None] for v in rest]
            rest[mode] = unit_columns(mttkrp_rest(partial, columns, mode))[:, 0]
    return [flat @ khatri_rao([v[:, None] for v in rest])[:, 0], *rest], False


def error_preserving_correction(tensor: np.ndarray, fit: Fit, *, slack: float = 1e-3, sweeps: int = 20) -> Fit:
    """Smallest sum of squared component norms whose error is at most ``1 + slack`` times that of `fit`.

    With the others' columns at unit norm a factor's squared norm is that sum, and its update is a ridge
    regression. In the eigenbasis of the Gram matrix, with eigenvalues `w` and squared columns `b` of the rotated
    product, the squared error is ``|X|^2 - sum b (w + 2 lambda) / (w + lambda)^2``, increasing in lambda: the largest
    lambda within the bound is a one-dimensional root. Sweeps stop when they lower the sum by less than 1 %.

    References
    ----------
    Phan, Tichavsky & Cichocki (2019), "Error preserving correction: a method for CP decomposition at a target error
    bound", section III. Phan, Sobolev, Sozykin et al. (2020), "Stable low-rank tensor decomposition for compression
    of convolutional neural network", section 3.
    """
    total = squared_norm(tensor)
    bound = ((1 + slack) * fit.relative_error) ** 2
    if bound < CANCELLATION:  # the secular equation has no digits there; float32 kernels round at 1e-14
        return fit
    factors = list(fit.factors)
    norms = _squared_norms(factors)
    for _ in range(sweeps):
        for mode in (0, *reversed(range(1, len(factors)))):
            factors = _with_weights_on(factors, mode)
            others = factors[:mode] + factors[mode + 1 :]
            if mode == 0:
                product = mttkrp_first(tensor, others)
            else:
                if mode == len(factors) - 1:
                    partial = contract_first(tensor, factors[0])
                product = mttkrp_rest(partial, factors[1:], mode - 1)
            gram = hadamard([factor.T @ factor for factor in others])
            factors[mode] = _smallest_within(total, product, gram, bound, factors[mode])
        previous, norms = norms, _squared_norms(factors)
        if previous - norms < 1e-2 * previous:
            break
    return Fit(tuple(factors), relative_residual(tensor, factors), fit.converged, fit.history)


def _squared_norms(factors: Sequence[np.ndarray]) -> float:
    """Sum of the squared norms of the components."""
    return float(np.square(component_norms(factors)).sum())


def _with_weights_on(factors: Sequence[np.ndarray], mode: int) -> list[np.ndarray]:
    """The same components with unit columns everywhere but in `mode`."""
    weights = component_norms(factors)
    return [unit_columns(f) * (weights if i == mode else 1.0) for i, f in enumerate(factors)]


def _smallest_within(
    total: float, product: np.ndarray, gram: np.ndarray, bound: float, factor: np.ndarray
) -> np.ndarray:
    """The factor of least norm whose squared relative error is within `bound`; `factor` where rounding leaves none."""
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    rotated = product @ vectors
    energies = np.square(rotated).sum(axis=0) / total

    def excess(log_ridge: float) -> float:
        ridge = math.exp(log_ridge)
        return 1.0 - float((energies * (values + 2 * ridge) / (values + ridge) ** 2).sum()) - bound

    low, high = math.log(EPS * max(1.0, values[-1])), math.log(values[-1] + 1.0)
    while excess(high) < 0 and high < 40:
        high += 5.0
    if excess(low) >= 0 or excess(high) <= 0:
        return factor
    root = scipy.optimize.brentq(excess, low, high, xtol=1e-6)
    # a little inside the bound, so that the root's tolerance never puts the error beyond it
    return (rotated / (values + math.exp(root - 1e-5))) @ vectors.T

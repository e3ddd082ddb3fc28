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
from functools import reduce

import numpy as np
import scipy.optimize

from onnx_lowrank.linalg import leading_basis, mode_dot, squared_norm, tail_energy, unfold, unit_columns

Factors = tuple[np.ndarray, ...]

EPS = float(np.finfo(np.float64).eps)
EXACT = 1e-12
"""Relative error at which a fit is exact: eps times the condition that its normal equations may have."""
CANCELLATION = 1e-10
"""Squared relative error under which ``|X|^2 - 2 <X, Y> + |Y|^2`` has fewer than six digits left."""
SINGLE = 1e-4
"""Squared relative error above which products with the tensor may be rounded to float32: a thousand times its eps."""
LARGE = 10_000_000
"""Multiplications of a product with the tensor below which float32 would not save time."""
NEARLY = 1e-6
"""Relative error within which a tensor is taken to have a multilinear rank: well above rounding to float32."""
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


# --- algebra of factors -------------------------------------------------------------------------------------------


def khatri_rao(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Column-wise Kronecker product, shape (prod n, rank); the last factor's index runs fastest.

    Examples
    --------
    >>> khatri_rao([np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])]).ravel()
    array([3., 4., 6., 8.])
    """
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).reshape(-1, factor.shape[1])
    return product


def compose(factors: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor that `factors` stand for.

    Examples
    --------
    >>> compose([np.ones((2, 1)), np.ones((3, 1)), np.ones((4, 1))]).shape
    (2, 3, 4)
    """
    return (factors[0] @ khatri_rao(factors[1:]).T).reshape([len(factor) for factor in factors])


def component_norms(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Norm of each component, shape (rank,)."""
    return reduce(np.multiply, [np.linalg.norm(factor, axis=0) for factor in factors])


def balance(factors: Sequence[np.ndarray]) -> Factors:
    """The same components, sorted by weight, each weight spread over the modes as equal roots, with signs fixed.

    The entry of largest magnitude of every column is positive, but in the first mode, which carries the sign.
    """
    weights = component_norms(factors)
    order = np.argsort(-weights, kind="stable")
    share = weights ** (1 / len(factors))
    sign = np.ones(len(weights))
    balanced = []
    for factor in factors[1:]:
        flip = np.where(factor[np.abs(factor).argmax(axis=0), np.arange(len(weights))] < 0, -1.0, 1.0)
        sign = sign * flip
        balanced.append((unit_columns(factor) * (flip * share))[:, order])
    return ((unit_columns(factors[0]) * (sign * share))[:, order], *balanced)


def relative_residual(tensor: np.ndarray, factors: Sequence[np.ndarray]) -> float:
    """``||X - Y||_F / ||X||_F``, from the difference itself, one slice of the second mode at a time; 0 for ``X = 0``."""
    first, second, *rest = factors
    parts = (
        squared_norm(tensor[:, i].reshape(len(first), -1) - first @ khatri_rao([second[i : i + 1], *rest]).T)
        for i in range(len(second))
    )
    total = squared_norm(tensor)
    return math.sqrt(sum(parts) / total) if total > 0 else 0.0


def hadamard(grams: Sequence[np.ndarray]) -> np.ndarray:
    """Gram matrix of a Khatri-Rao product from those of its factors, shape (rank, rank), without forming the product."""
    return reduce(np.multiply, grams)


def mttkrp_first(tensor: np.ndarray, rest: Sequence[np.ndarray]) -> np.ndarray:
    """First unfolding times the Khatri-Rao product of the other factors, shape (n_first, rank), in float64.

    One GEMM in the tensor's dtype for each slice of the second mode, so that no more than a slice of the product exists
    at a time.
    """
    second, *others = (factor.astype(tensor.dtype, copy=False) for factor in rest)
    product = np.zeros((len(tensor), second.shape[1]))
    for i in range(len(second)):
        product += tensor[:, i].reshape(len(tensor), -1) @ khatri_rao([second[i : i + 1], *others])
    return product


def contract_first(tensor: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The first mode contracted with its factor, shape (n..., rank): what all other modes' updates share."""
    return (tensor.reshape(len(tensor), -1).T @ first.astype(tensor.dtype, copy=False)).reshape(*tensor.shape[1:], -1)


def mttkrp_rest(partial: np.ndarray, rest: Sequence[np.ndarray], mode: int) -> np.ndarray:
    """`partial` of :func:`contract_first` contracted with all factors of `rest` but that of `mode`, shape (n, rank)."""
    for axis in reversed(range(len(rest))):  # the large mode first: what is left is small
        if axis != mode:
            last = partial.ndim - 1
            kept = [i for i in range(last + 1) if i != axis]
            factor = rest[axis].astype(partial.dtype, copy=False)
            partial = np.einsum(partial, list(range(last + 1)), factor, [axis, last], kept)
    return partial.astype(np.float64, copy=False)


def ridge_solve(product: np.ndarray, gram: np.ndarray, ridge: float) -> np.ndarray:
    """``product (gram + ridge * mean diagonal * I)^-1``, by eigenvectors where elimination breaks down.

    By numpy's solver, not SciPy's Cholesky of half the operations: the two packages bring a BLAS each, and when
    calls alternate, as they would here, their idle threads spin against each other (measured on two cores: 2 to 14 times
    slower).
    """
    rank = len(gram)
    shift = (ridge + rank * EPS) * (float(np.trace(gram)) / rank or 1.0)
    try:
        solution = np.linalg.solve(gram + shift * np.eye(rank), product.T).T
    except np.linalg.LinAlgError:
        solution = np.full_like(product, np.nan)
    if not np.isfinite(solution).all():
        values, vectors = np.linalg.eigh(gram)
        kept = values > rank * EPS * values[-1]
        solution = (product @ vectors[:, kept] / (values[kept] + shift)) @ vectors[:, kept].T
    return solution


# --- exact compression and the closed-form start ------------------------------------------------------------------


def compress(tensor: np.ndarray) -> tuple[np.ndarray, Factors]:
    """Higher-order SVD without truncation: a core, and a basis (n_mode, m) for each mode, with ``m <= n_mode``.

    Only directions without energy (up to rounding) are dropped, so the core's CP is the tensor's (Carroll, Pruzansky
    & Kruskal 1980, CANDELINC). Truncating to the rank would be cheaper still, but a best CP of a tensor that is not
    exactly low-rank does not lie in its leading subspaces, and the ranks of interest exceed the large modes. In the
    core's coordinates the slices of the closed-form start are slices of an array.

    References
    ----------
    De Lathauwer, De Moor & Vandewalle (2000), "A multilinear singular value decomposition", theorem 2.
    """
    core, bases = tensor, []
    for mode in range(tensor.ndim):
        bases.append(leading_basis(unfold(tensor, mode), tensor.shape[mode]))
        core = mode_dot(core, bases[mode].T, mode)
    floor = 8 * EPS * math.sqrt(squared_norm(core))
    for mode in range(tensor.ndim):
        kept = np.linalg.norm(unfold(core, mode), axis=1) > floor
        core, bases[mode] = np.compress(kept, core, axis=mode), bases[mode][:, kept]
    return np.ascontiguousarray(core), tuple(bases)


@dataclass(frozen=True)
class OrthogonalTerms:
    """Rank-one terms that add up to a core and are orthogonal to each other, so that errors are tails of energies.

    Parameters
    ----------
    fixed
        The mode along which each term is one coordinate axis: the first (0) or the last (-1).
    energies
        Squared norm of the term of coordinate i, singular pair j and split l, shape (n_fixed, pairs, splits).
    other
        Vectors of the other large mode, with their norms, shape (n_fixed, n_other, pairs).
    small
        For each small mode, unit vectors, shape (n_fixed, pairs, splits, n_mode).
    split_weights
        Weight of each split of its pair, shape (n_fixed, pairs, splits).
    """

    fixed: int
    energies: np.ndarray
    other: np.ndarray
    small: Factors
    split_weights: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Squared relative error of the r largest terms, for r = 0 .. number of terms."""
        return tail_energy(np.sqrt(-np.sort(-self.energies, axis=None)))

    def factors(self, rank: int) -> Factors:
        """Factors of the `rank` largest terms; columns beyond the number of terms are zero."""
        largest = np.argsort(-self.energies, axis=None, kind="stable")[:rank]
        i, j, split = np.unravel_index(largest, self.energies.shape)
        axis = np.zeros((len(self.energies), rank))
        axis[i, np.arange(len(i))] = 1.0
        other = np.zeros((self.other.shape[1], rank))
        other[:, : len(i)] = (self.other[i, :, j] * self.split_weights[i, j, split][:, None]).T
        small = [np.zeros((vectors.shape[-1], rank)) for vectors in self.small]
        for factor, vectors in zip(small, self.small, strict=True):
            factor[:, : len(i)] = vectors[i, j, split].T
        return (axis, *small, other) if self.fixed == 0 else (other, *small, axis)


def orthogonal_terms(core: np.ndarray, fixed: int) -> OrthogonalTerms:
    """Closed-form CP: along every principal direction of the mode `fixed`, the SVD of the (other x small) slice.

    Terms of different slices have orthogonal vectors in `fixed`, terms of one slice in the small modes. With more
    than one small mode each singular vector is split by SVDs in turn, which keeps them orthogonal. The r largest terms
    of all are the start for rank r, and all of them together are the core.
    """
    slices = np.moveaxis(core, fixed, 0)  # (n_fixed, n_other, small...) or (n_fixed, small..., n_other)
    slices = slices if fixed else np.moveaxis(slices, -1, 1)
    n_fixed, n_other, *shape = slices.shape
    slices = slices.reshape(n_fixed, n_other, -1)
    positions = slices.shape[2]
    # one side of the pair is orthonormal from the Gram matrix of the short side, the other its exact projection
    if positions <= n_other:
        right = np.linalg.eigh(slices.transpose(0, 2, 1) @ slices)[1]
        left = slices @ right
    else:
        left = np.linalg.eigh(slices @ slices.transpose(0, 2, 1))[1]
        right = slices.transpose(0, 2, 1) @ left
        norms = np.linalg.norm(right, axis=1, keepdims=True)
        left, right = left * norms, right / np.where(norms == 0, 1.0, norms)
    pairs = left.shape[2]
    weights, small = _split(right.transpose(0, 2, 1).reshape(-1, *shape))
    weights = weights.reshape(n_fixed, pairs, -1)
    small = [vectors.reshape(*weights.shape, -1) for vectors in small]
    energies = np.square(left).sum(axis=1)[:, :, None] * np.square(weights)
    return OrthogonalTerms(fixed, energies, left, tuple(small), weights)


def _split(tensors: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each of `tensors` (t, k1, k2, ...) as orthogonal rank-one terms: weights (t, l), unit vectors (t, l, k) a mode."""
    count, first, *rest = tensors.shape
    if not rest:
        return np.ones((count, 1)), [tensors[:, None]]
    left, values, right = np.linalg.svd(tensors.reshape(count, first, -1), full_matrices=False)
    pairs = values.shape[1]
    weights, vectors = _split(right.reshape(count * pairs, *rest))
    splits = weights.shape[1]
    weights = (values[:, :, None] * weights.reshape(count, pairs, splits)).reshape(count, -1)
    firsts = np.repeat(left.transpose(0, 2, 1), splits, axis=1)
    return weights, [firsts, *(v.reshape(count, pairs * splits, -1) for v in vectors)]


def pencil_start(core: np.ndarray, rank: int) -> Factors | None:
    """CP by eigenvectors of a core of :func:`compress`, for a tensor whose CP rank is that of its large modes.

    Two mixtures of its slices, ``S = A diag(s) B^T`` and ``T = A diag(t) B^T``, share `A` and `B`: the eigenvectors `X` of
    ``S^-1 T`` are the inverse of ``B^T``, and ``S X`` is `A` up to scale. Exact where iterations are often caught by a
    local minimum. The rank is read off the large modes; columns beyond it are zero.

    Returns
    -------
    Factors with `rank` columns; None where the large modes need more, or where the result is not close to the core.

    References
    ----------
    Leurgans, Ross & Abel (1993), "A decomposition for three-way arrays", section 3.
    """
    first, *small, last = core.shape
    needed = [
        int((tail_energy(np.linalg.norm(unfold(core, mode), axis=1)) > NEARLY**2).sum()) for mode in (0, core.ndim - 1)
    ]
    own = max(needed)
    if own > min(rank, first, last) or math.prod(small) < 2:
        return None
    slices = core.reshape(first, -1, last)[:own, :, :own]
    one, two = np.moveaxis(mode_dot(slices, leading_basis(unfold(slices, 1), 2).T, 1), 1, 0)
    try:
        vectors = np.linalg.eig(np.linalg.solve(one, two))[1].real
        inverse = np.linalg.inv(vectors)
    except np.linalg.LinAlgError:
        return None
    by_one, by_two = one @ vectors, two @ vectors
    left = np.where(np.linalg.norm(by_one, axis=0) > np.linalg.norm(by_two, axis=0), by_one, by_two)
    left, right = unit_columns(left), unit_columns(inverse.T)
    product = np.einsum("akb,ar,br->kr", slices, left, right, optimize=True)
    positions = ridge_solve(product, (left.T @ left) * (right.T @ right), 0.0)
    spatial = [vectors[:, 0].T for vectors in _split(positions.T.reshape(own, *small))[1]]
    rest = [*spatial, np.pad(right, ((0, last - own), (0, 0)))]
    factors = [ridge_solve(mttkrp_first(core, rest), hadamard([f.T @ f for f in rest]), 0.0), *rest]
    close = relative_residual(core, factors) < math.sqrt(NEARLY)  # False for a nan, too
    return tuple(np.pad(factor, ((0, 0), (0, rank - own))) for factor in factors) if close else None


def full_rank(shape: Sequence[int]) -> int:
    """Number of terms after which the better closed form of a tensor of `shape` is complete.

    Examples
    --------
    >>> full_rank((64, 9, 3))
    27
    """
    first, *small, last = shape
    positions = math.prod(small)
    splits = 1
    for i in range(len(small) - 1):
        splits *= min(small[i], math.prod(small[i + 1 :]))
    return min(first * min(last, positions), last * min(first, positions)) * splits


def generic_rank(shape: Sequence[int]) -> float:
    """Rank at which a CP is expected to match almost any tensor of `shape`: as many parameters as entries.

    A tensor with one mode longer than the others can fill is a matrix, and needs that mode's rank.

    References
    ----------
    Catalisano, Geramita & Gimigliano (2008), "On the ideals of secant varieties to certain rational varieties",
    theorem 2.4 (the unbalanced case).

    Examples
    --------
    >>> generic_rank((8, 9, 8)), generic_rank((64, 9, 3))
    (25.04..., 27)
    """
    largest = max(shape)
    others = math.prod(shape) // largest
    free = sum(n - 1 for n in shape)
    unbalanced = largest > others - (free - (largest - 1))
    return min(largest, others) if unbalanced else math.prod(shape) / (free + 1)


# --- iterations ---------------------------------------------------------------------------------------------------


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

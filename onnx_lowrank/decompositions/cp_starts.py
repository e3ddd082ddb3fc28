"""What a CP approximation starts from: the core of a tensor, its orthogonal terms, a matrix pencil; and the ranks it may have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.decompositions.cp_algebra import (
    EPS,
    Factors,
    hadamard,
    mttkrp_first,
    relative_residual,
    ridge_solve,
)
from onnx_lowrank.linalg import leading_basis, mode_dot, squared_norm, tail_energy, unfold, unit_columns

NEARLY = 1e-6
"""Relative error within which a tensor is taken to have a multilinear rank: well above rounding to float32."""


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

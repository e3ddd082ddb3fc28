"""Unfolding, mode products and truncated singular value decompositions.

Everything goes through Gram matrices, in float64. A kernel is a long matrix (512 x 4608): the Gram matrix of
its short side and a symmetric eigensolver take a hundredth of the time of a full SVD. What squaring the
condition number costs does not matter here: a truncated factor is an orthonormal basis `U` (exact to eps,
however small the singular value), and the other factor is the projection ``U^T W``, so at full rank the
product is ``U U^T W = W`` to eps, and at lower rank only directions with a singular value below
``sqrt(eps) * s_max`` can be confused with each other, at a relative error of the matrix under 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg

CHUNK = 1 << 24
"""Elements converted to float64 at a time: 128 MiB, so that a float32 kernel is never held twice over."""


def unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """Mode-`mode` unfolding: rows are the mode's indices, columns the others in their order.

    Examples
    --------
    >>> unfold(np.arange(24).reshape(2, 3, 4), 1).shape
    (3, 8)
    """
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: np.ndarray, mode: int, shape: Sequence[int]) -> np.ndarray:
    """Inverse of :func:`unfold` for a tensor of `shape`."""
    rest = [n for axis, n in enumerate(shape) if axis != mode]
    return np.moveaxis(matrix.reshape(shape[mode], *rest), 0, mode)


def mode_dot(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """Product of `tensor` with `matrix` (p, n_mode) along `mode`.

    Examples
    --------
    >>> mode_dot(np.ones((2, 3, 4)), np.ones((5, 3)), 1).shape
    (2, 5, 4)
    """
    return np.moveaxis(np.tensordot(matrix, tensor, (1, mode)), 0, mode)


def squared_norm(array: np.ndarray) -> float:
    """Squared Frobenius norm, accumulated in float64."""
    flat = array.ravel(order="K")  # a transposed matrix as it lies, without a copy
    return float(sum(np.square(flat[i : i + CHUNK], dtype=np.float64).sum() for i in range(0, flat.size, CHUNK)))


def gram(matrix: np.ndarray) -> np.ndarray:
    """``A A^T`` in float64 of a matrix (m, n), in column chunks."""
    m, n = matrix.shape
    step = max(1, CHUNK // max(m, 1))
    total = np.zeros((m, m))
    for start in range(0, n, step):
        block = np.asarray(matrix[:, start : start + step], dtype=np.float64)
        total += block @ block.T
    return total


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Singular values of a matrix (m, n), descending, shape (min(m, n),), in float64.

    By the Gram matrix of the short side: values under ``sqrt(eps)`` of the largest are noise of that size.

    Examples
    --------
    >>> singular_values(np.diag([3.0, 4.0]))
    array([4., 3.])
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # overwrite_a: the Gram matrix is ours, and at 4096 rows a copy of it is 128 MiB
    values = scipy.linalg.eigvalsh(gram(short), overwrite_a=True, check_finite=False)
    return np.sqrt(np.maximum(values[::-1], 0.0))


def leading_basis(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` leading left singular vectors of a matrix (m, n) with m <= n or not, shape (m, rank).

    The sign of each column is fixed (its entry of largest magnitude is positive), so that the same matrix
    gives the same bytes whatever the solver's whim.
    """
    m = matrix.shape[0]
    subset = None if rank >= m else (m - rank, m - 1)
    _, vectors = scipy.linalg.eigh(gram(matrix), subset_by_index=subset, overwrite_a=True, check_finite=False)
    return fix_signs(vectors[:, ::-1])


def fix_signs(vectors: np.ndarray) -> np.ndarray:
    """Columns with the sign that makes their entry of largest magnitude positive."""
    pivot = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[pivot, np.arange(vectors.shape[1])])
    return vectors * np.where(signs == 0, 1.0, signs)


def unit_columns(factor: np.ndarray) -> np.ndarray:
    """Columns divided by their norms; a zero column stays zero."""
    norms = np.linalg.norm(factor, axis=0)
    return factor / np.where(norms == 0, 1.0, norms)


def truncated_svd(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Best approximation ``left @ right`` of rank `rank` (Eckart & Young 1936).

    Parameters
    ----------
    matrix
        Shape (m, n), any float dtype.
    rank
        From 1 to min(m, n).

    Returns
    -------
    left, right
        Shapes (m, rank) and (rank, n), float64. Each carries the square root of the singular values, so that
        neither overflows when it is stored in half precision.

    Examples
    --------
    >>> left, right = truncated_svd(np.outer([1.0, 2.0], [3.0, 4.0, 5.0]), 1)
    >>> bool(np.allclose(left @ right, np.outer([1.0, 2.0], [3.0, 4.0, 5.0])))
    True
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = truncated_svd(matrix.T, rank)
        return left.T, right.T
    basis = leading_basis(matrix, rank)
    projected = _project(basis, matrix)
    scale = np.sqrt(np.linalg.norm(projected, axis=1))
    # a direction without energy (rank-deficient matrix): zero on the right, unscaled on the left
    scale[scale == 0] = 1.0
    projected /= scale[:, None]
    return basis * scale, projected


def _project(basis: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``basis.T @ matrix`` in float64, in column chunks."""
    step = max(1, CHUNK // max(matrix.shape[0], 1))
    projected = np.empty((basis.shape[1], matrix.shape[1]))
    for start in range(0, matrix.shape[1], step):
        projected[:, start : start + step] = basis.T @ np.asarray(matrix[:, start : start + step], dtype=np.float64)
    return projected


def relative_residual(matrix: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """``||A - left @ right||_F / ||A||_F``, computed from the difference itself, in column chunks; 0 for ``A = 0``."""
    step = max(1, CHUNK // max(matrix.shape[0], 1))
    total = squared_norm(matrix)
    residual = sum(
        squared_norm(matrix[:, i : i + step] - left @ right[:, i : i + step]) for i in range(0, matrix.shape[1], step)
    )
    return float(np.sqrt(residual / total)) if total > 0 else 0.0


def tail_energy(values: np.ndarray) -> np.ndarray:
    """Share of the squared `values` (descending) beyond the first r, for r = 0 .. len(values).

    Examples
    --------
    >>> tail_energy(np.array([2.0, 1.0]))
    array([1. , 0.2, 0. ])
    """
    squares = np.square(values)
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    return tails / tails[0] if tails[0] > 0 else tails

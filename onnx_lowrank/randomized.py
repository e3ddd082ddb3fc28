"""Large matrices: all singular values, and truncated SVDs by a randomised range, in single precision and checked.

An eigensolver works at the speed of memory, products at that of arithmetic: of a 4096 x 4096 kernel, the basis of a thousand
singular vectors takes a third of the time as the range of a block that a few products have turned towards them. How good
that is is not believed but checked: the Frobenius error of a projection is exact, the least that there is follows from all
singular values, and where the one is not within ``SLACK`` of the other, the eigensolver does the work after all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import scipy.linalg

from onnx_lowrank.linalg import (
    CHUNK,
    fix_signs,
    relative_residual,
    singular_values,
    squared_norm,
    tail_energy,
    truncated_svd,
)

LARGE_SIDE = 4096
"""Rows and columns from which on a matrix is large."""

SLACK = 1.02
"""Most that the squared error of a randomised basis may be of the least one: 1 % in the error itself."""

LEAST_TAIL = 1e-3
"""Share of the energy under which singular values in single precision do not tell an error to one per cent."""

PASSES = 10
"""Products with the Gram matrix at most; each turns the block nearer to the leading singular vectors."""

UNCHECKED = 2
"""Products that are never enough."""

OVERSAMPLING = 8
"""One further column for so many of the rank, and ``FEWEST`` at least: more of them take fewer products."""

FEWEST = 32

WELL_CONDITIONED = 1e4
"""Condition whose square is lost without harm: what is left of double precision is that of single."""

LARGEST_SHARE = 0.5
"""Of the short side, that a rank may be: beyond, the eigensolver is no slower."""

REMEMBERED = 4096
"""Spectra kept: of a model's largest layers, a few dozen kilobytes each."""

_exact: ContextVar[bool] = ContextVar("exact", default=False)
_spectra: OrderedDict[bytes, np.ndarray] = OrderedDict()


@contextmanager
def exactly(wanted: bool = True) -> Iterator[None]:
    """Inside, where `wanted`, no matrix is large: all is done in double precision by the eigensolver."""
    token = _exact.set(wanted)
    try:
        yield
    finally:
        _exact.reset(token)


def exact_wanted() -> bool:
    """Whether this is inside of :func:`exactly`."""
    return _exact.get()


def is_large(matrix: np.ndarray) -> bool:
    """Whether a matrix (m, n) is worked on in single precision, which it is stored in at most."""
    return not exact_wanted() and min(matrix.shape) >= LARGE_SIDE and matrix.dtype.itemsize <= 4


def spectrum(matrix: np.ndarray) -> np.ndarray:
    """Singular values of a matrix (m, n), descending, (min(m, n),), in float64.

    Those of a large one are computed in single precision: each squared value is right to about 1e-6 of the largest.
    They are remembered, since a rank is chosen by them and its factors are held against them.
    """
    if not is_large(matrix):
        return singular_values(matrix)
    key = _digest(matrix)
    if key not in _spectra:
        scale = _scale(matrix)
        if not 0 < scale < np.inf:
            return singular_values(matrix)
        squares = _eigenvalues(_gram(matrix, scale))
        _spectra[key] = scale * np.sqrt(np.maximum(squares[::-1], 0.0))
        while len(_spectra) > REMEMBERED:
            _spectra.popitem(last=False)
    return _spectra[key]


def low_rank(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors as of :func:`~onnx_lowrank.linalg.truncated_svd`; of a large matrix by a randomised range where that is faster.

    Its squared error is then at most ``SLACK`` times the least that there is for `rank`.

    Parameters
    ----------
    rng
        Of the block that the range is begun with.

    Returns
    -------
    left, right
        Shapes (m, rank) and (rank, n); float64, or float32 by a randomised range.
    error
        ``||A - left @ right||_F / ||A||_F``.

    References
    ----------
    Halko, Martinsson & Tropp (2011), "Finding structure with randomness", algorithms 4.4 and 5.1. Feng, Yu, Xie & Tang
    (2024), "Algorithm 1043: dashSVD", section 3: the shift, here of half the first eigenvalue that the block leaves out.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left, error = low_rank(matrix.T, rank, rng)
        return left.T, right.T, error
    if is_large(matrix) and rank <= LARGEST_SHARE * len(matrix):
        found = _randomised(matrix, rank, rng)
        if found is not None:
            return found
    left, right = truncated_svd(matrix, rank)
    return left, right, relative_residual(matrix, left, right)


def _randomised(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float] | None:
    """As :func:`low_rank`, by a randomised range; None where that does not come near enough to the best."""
    values, scale = spectrum(matrix), _scale(matrix)
    least = float(tail_energy(values)[rank])
    if least < LEAST_TAIL or not 0 < scale < np.inf:
        return None
    size = min(len(matrix), rank + max(FEWEST, rank // OVERSAMPLING))
    shift = 0.5 * (values[min(size, len(values) - 1)] / scale) ** 2
    block = rng.standard_normal((len(matrix), size), dtype=np.float32)
    left = _leading(_gram(matrix, scale), block, shift, rank, least)
    return None if left is None else _factors(matrix, left, SLACK * least)


def _leading(products: np.ndarray, block: np.ndarray, shift: float, rank: int, least: float) -> np.ndarray | None:
    """Orthonormal columns (m, rank), float32, near to the leading singular vectors; None where they do not become that."""
    total = float(np.trace(products, dtype=np.float64))
    basis = _orthonormal(block)
    for number in range(PASSES):
        if basis is None:
            return None
        turned = products @ basis
        if number > UNCHECKED:
            inside = basis.T @ turned
            if 1 - _eigenvalues(inside.copy())[-rank:].sum() / total <= (0.5 + 0.5 * SLACK) * least:
                _, vectors = scipy.linalg.eigh(inside.astype(np.float64), overwrite_a=True, check_finite=False)
                return fix_signs(basis @ vectors[:, : -rank - 1 : -1].astype(np.float32)).astype(np.float32, copy=False)
        turned -= np.float32(shift) * basis
        basis = _orthonormal(turned)
    return None


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Eigenvalues of a symmetric float32 matrix, which is overwritten; ascending, in float64.

    The reduction to three diagonals, which is nearly all of the work, is in single precision, what follows in double:
    LAPACK's solvers for single precision are at times far slower at that.
    """
    work, _ = scipy.linalg.lapack.ssytrd_lwork(len(matrix), lower=1)
    # the transpose of a symmetric matrix is in the order of columns that LAPACK takes without a copy
    _, diagonal, beside, _, _ = scipy.linalg.lapack.ssytrd(matrix.T, lower=1, lwork=int(work), overwrite_a=1)
    values, failed = scipy.linalg.lapack.dsterf(diagonal.astype(np.float64), beside.astype(np.float64))
    if failed:
        raise np.linalg.LinAlgError("the eigenvalues of a Gram matrix did not converge")
    return values


def _orthonormal(block: np.ndarray) -> np.ndarray | None:
    """An orthonormal basis of the columns of a block, float32; None where they are dependent.

    By Cholesky factors of its Gram matrix in double precision. The square of the block's condition is lost by that: where it
    is not small a second time, in which the Gram matrix is all but the identity, makes it good.

    References
    ----------
    Yamamoto, Nakatsukasa, Yanagisawa & Fukaya (2015), "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    wide = block.astype(np.float64, order="F")
    for _ in range(2):
        try:
            upper = scipy.linalg.cholesky(wide.T @ wide, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            return None
        wide = scipy.linalg.blas.dtrsm(1.0, upper, wide, side=1, overwrite_b=True)
        pivots = upper.diagonal()
        if pivots.max() < WELL_CONDITIONED * pivots.min():
            break
    return wide.astype(np.float32, order="C")


def _factors(matrix: np.ndarray, left: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Factors by the projection on orthonormal columns; None where their squared relative error is above `most`."""
    right = np.empty((left.shape[1], matrix.shape[1]), np.float32)  # (rank, n)
    step = max(1, CHUNK // len(matrix))
    for start in range(0, matrix.shape[1], step):
        right[:, start : start + step] = left.T @ matrix[:, start : start + step].astype(np.float32, copy=False)
    energies = np.array([squared_norm(row) for row in right])
    # what orthonormal columns do not reach is the rest of the energy
    missed = 1 - float(energies.sum()) / squared_norm(matrix)
    if not missed <= most:
        return None
    root = np.where(energies > 0, energies, 1.0) ** 0.25
    left *= root.astype(np.float32)
    right /= root.astype(np.float32)[:, None]
    return left, right, float(np.sqrt(max(missed, 0.0)))


def _scale(matrix: np.ndarray) -> float:
    """Root mean square of the entries: single precision cannot hold the squares of all that it can hold."""
    return float(np.sqrt(squared_norm(matrix) / matrix.size))


def _gram(matrix: np.ndarray, scale: float) -> np.ndarray:
    """Gram matrix of the short side of a matrix divided by `scale`, float32, in chunks."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows, columns = short.shape
    step = max(1, CHUNK // rows)
    total = np.zeros((rows, rows), np.float32)
    for start in range(0, columns, step):
        block = short[:, start : start + step].astype(np.float32)
        block /= np.float32(scale)
        total += block @ block.T
    return total


def _digest(matrix: np.ndarray) -> bytes:
    """What a matrix and its transpose have in common with no other."""
    stored = matrix if matrix.flags.c_contiguous else np.ascontiguousarray(matrix.T)
    said = hashlib.blake2b(f"{stored.dtype} {sorted(stored.shape)}".encode(), digest_size=16)
    said.update(stored.view(np.uint8).data if stored.dtype.name == "bfloat16" else stored.data)
    return said.digest()

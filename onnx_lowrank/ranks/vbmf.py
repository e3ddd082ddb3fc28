"""Rank by variational Bayesian matrix factorization, from its global analytic solution.

The model is ``Y = B A^T + noise`` of variance ``sigma2``, Y of shape (L, M) with L <= M. For a given ``sigma2`` the
empirical variational Bayes solution keeps exactly the singular values above a threshold; ``sigma2`` itself minimises
the free energy, a function of one variable. All that is needed of Y is its singular values.

How the minimum is found. With ``c_h = g_h^2 / M`` and ``s = sigma2`` the free energy is a sum over h, and the only
places where a term changes its form are the kinks ``s = c_h / x_bar``, where h passes from signal to noise. Between two
kinks, with k signals, the slope times s is (`_slope`)

    F(s) = (L - k - alpha k) s - sum_{h > k} c_h - sum_{h <= k} alpha s / tau_h
    alpha s / tau_h = (b_h - sqrt(b_h^2 - 4 alpha s^2)) / 2,    b_h = c_h - (1 + alpha) s

because ``d psi0 / d log x = x - 1`` and ``d (psi0 + psi1) / d log x = alpha (1 + 1 / tau)``. The root is that of a
quadratic in s of positive discriminant (16 alpha c_h^2), so it is concave and F is concave too. A local minimum is an
upward zero of F, so a piece holds at most one, and Newton's method from the piece's left end walks up to it from below
without ever passing it; where F stops rising or the piece ends, there is none. At a kink the slope can only jump down
(the solution keeps whichever of the two forms is lower), so there is no minimum there. This visits EVERY local minimum,
however narrow, whatever the scale of Y, and costs about as much as a grid of H points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from onnx_lowrank.linalg import singular_values
from onnx_lowrank.ranks._checks import checked_matrix
from onnx_lowrank.types import LowRankError

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class EVBMF:
    """What empirical variational Bayesian matrix factorization says of a matrix.

    Parameters
    ----------
    rank
        Number of singular values above `threshold` (and at most `max_rank`). 0 is an answer: nothing stands out of the
        noise, so do not compress.
    sigma2
        Variance of the noise of one entry, given or estimated. 0 for a matrix of zeros.
    threshold
        Singular values up to here are noise.
    singular_values
        Descending, float64, those that are zero to working precision set to 0.
    shrunk
        Singular values of the posterior mean, shape (rank,): below those observed, which the noise inflates.
    """

    rank: int
    sigma2: float
    threshold: float
    singular_values: np.ndarray
    shrunk: np.ndarray


def vbmf(matrix: np.ndarray, sigma2: float | None = None, *, legacy: bool = False) -> int:
    """Rank by empirical variational Bayesian matrix factorization; see :func:`evbmf`.

    Parameters
    ----------
    matrix
        Shape (m, n), in either orientation.
    sigma2
        Variance of the noise of one entry, if it is known; estimated otherwise.
    legacy
        Give the rank of the widely used public code, which depends on the scale of the matrix.

    Returns
    -------
    int
        From 0 (no signal above the noise: do not compress) to min(m, n).

    Raises
    ------
    LowRankError
        As :func:`evbmf`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> vbmf(rng.normal(size=(40, 7)) @ rng.normal(size=(7, 90)) + 0.1 * rng.normal(size=(40, 90)))
    7
    >>> vbmf(rng.normal(size=(40, 90)))
    0
    """
    return evbmf(matrix, sigma2=sigma2, legacy=legacy).rank


def evbmf(
    matrix: np.ndarray, *, sigma2: float | None = None, max_rank: int | None = None, legacy: bool = False
) -> EVBMF:
    """Empirical variational Bayesian matrix factorization of a matrix.

    The answer does not depend on the scale of the matrix, nor on its orientation. Rows and columns without energy (dead
    channels) carry no noise either, so they are left out before anything is estimated.

    Parameters
    ----------
    matrix
        Shape (m, n), in either orientation.
    sigma2
        Variance of the noise of one entry, if it is known; estimated otherwise.
    max_rank
        Upper bound of the rank; min(m, n) if not given.
    legacy
        Reproduce the widely used public code; see :func:`evbmf_from_singular_values`.

    Returns
    -------
    EVBMF
        Its `singular_values` are those of the matrix without its dead rows and columns.

    Raises
    ------
    LowRankError
        The matrix is not a matrix of finite real numbers, or `sigma2` or `max_rank` is not positive.

    References
    ----------
    As :func:`evbmf_from_singular_values`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> matrix = rng.normal(size=(40, 7)) @ rng.normal(size=(7, 90)) + 0.1 * rng.normal(size=(40, 90))
    >>> found = evbmf(matrix)
    >>> found.rank, round(found.sigma2, 3)
    (7, 0.01)
    >>> evbmf(1e-6 * matrix).rank, evbmf(matrix.T).rank, evbmf(matrix, max_rank=5).rank
    (7, 7, 5)
    """
    matrix = checked_matrix(matrix)
    if not legacy:
        rows, columns = (_alive(matrix, subscripts) for subscripts in ("ij,ij->i", "ij,ij->j"))
        if not (rows.all() and columns.all()):
            matrix = matrix[np.ix_(rows, columns)]
    values = singular_values(matrix) if matrix.size else np.zeros(0)
    return evbmf_from_singular_values(values, matrix.shape, sigma2=sigma2, max_rank=max_rank, legacy=legacy)


def evbmf_from_singular_values(
    values: np.ndarray,
    shape: tuple[int, int],
    *,
    sigma2: float | None = None,
    max_rank: int | None = None,
    legacy: bool = False,
) -> EVBMF:
    """Empirical variational Bayesian matrix factorization, from the singular values alone.

    Three choices where the literature leaves room:

    * ``tau_bar`` is the exact root of the paper's condition, not ``2.5129 sqrt(alpha)``. They agree for a square
      matrix; the exact threshold is at most 1.04 % higher (near alpha = 0.01), which is a rank lower by one or two on a
      512 x 4608 matrix with a power-law spectrum. Only the exact one makes the free energy continuous where a singular
      value passes from signal to noise.
    * Directions without energy. If there are so many that the exact factorization is smaller than the matrix (rank
      below L M / (L + M)), the free energy falls without bound as ``sigma2 -> 0``: the matrix is of low rank and has no
      noise. The answer is its numerical rank, at the smallest variance that can be told from zero, ``(eps g_1)^2``.
      With fewer, they are dropped and the noise is estimated among the others.
    * A singular value counts as zero below ``sqrt(max(L, M) eps)`` of the largest, which is what a Gram matrix in
      float64 resolves (1e-6 for 512 x 4608).

    Parameters
    ----------
    values
        Singular values, descending, shape (min(shape),).
    shape
        Shape of the matrix they are of, in either orientation.
    sigma2
        Variance of the noise of one entry, if it is known; estimated otherwise.
    max_rank
        Upper bound of the rank; min(shape) if not given.
    legacy
        Reproduce the widely used public code, for comparison with papers that used it: ``2.5129 sqrt(alpha)``, and a
        bounded minimiser directly on ``sigma2`` whose absolute tolerance of 1e-5 is larger than the noise variance of
        most trained kernels, so that the rank depends on the scale of the weights.

    Returns
    -------
    EVBMF

    Raises
    ------
    LowRankError
        `values` do not fit `shape`, or `sigma2` or `max_rank` is not positive.

    References
    ----------
    Nakajima, Sugiyama, Babacan, Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization", JMLR 14 (threshold, shrinkage and free energy).
    Nakajima, Tomioka, Sugiyama, Babacan 2015, "Condition for perfect dimensionality recovery by variational Bayesian
    PCA", JMLR 16 (the condition for ``tau_bar``, the bounds of the noise variance).

    Examples
    --------
    >>> evbmf_from_singular_values(np.array([9.0, 1.1, 1.0, 1.0, 0.9, 0.9]), (6, 60)).rank
    1
    """
    low, high = sorted(shape)
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (low,) or (np.diff(values) > 0).any() or not (np.isfinite(values) & (values >= 0)).all():
        raise LowRankError(
            f"expected {low} non-negative singular values in descending order for a matrix {shape}, "
            f"got shape {values.shape}; pass numpy.linalg.svd(matrix, compute_uv=False)"
        )
    if sigma2 is not None and not 0 < sigma2 < math.inf:
        raise LowRankError(f"the noise variance sigma2 is {sigma2}, expected a positive number; omit it to estimate it")
    if max_rank is not None and max_rank < 1:
        raise LowRankError(f"max_rank is {max_rank}, expected at least 1; omit it for no bound")
    most = low if max_rank is None else min(max_rank, low)
    if low == 0 or values[0] == 0:
        return EVBMF(0, sigma2 or 0.0, 0.0, values, values[:0])
    if legacy:
        x_bar = _threshold_ratio(low / high, exact=False)
        sigma2 = _legacy_sigma2(values, high, most, x_bar) if sigma2 is None else sigma2
        return _solution(values, low, high, most, sigma2, x_bar)

    values = np.where(values > math.sqrt(high * EPS) * values[0], values, 0.0)
    if sigma2 is None:
        alive = np.count_nonzero(values)
        if alive <= _most_signals(low, high, low):
            sigma2 = (EPS * values[0]) ** 2
        else:
            low = int(alive)
            variances = np.square(values[:low] / values[0]) / high
            sigma2 = values[0] ** 2 * _estimated_sigma2(variances, high, _most_signals(low, high, most))
    return _solution(values, low, high, most, sigma2, _threshold_ratio(low / high))


def _alive(matrix: np.ndarray, subscripts: str) -> np.ndarray:
    """Which rows (``ij,ij->i``) or columns of the matrix are not zero to working precision."""
    # einsum converts to float64 in small buffers, never the whole matrix
    squares = np.einsum(subscripts, matrix, matrix, dtype=np.float64, casting="unsafe")
    return squares > max(matrix.shape) * EPS * squares.max()


def _threshold_ratio(alpha: float, exact: bool = True) -> float:
    """``x_bar``: a singular value is signal if ``g^2 > M sigma2 x_bar`` (Nakajima et al. 2015)."""

    def condition(tau: float) -> float:
        return math.log1p(tau) / tau + math.log1p(tau / alpha) * alpha / tau - 1.0

    # At alpha = 1 the root is 2.51286; below, it lies between sqrt(alpha) and that.
    tau = brentq(condition, math.sqrt(alpha), 2.52) if exact else 2.5129 * math.sqrt(alpha)
    return (1.0 + tau) * (1.0 + alpha / tau)


def _most_signals(low: int, high: int, most: int) -> int:
    """``H_bar``, the most signals that leave enough noise to estimate it by: below L M / (L + M)."""
    return min((low * high - 1) // (low + high), most)


def _solution(values: np.ndarray, low: int, high: int, most: int, sigma2: float, x_bar: float) -> EVBMF:
    """Rank and shrinkage once the noise variance is known (Nakajima et al. 2013)."""
    threshold = math.sqrt(high * sigma2 * x_bar)
    kept = values[:most][values[:most] > threshold]
    noise = sigma2 / np.square(kept)
    lead = 1.0 - (low + high) * noise
    shrunk = kept / 2.0 * (lead + np.sqrt(np.maximum(lead**2 - 4.0 * low * high * noise**2, 0.0)))
    return EVBMF(len(kept), float(sigma2), threshold, values, shrunk)


def _bounds(variances: np.ndarray, high: int, most: int, x_bar: float) -> tuple[float, float]:
    """Between which values the noise variance lies, `variances` being ``g^2 / M`` (Nakajima et al. 2015).

    The first term of the lower bound says that at most ``H_bar`` values are signal. Where `most` says so already, the
    next value may be signal that is not allowed to be, and only the second term holds.
    """
    low = len(variances)
    tail = variances[most:]
    lower, upper = float(tail.mean()), float(variances.mean())
    if most == _most_signals(low, high, low):
        lower = max(lower, float(tail[0]) / x_bar)
    return min(lower, upper), upper  # equal singular values: the two means differ by round-off, either way


def _estimated_sigma2(variances: np.ndarray, high: int, most: int) -> float:
    """Noise variance of the least free energy, for `variances` ``g^2 / M``, descending and positive."""
    alpha = len(variances) / high
    x_bar = _threshold_ratio(alpha)
    lower, upper = _bounds(variances, high, most, x_bar)
    candidates = [lower, upper]
    kinks = np.concatenate([[math.inf], variances[:most] / x_bar, [0.0]])
    for k in range(most + 1):
        start, end = max(lower, kinks[k + 1]), min(upper, kinks[k])
        if start < end and (minimum := _local_minimum(start, end, k, variances, alpha)) is not None:
            candidates.append(minimum)
    return min(candidates, key=lambda s: _free_energy(s, variances, alpha, int(np.sum(variances[:most] > s * x_bar))))


def _local_minimum(start: float, end: float, k: int, variances: np.ndarray, alpha: float) -> float | None:
    """The local minimum of the free energy inside a piece with k signals, by Newton's method; None if it has none."""
    signals, noise = variances[:k], float(variances[k:].sum())
    s = start
    while True:
        value, rise = _slope(s, signals, noise, len(variances), alpha)
        if value >= 0:
            # At the start: it never falls in this piece. Later: round-off at the zero itself.
            return s if s > start else None
        if rise <= 0 or (step := -value / rise) >= end - s:
            return None
        s += step
        if step <= math.sqrt(EPS) * s:  # convergence is quadratic: what is left is of order eps
            return s


def _slope(s: float, signals: np.ndarray, noise: float, low: int, alpha: float) -> tuple[float, float]:
    """F(s) of the module's docstring, ``s`` times the slope of the free energy in ``log s``, and its derivative."""
    b = signals - (1.0 + alpha) * s
    root = np.sqrt(b * b - 4.0 * alpha * s * s)
    share = 2.0 * alpha * s * s / (b + root)  # (b - root) / 2 without its cancellation
    rate = low - (1.0 + alpha) * len(signals)
    rise = rate - float(np.sum(((1.0 + alpha) * share + 2.0 * alpha * s) / root))
    return rate * s - noise - float(share.sum()), rise


def _free_energy(s: float, variances: np.ndarray, alpha: float, k: int) -> float:
    """Free energy at the noise variance s with k signals, up to a constant (Nakajima et al. 2013).

    ``psi0 + psi1`` of a signal is written as a function of tau, where the large terms ``x`` and ``-tau`` have
    cancelled: ``1 + alpha + alpha / tau + log tau - (1 - alpha) log(tau + alpha) - alpha log alpha``.
    """
    x = variances / s
    b = x[:k] - (1.0 + alpha)
    tau = (b + np.sqrt(b * b - 4.0 * alpha)) / 2.0
    constant = 1.0 + alpha - alpha * math.log(alpha)
    signal = np.sum(alpha / tau + np.log(tau) - (1.0 - alpha) * np.log(tau + alpha)) + k * constant
    return float(signal + np.sum(x[k:] - np.log(x[k:])))


def _legacy_sigma2(values: np.ndarray, high: int, most: int, x_bar: float) -> float:
    """Noise variance as the widely used public code finds it: one bounded search, absolute tolerance 1e-5."""
    low, alpha = len(values), len(values) / high
    kept, residual = values[:most], float(np.square(values[most:]).sum())

    def objective(sigma2: float) -> float:
        x = np.square(kept) / (high * sigma2)
        noise, signal = x[x <= x_bar], x[x > x_bar]
        b = signal - (1.0 + alpha)
        tau = (b + np.sqrt(b * b - 4.0 * alpha)) / 2.0
        gain = signal - tau + np.log((tau + 1.0) / signal) + alpha * np.log(tau / alpha + 1.0)
        rest = residual / (high * sigma2) + (low - most) * math.log(sigma2)
        return float(np.sum(noise - np.log(noise)) + np.sum(gain) + rest)

    bounds = _bounds(np.square(values) / high, high, _most_signals(low, high, most), x_bar)
    with np.errstate(divide="ignore", invalid="ignore"):  # the log of a singular value of zero, which it does not drop
        return float(minimize_scalar(objective, bounds=bounds, method="bounded").x)

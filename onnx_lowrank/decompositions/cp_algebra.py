"""Algebra of the factors of a CP approximation: matrices ``(n_mode, rank)``, one for each mode of the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from onnx_lowrank.linalg import squared_norm, unit_columns

Factors = tuple[np.ndarray, ...]

EPS = float(np.finfo(np.float64).eps)


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

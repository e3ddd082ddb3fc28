"""The smallest rank that keeps a share of the energy."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.linalg import singular_values, tail_energy
from onnx_lowrank.ranks._checks import checked_matrix, checked_share


def energy(matrix: np.ndarray, value: float = 0.95) -> int:
    """Smallest rank that keeps the share `value` of the sum of the squared singular values.

    By Eckart & Young that sum's tail is the squared error of the truncation, so the relative error of the matrix
    at this rank is at most ``sqrt(1 - value)``.

    Parameters
    ----------
    matrix
        Shape (m, n), in either orientation.
    value
        Share of the energy to keep, above 0 and up to 1. 1 gives the numerical rank.

    Returns
    -------
    int
        From 1 to min(m, n); 0 for a matrix of zeros.

    Raises
    ------
    LowRankError
        The matrix is not a matrix of finite real numbers, or `value` is outside (0, 1].

    References
    ----------
    Eckart & Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.

    Examples
    --------
    >>> energy(np.diag([3.0, 1.0, 0.1]), 0.85), energy(np.diag([3.0, 1.0, 0.0]), 1.0)
    (1, 2)
    """
    matrix, value = checked_matrix(matrix), checked_share(value, "the share of energy to keep")
    tails = tail_energy(singular_values(matrix))
    # A Gram matrix gives the squared singular values to within n eps of the largest: tails below that are round-off.
    allowed = 1.0 - value + max(matrix.shape) * np.finfo(np.float64).eps
    return int(np.argmax(tails <= allowed))

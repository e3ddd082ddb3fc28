"""The largest rank at which two factors are smaller than the matrix."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.ranks._checks import checked_matrix


def break_even(matrix: np.ndarray) -> int:
    """Largest rank r with ``r (m + n) < m n``: two factors hold fewer numbers than the matrix.

    Parameters
    ----------
    matrix
        Shape (m, n), in either orientation.

    Returns
    -------
    int
        From 0 (no rank saves anything: ``m`` or ``n`` is 1, or the matrix is 2 x 2) to min(m, n) - 1; 0 for a
        matrix of zeros.

    Raises
    ------
    LowRankError
        The matrix is not a matrix of finite real numbers.

    Examples
    --------
    >>> break_even(np.ones((512, 4608))), break_even(np.ones((4, 4))), break_even(np.ones((1, 9)))
    (460, 1, 0)
    """
    matrix = checked_matrix(matrix)
    m, n = matrix.shape
    return (m * n - 1) // (m + n) if matrix.any() else 0

"""A fixed share of the full rank."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.ranks._checks import checked_matrix, checked_share


def ratio(matrix: np.ndarray, value: float = 0.5) -> int:
    """Share `value` of the full rank: ``int(value * min(m, n))``, at least 1.

    Parameters
    ----------
    matrix
        Shape (m, n), in either orientation.
    value
        Share of min(m, n), above 0 and up to 1.

    Returns
    -------
    int
        From 1 to min(m, n); 0 for a matrix of zeros.

    Raises
    ------
    LowRankError
        The matrix is not a matrix of finite real numbers, or `value` is outside (0, 1].

    Examples
    --------
    >>> ratio(np.ones((64, 100)), 0.25), ratio(np.ones((100, 100)), 0.29), ratio(np.ones((2, 9)), 0.1)
    (16, 29, 1)
    """
    matrix, value = checked_matrix(matrix), checked_share(value, "the share of the full rank")
    if not matrix.any():
        return 0
    # 0.29 * 100 is 28.999999999999996: the decimal and the product are each off by up to eps / 2, so add 2 eps.
    return max(1, int(value * min(matrix.shape) * (1.0 + 2.0 * np.finfo(np.float64).eps)))

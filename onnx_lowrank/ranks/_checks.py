"""What every estimator asks of the matrix it is given."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.types import LowRankError


def checked_matrix(matrix: np.ndarray) -> np.ndarray:
    """The matrix itself, once it is known to be a non-empty table (m, n) of finite real numbers.

    Raises
    ------
    LowRankError
        It is not.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.size == 0:
        raise LowRankError(f"a rank estimator needs a matrix (m, n), got shape {matrix.shape}; unfold the kernel first")
    if matrix.dtype.kind not in "fiu":
        raise LowRankError(f"a rank estimator needs real numbers, got dtype {matrix.dtype}; convert to float32 first")
    if not np.isfinite(matrix).all():
        raise LowRankError(
            f"the matrix {matrix.shape} holds NaN or infinity, a rank needs finite numbers; check the weights"
        )
    return matrix


def checked_share(value: float, name: str) -> float:
    """`value`, once it is known to lie in (0, 1]; `name` is what the message calls it."""
    if not 0 < value <= 1:  # also catches NaN
        raise LowRankError(f"{name} is {value}, expected a number above 0 and up to 1")
    return float(value)

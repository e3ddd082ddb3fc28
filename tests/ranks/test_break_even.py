"""The break-even rank."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.ranks import break_even


@pytest.mark.parametrize("shape", [(512, 4608), (64, 27), (4, 4), (3, 6), (2, 2), (1, 9), (9, 1), (1, 1), (20, 5)])
def test_two_factors_are_smaller_at_this_rank_and_not_at_the_next(shape):
    m, n = shape
    rank = break_even(np.ones(shape))
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


def test_equal_size_is_not_a_saving():
    # 3 x 6: rank 2 would hold 2 (3 + 6) = 18 numbers, as many as the matrix
    assert break_even(np.ones((3, 6))) == 1

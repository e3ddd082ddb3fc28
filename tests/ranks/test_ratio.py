"""The ratio estimator."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.ranks import ratio
from onnx_lowrank.types import LowRankError


@pytest.mark.parametrize(
    ("shape", "value", "rank"),
    [((512, 4608), 0.5, 256), ((4608, 512), 0.5, 256), ((10, 20), 0.39, 3), ((10, 20), 0.01, 1), ((7, 7), 1.0, 7)],
)
def test_the_rank_is_the_whole_part_of_the_share_and_at_least_one(shape, value, rank):
    assert ratio(np.ones(shape), value) == rank


def test_every_decimal_share_of_a_hundred_means_what_it_says():
    # 0.29 * 100, 0.57 * 100 and 0.58 * 100 fall just short of a whole number in binary
    assert [ratio(np.ones((100, 100)), percent / 100) for percent in range(1, 101)] == list(range(1, 101))


@pytest.mark.parametrize("value", [0.0, 1.5, np.nan])
def test_a_share_outside_0_to_1_is_refused(value):
    with pytest.raises(LowRankError, match=r"share of the full rank is .*, expected a number above 0 and up to 1"):
        ratio(np.eye(3), value)

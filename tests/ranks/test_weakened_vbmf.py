"""The weakened VBMF rank."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.ranks import vbmf, weakened_vbmf
from onnx_lowrank.types import LowRankError


def planted():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 10)) @ rng.normal(size=(10, 90)) + 0.1 * rng.normal(size=(40, 90))


@pytest.mark.parametrize(("value", "rank"), [(0.01, 39), (0.5, 25), (0.7, 19), (0.99, 10), (1.0, 10)])
def test_the_rank_lies_the_given_part_of_the_way_to_the_vbmf_rank(value, rank):
    assert vbmf(planted()) == 10
    assert weakened_vbmf(planted(), value) == weakened_vbmf(planted().T, value) == rank


def test_noise_stays_uncompressed_however_weak_the_step():
    noise = np.random.default_rng(0).normal(size=(40, 90))
    assert [weakened_vbmf(noise, value) for value in (0.1, 0.7, 1.0)] == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 1.1, np.nan])
def test_a_factor_outside_0_to_1_is_refused(value):
    with pytest.raises(LowRankError, match=r"weakening factor is .*, expected a number above 0 and up to 1"):
        weakened_vbmf(np.eye(3), value)

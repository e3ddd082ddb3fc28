"""Levels that a rank keeps, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.decompositions import DECOMPOSITIONS, lift
from onnx_lowrank.decompositions.levels import NONE, energy_levels
from onnx_lowrank.types import ConvSpec


def test_levels_are_those_of_the_running_sum_of_singular_values() -> None:
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.standard_normal((6, 4)))[0], np.linalg.qr(rng.standard_normal((5, 4)))[0]
    matrix = left @ np.diag([8.0, 4.0, 2.0, 1.0]) @ right.T  # (6, 5) of rank 4; the sums are 8, 12, 14, 15, 15
    levels = energy_levels(DECOMPOSITIONS["svd"], [ConvSpec((6, 5))], [matrix], [(1,), (2,), (3,), (4,), (5,)])
    np.testing.assert_allclose(levels, [NONE, 4 / 7, 6 / 7, 1, 1], atol=1e-9)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_levels_rise_with_the_rank_to_one(name: str) -> None:
    shape = (8, 6, 1, 1) if name == "svd" else (8, 6, 3, 3)
    spec = ConvSpec(shape)
    highest = lift.max_rank(DECOMPOSITIONS[name], [spec])
    weight = np.random.default_rng(1).standard_normal(shape)
    ranks = [tuple(max(1, round(share * r)) for r in highest) for share in (0.0, 0.4, 0.8, 1.0)]
    levels = energy_levels(DECOMPOSITIONS[name], [spec], [weight], ranks)
    assert (np.diff(levels) >= -1e-6).all()
    assert levels[0] == pytest.approx(NONE, abs=1e-5)
    assert levels[-1] > 0.95


def test_the_level_of_groups_is_their_mean_and_of_nothing_is_whole() -> None:
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal((4, 3)) for _ in range(2)]
    spec = ConvSpec((8, 3), group=2)
    both = energy_levels(DECOMPOSITIONS["svd"], [spec], [np.concatenate(parts)], [(2,)])
    each = [energy_levels(DECOMPOSITIONS["svd"], [ConvSpec((4, 3))], [part], [(2,)])[0] for part in parts]
    assert both[0] == pytest.approx(np.mean(each))
    assert energy_levels(DECOMPOSITIONS["svd"], [ConvSpec((4, 3))], [np.zeros((4, 3))], [(1,)]) == [1.0]

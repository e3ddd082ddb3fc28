"""The energy estimator: known spectra."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.ranks import energy
from onnx_lowrank.types import LowRankError


def with_singular_values(values, columns, seed=0):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return left * values @ right.T


@pytest.mark.parametrize(
    ("value", "rank"),
    # squares 64, 16, 16, 4, 0: shares 0.64, 0.80, 0.96, 1.00
    [(0.01, 1), (0.639, 1), (0.641, 2), (0.799, 2), (0.801, 3), (0.959, 3), (0.961, 4), (1.0, 4)],
)
def test_the_smallest_rank_that_keeps_the_share_is_returned(value, rank):
    matrix = with_singular_values([8.0, 4.0, 4.0, 2.0, 0.0], 30)
    assert energy(matrix, value) == energy(matrix.T, value) == energy(1e-5 * matrix, value) == rank


def test_a_share_met_exactly_is_met():
    # equal singular values: the share r / 10 is kept by rank r, round-off or not
    matrix = with_singular_values(np.ones(10), 40)
    assert [energy(matrix, r / 10) for r in range(1, 11)] == list(range(1, 11))


def test_the_truncation_error_is_the_promised_one():
    matrix = np.random.default_rng(0).normal(size=(50, 120)) * np.arange(1.0, 51)[:, None] ** -1
    values = np.linalg.svd(matrix, compute_uv=False)
    for share in (0.5, 0.9, 0.99):
        rank = energy(matrix, share)
        assert np.square(values[:rank]).sum() >= share * np.square(values).sum()
        assert np.square(values[: rank - 1]).sum() < share * np.square(values).sum()


def test_all_the_energy_of_a_rank_deficient_matrix_is_its_rank():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(64, 6)) @ rng.normal(size=(6, 300))
    assert energy(matrix, 1.0) == energy(matrix.astype(np.float32), 1.0) == 6


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, np.nan])
def test_a_share_outside_0_to_1_is_refused(value):
    with pytest.raises(LowRankError, match=r"share of energy to keep is .*, expected a number above 0 and up to 1"):
        energy(np.eye(3), value)

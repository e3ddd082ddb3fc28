"""Rank by variational Bayesian matrix factorization: known answers, invariances, and the minimiser by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from onnx_lowrank.ranks import evbmf, evbmf_from_singular_values, vbmf
from onnx_lowrank.ranks.vbmf import _free_energy, _slope
from onnx_lowrank.types import LowRankError

EPS = np.finfo(np.float64).eps


def planted(shape, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    return signal + noise * rng.normal(size=shape)


def power_law(shape, exponent, seed=0, std=0.02):
    matrix = np.random.default_rng(seed).normal(size=shape)
    matrix *= np.arange(1.0, shape[0] + 1)[:, None] ** -exponent
    return matrix * (std / matrix.std())


# Known answers


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((40, 90), 7), ((64, 64), 10), ((64, 576), 20), ((128, 1152), 1), ((128, 1152), 60), ((30, 3000), 10)],
)
def test_the_planted_rank_is_found_under_noise(shape, rank, noise):
    found = evbmf(planted(shape, rank, noise))
    assert found.rank == rank
    # The estimate uses (L - rank) M entries of noise, and its prior takes a few percent of a small matrix as signal.
    assert found.sigma2 == pytest.approx(noise**2, rel=0.08)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(2, 2), (3, 50), (20, 20), (40, 90), (64, 576), (256, 256)])
def test_pure_noise_has_rank_zero_at_every_scale(shape, scale):
    for seed in range(5):
        noise = scale * np.random.default_rng(seed).normal(size=shape)
        found = evbmf(noise)
        assert found.rank == 0
        assert found.shrunk.shape == (0,)
        assert found.sigma2 == pytest.approx(np.square(noise).mean(), rel=1e-9)


def test_a_signal_below_the_threshold_is_noise_and_above_it_is_not():
    # tau_bar is the root of log(1 + t) / t + alpha log(1 + t / alpha) / t = 1; the threshold is sqrt(M sigma2 x_bar).
    low, high, sigma2 = 30, 300, 4.0
    alpha = low / high
    tau = brentq(lambda t: math.log1p(t) / t + alpha * math.log1p(t / alpha) / t - 1, 1e-3, 10)
    threshold = math.sqrt(high * sigma2 * (1 + tau) * (1 + alpha / tau))
    for factor, rank in ((0.999, 0), (1.001, 1)):
        values = np.concatenate([[factor * threshold], np.full(low - 1, 1.0)])
        found = evbmf_from_singular_values(values, (low, high), sigma2=sigma2)
        assert found.rank == rank
        assert found.threshold == pytest.approx(threshold, rel=1e-12)


def test_the_exact_root_of_a_square_matrix_is_the_published_constant():
    # alpha = 1: (1 + tau)(1 + 1 / tau) with tau = 2.5129, where approximation and exact root meet
    square = evbmf_from_singular_values(np.ones(50), (50, 50), sigma2=1.0)
    assert square.threshold**2 / 50 == pytest.approx(3.5129 * (1 + 1 / 2.5129), rel=1e-4)


def test_a_known_noise_variance_moves_the_rank():
    matrix = planted((40, 90), 7, 0.1)
    assert [vbmf(matrix, sigma2) for sigma2 in (1e-8, 0.01, 1e4)] == [40, 7, 0]


def test_shrunk_singular_values_reconstruct_the_signal_better_than_those_observed():
    signal = planted((60, 600), 3, 0.0)
    noisy = signal + 2.0 * np.random.default_rng(1).normal(size=signal.shape)
    found = evbmf(noisy)
    left, observed, right = np.linalg.svd(noisy, full_matrices=False)
    error, plain = (
        np.linalg.norm(left[:, :3] * values @ right[:3] - signal) for values in (found.shrunk, observed[:3])
    )
    assert found.rank == 3
    assert (found.shrunk < observed[:3]).all()
    assert error < 0.97 * plain


def test_shrinkage_follows_the_published_formula():
    # L = 2, M = 8, sigma2 = 1, g = 10: lead = 1 - 10 / 100, d = 5 (0.9 + sqrt(0.81 - 64 / 10000))
    found = evbmf_from_singular_values(np.array([10.0, 1.0]), (2, 8), sigma2=1.0)
    np.testing.assert_allclose(found.shrunk, [5 * (0.9 + math.sqrt(0.8036))], rtol=1e-14)


def test_rank_counts_the_singular_values_above_the_threshold():
    for matrix in (planted((40, 90), 7, 0.1), power_law((60, 200), 0.7), np.eye(9)):
        found = evbmf(matrix)
        assert found.rank == int((found.singular_values > found.threshold).sum()) == len(found.shrunk)


# Invariances


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_rank_does_not_depend_on_the_scale(exponent, dtype):
    matrix = power_law((128, 1152), exponent).astype(dtype)
    ranks = [vbmf(matrix * dtype(scale)) for scale in (1.0, 1e-3, 1e3, 2.0**-60)]
    assert ranks == [ranks[0]] * 4
    assert 0 < ranks[0] < 128


def test_the_noise_variance_scales_with_the_square():
    matrix = power_law((60, 200), 0.7)
    assert evbmf(1e-3 * matrix).sigma2 == pytest.approx(1e-6 * evbmf(matrix).sigma2, rel=1e-9)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_transposed_matrix_has_the_same_rank(legacy):
    for matrix in (planted((40, 90), 7, 0.1), power_law((60, 200), 0.7), planted((30, 30), 4, 0.2)):
        assert vbmf(matrix.T, legacy=legacy) == vbmf(matrix, legacy=legacy) > 0


@pytest.mark.parametrize("residue", [0.0, 1e-12])
def test_dead_rows_and_columns_change_nothing(residue):
    matrix = power_law((60, 200), 0.7)
    padded = residue * np.random.default_rng(0).normal(size=(150, 260))
    padded[20:80, 50:250] = matrix
    assert evbmf(padded).rank == evbmf(matrix).rank
    assert evbmf(padded).sigma2 == pytest.approx(evbmf(matrix).sigma2, rel=1e-6)


# Matrices of special form


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "rank"), [((100, 200), 5), ((64, 256), 20), ((64, 64), 31), ((64, 256), 1)])
def test_an_exact_low_rank_matrix_without_noise_has_its_numerical_rank(shape, rank, dtype):
    matrix = planted(shape, rank, 0.0).astype(dtype)
    assert vbmf(matrix) == vbmf(1e-4 * matrix) == rank
    assert evbmf(matrix).sigma2 == pytest.approx((EPS * np.linalg.norm(matrix, 2)) ** 2, rel=1e-5)
    assert evbmf(matrix, max_rank=1).rank == 1


def test_a_few_dependent_rows_are_dropped_and_the_noise_is_estimated_among_the_others():
    matrix = planted((40, 90), 7, 0.1)
    assert vbmf(np.vstack([matrix, matrix[:3]])) == 7
    # an orthonormal embedding adds dependent directions and keeps the singular values
    embedding = np.linalg.qr(np.random.default_rng(0).normal(size=(46, 40)))[0]
    found, expected = evbmf(embedding @ matrix), evbmf(matrix)
    assert found.rank == expected.rank
    assert found.sigma2 == pytest.approx(expected.sigma2, rel=1e-9)


def test_just_above_break_even_an_exact_low_rank_matrix_is_treated_as_noisy():
    # 64 x 64: two factors of rank 31 are smaller than the matrix, of rank 32 they are not
    assert vbmf(planted((64, 64), 31, 0.0)) == 31
    assert vbmf(planted((64, 64), 32, 0.0)) < 31


@pytest.mark.parametrize("matrix", [np.arange(1.0, 10.0)[None], np.ones((9, 1)), np.ones((1, 1)), np.array([[-2.0]])])
def test_a_matrix_of_one_row_has_nothing_to_compress(matrix):
    assert vbmf(matrix) == 0


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("count", [3, 8, 10, 41])
def test_equal_singular_values_are_noise(count, legacy):
    for shape in ((count, count), (count, 5 * count), (7 * count, count)):
        for value in (0.1, 1.0, 3.7):
            assert evbmf_from_singular_values(np.full(count, value), shape, legacy=legacy).rank == 0
    assert vbmf(0.3 * np.eye(count), legacy=legacy) == 0


def test_a_constant_matrix_has_rank_one():
    assert vbmf(np.full((4, 9), 0.1)) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_a_matrix_of_zeros_has_rank_zero_and_no_noise(legacy):
    found = evbmf(np.zeros((3, 5)), legacy=legacy)
    assert (found.rank, found.sigma2, found.threshold) == (0, 0.0, 0.0)


def test_max_rank_bounds_the_rank_and_raises_the_noise():
    matrix = planted((40, 90), 7, 0.1)
    assert [evbmf(matrix, max_rank=r).rank for r in (3, 7, 20, 1000)] == [3, 7, 7, 7]
    assert evbmf(matrix, max_rank=3).sigma2 > 10 * evbmf(matrix).sigma2


def test_integers_and_half_precision_are_accepted():
    matrix = planted((40, 90), 7, 0.1)
    assert vbmf(matrix.astype(np.float16)) == 7
    assert vbmf(np.round(100 * matrix).astype(np.int32)) == 7


# The minimiser


def free_energy(sigma2, values, high, most):
    """Nakajima et al. 2013: sum psi0 + sum over signals psi1, at each of the variances."""
    alpha = len(values) / high
    tau_bar = brentq(lambda t: math.log1p(t) / t + alpha * math.log1p(t / alpha) / t - 1, math.sqrt(alpha), 2.52)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    x = np.square(values) / (high * sigma2[:, None])
    signal = (x > x_bar) & (np.arange(len(values)) < most)
    b = np.where(signal, x, 10.0) - (1 + alpha)
    tau = (b + np.sqrt(b**2 - 4 * alpha)) / 2
    psi1 = np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
    return (x - np.log(x) + np.where(signal, psi1, 0.0)).sum(axis=1)


@pytest.mark.parametrize("max_rank", [None, 4])
@pytest.mark.parametrize(
    "matrix",
    [
        power_law((48, 400), 0.3),
        power_law((48, 400), 1.0, seed=1),
        power_law((48, 48), 1.5, seed=2),
        planted((40, 90), 7, 0.5),
        planted((40, 40), 30, 1.0),
        np.random.default_rng(4).normal(size=(30, 200)),
        np.diag(np.exp(-0.2 * np.arange(24.0))) @ np.random.default_rng(5).normal(size=(24, 60)),
        np.random.default_rng(6).normal(size=(2, 5)),
    ],
)
def test_no_point_of_a_dense_grid_has_a_lower_free_energy(matrix, max_rank):
    low, high = matrix.shape
    found = evbmf(matrix, max_rank=max_rank)
    values = np.linalg.svd(matrix, compute_uv=False)
    # well outside the published bounds on both sides, which are thereby tested too where the rank is not bounded
    grid = np.geomspace(values[-1] ** 2 / (100 * high), 10 * np.square(values).mean() / high, 20_000)
    most = low if max_rank is None else max_rank
    mine = free_energy(np.array([found.sigma2]), values, high, most)[0]
    # x and -tau cancel in psi1: an absolute error of eps times the largest x, for each signal
    tolerance = 10 * EPS * low * values[0] ** 2 / (high * found.sigma2)
    dense = np.concatenate([free_energy(part, values, high, most) for part in np.array_split(grid, 10)])
    assert mine <= dense.min() + tolerance
    assert dense.min() - mine < 1e-3  # and the grid comes close, so the bound above is not an empty one
    closest = grid[dense.argmin()]
    assert found.rank == int((np.square(values[:most]) > found.threshold**2 / found.sigma2 * closest).sum())


@pytest.mark.parametrize("signals", [0, 5, 12])
def test_the_slope_and_its_derivative_agree_with_finite_differences(signals):
    variances = np.concatenate([np.linspace(40.0, 20.0, signals), np.linspace(1.2, 0.8, 40 - signals)])
    s, step, alpha, noise = 1.1, 1e-5, 0.4, variances[signals:].sum()
    slope, rise = _slope(s, variances[:signals], noise, 40, alpha)
    upper, lower = (_free_energy(s * math.exp(sign * step), variances, alpha, signals) for sign in (1, -1))
    assert slope == pytest.approx(s * (upper - lower) / (2 * step), rel=1e-6)
    beyond, before = (_slope(s + sign * step, variances[:signals], noise, 40, alpha)[0] for sign in (1, -1))
    assert rise == pytest.approx((beyond - before) / (2 * step), rel=1e-6)


def test_the_lower_of_several_local_minima_is_found():
    # one strong value, a shelf of middling and a bulk of small ones: the free energy has a minimum for each reading
    values = np.concatenate([[100.0], np.linspace(12.0, 9.0, 14), np.linspace(1.1, 0.9, 25)])
    shape = (40, 60)
    grid = np.geomspace(1e-3, 300.0, 20_000)
    dense = free_energy(grid, values, shape[1], 19)
    inner = dense[1:-1]
    minima = grid[1:-1][(inner < dense[:-2]) & (inner < dense[2:])]
    assert len(minima) >= 2
    found = evbmf_from_singular_values(values, shape, max_rank=19)
    assert found.sigma2 == pytest.approx(grid[dense.argmin()], rel=2e-3)


# The public code, reproduced


def test_legacy_depends_on_the_scale_exactly_as_the_public_code_does():
    # 512 x 4608, singular values h^-0.8; the public code was measured to give 192, 102 and 45 at these sizes of
    # weights, where the minimum of its objective is at 188 (187 with the exact root for tau_bar)
    shape = (512, 4608)
    values = np.arange(1.0, 513) ** -0.8
    values *= math.sqrt(512 * 4608) / np.linalg.norm(values)
    legacy = [evbmf_from_singular_values(std * values, shape, legacy=True).rank for std in (10.0, 0.02, 0.01, 0.005)]
    ours = [evbmf_from_singular_values(std * values, shape).rank for std in (10.0, 0.02, 0.01, 0.005)]
    assert legacy == [188, 192, 102, 45]
    assert ours == [187, 187, 187, 187]


def test_legacy_finds_signal_in_small_noise():
    noise = 0.001 * np.random.default_rng(0).normal(size=(128, 1152))
    assert vbmf(noise, legacy=True) > 0
    assert vbmf(noise) == 0


def test_legacy_uses_the_approximate_threshold():
    low, high, alpha = 20, 200, 0.1
    tau = 2.5129 * math.sqrt(alpha)
    expected = math.sqrt(high * 2.0 * (1 + tau) * (1 + alpha / tau))
    ours, legacy = (
        evbmf_from_singular_values(np.ones(low), (low, high), sigma2=2.0, legacy=legacy) for legacy in (False, True)
    )
    assert legacy.threshold == pytest.approx(expected, rel=1e-14)
    assert 1.003 < ours.threshold / legacy.threshold < 1.0104


def test_legacy_accepts_a_bounded_rank():
    matrix = planted((40, 90), 7, 1.0)
    assert evbmf(matrix, legacy=True, max_rank=12).rank == 7
    assert evbmf(matrix, legacy=True, max_rank=3).rank == 3


# Errors


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_noise_variance_that_is_not_positive_is_refused(bad):
    with pytest.raises(LowRankError, match=r"noise variance sigma2 is .*expected a positive number"):
        vbmf(np.eye(3), bad)


def test_a_rank_bound_below_one_is_refused():
    with pytest.raises(LowRankError, match=r"max_rank is 0, expected at least 1"):
        evbmf(np.eye(3), max_rank=0)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [2.0, 1.0], [1.0, np.nan, 0.5], [1.0, 0.5, -0.1]])
def test_singular_values_that_do_not_fit_are_refused(values):
    with pytest.raises(LowRankError, match=r"expected 3 non-negative singular values in descending order"):
        evbmf_from_singular_values(np.array(values), (3, 5))

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank import linalg
from onnx_lowrank.linalg import (
    fix_signs,
    fold,
    gram,
    leading_basis,
    mode_dot,
    relative_residual,
    singular_values,
    squared_norm,
    tail_energy,
    truncated_svd,
    unfold,
)

SHAPES = [(5, 12), (12, 5), (6, 6), (1, 7), (7, 1), (1, 1)]

GRAM = 1e-7
"""Relative to the largest: singular values by a Gram matrix are exact down to sqrt(eps), about 1.5e-8."""


def matrix_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def of_rank(rank, shape=(8, 20), seed=0):
    return matrix_of((shape[0], rank), seed) @ matrix_of((rank, shape[1]), seed + 1)


# --- unfolding ----------------------------------------------------------------------------------------------------


def test_unfolding_puts_a_mode_in_the_rows_and_the_others_in_their_order():
    tensor = np.arange(24).reshape(2, 3, 4)
    assert unfold(tensor, 0).tolist() == [list(range(12)), list(range(12, 24))]
    assert unfold(tensor, 1)[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert unfold(tensor, 2)[3].tolist() == [3, 7, 11, 15, 19, 23]


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 1, 2, 3), (4, 2), (2, 3, 1, 2, 2)])
def test_folding_undoes_unfolding_along_every_mode(shape):
    tensor = matrix_of(shape)
    for mode in range(len(shape)):
        assert np.array_equal(fold(unfold(tensor, mode), mode, shape), tensor)


@pytest.mark.parametrize(("mode", "formula"), [(0, "pi,ijk->pjk"), (1, "pj,ijk->ipk"), (2, "pk,ijk->ijp")])
def test_a_mode_product_is_the_sum_over_that_mode(mode, formula):
    tensor = matrix_of((2, 3, 4))
    matrix = matrix_of((5, tensor.shape[mode]), 1)
    assert np.allclose(mode_dot(tensor, matrix, mode), np.einsum(formula, matrix, tensor), rtol=1e-13, atol=1e-13)


def test_a_mode_product_is_a_product_with_the_unfolding():
    tensor, matrix = matrix_of((2, 3, 4)), matrix_of((5, 3), 1)
    assert np.allclose(unfold(mode_dot(tensor, matrix, 1), 1), matrix @ unfold(tensor, 1), rtol=1e-13)


# --- norms and Gram matrices --------------------------------------------------------------------------------------


def test_a_squared_norm_of_half_precision_is_summed_in_float64():
    ones = np.full(100_000, 100.0, dtype=np.float16)  # a square alone, 10,000, times seven is beyond float16
    assert squared_norm(ones) == 1e9
    assert squared_norm(np.full((3, 4), 0.1, dtype=np.float32)) == pytest.approx(12 * float(np.float32(0.1)) ** 2)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_the_size_of_a_chunk_changes_no_result(monkeypatch, chunk):
    matrix, left, right = matrix_of((6, 25)), matrix_of((6, 3), 1), matrix_of((3, 25), 2)
    monkeypatch.setattr(linalg, "CHUNK", chunk)
    assert squared_norm(matrix) == pytest.approx(np.sum(matrix**2), rel=1e-13)
    assert np.allclose(gram(matrix), matrix @ matrix.T, rtol=1e-12, atol=1e-12)
    assert np.allclose(gram(matrix.T), matrix.T @ matrix, rtol=1e-12, atol=1e-12)
    expected = np.linalg.norm(matrix - left @ right) / np.linalg.norm(matrix)
    assert relative_residual(matrix, left, right) == pytest.approx(expected, rel=1e-12)
    assert np.allclose(singular_values(matrix), np.linalg.svd(matrix, compute_uv=False), rtol=1e-10)
    for shape in ((6, 25), (25, 6)):
        whole = np.matmul(*truncated_svd(matrix.reshape(shape), 6))
        assert np.allclose(whole, matrix.reshape(shape), rtol=1e-12, atol=1e-12)


def test_a_residual_is_zero_for_a_matrix_of_zeros_and_one_for_no_approximation():
    zeros = np.zeros((3, 4))
    assert relative_residual(zeros, np.zeros((3, 1)), np.zeros((1, 4))) == 0
    assert relative_residual(matrix_of((3, 4)), np.zeros((3, 1)), np.zeros((1, 4))) == 1


def test_a_tiny_residual_is_taken_from_the_difference_itself():
    """By the difference of two energies, it would be lost in their rounding."""
    matrix = np.diag([1.0, 1e-10])
    assert relative_residual(matrix, np.array([[1.0], [0.0]]), np.array([[1.0, 0.0]])) == pytest.approx(1e-10, rel=1e-9)


# --- singular values and vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16])
def test_singular_values_are_those_of_numpy_in_descending_order(shape, dtype):
    matrix = matrix_of(shape).astype(dtype)
    values = singular_values(matrix)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert values.dtype == np.float64
    assert values.shape == (min(shape),)
    assert np.allclose(values, expected, rtol=0, atol=GRAM * expected[0])
    assert (np.diff(values) <= 0).all()


def test_singular_values_of_a_deficient_matrix_end_in_zeros_and_never_in_nan():
    values = singular_values(of_rank(3))
    assert (values[:3] > 0.1).all()
    assert (values[3:] <= GRAM * values[0]).all()
    assert not singular_values(np.zeros((3, 5))).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_leading_basis_is_that_of_numpy_up_to_signs(shape):
    matrix = matrix_of(shape)
    left = np.linalg.svd(matrix, full_matrices=False)[0]
    for rank in range(1, min(shape) + 1):
        basis = leading_basis(matrix, rank)
        assert basis.shape == (shape[0], rank)
        assert np.allclose(basis.T @ basis, np.eye(rank), rtol=0, atol=1e-12)
        assert np.allclose(np.abs(np.sum(basis * left[:, :rank], axis=0)), 1, rtol=0, atol=1e-9)


@pytest.mark.parametrize("matrix", [np.zeros((4, 6)), of_rank(2, (4, 6)), matrix_of((4, 2))], ids=["0", "2", "tall"])
def test_a_basis_is_orthonormal_beyond_the_rank_of_the_matrix_too(matrix):
    basis = leading_basis(matrix, 4)
    assert np.allclose(basis.T @ basis, np.eye(4), rtol=0, atol=1e-12)
    assert np.allclose(basis @ basis.T @ matrix, matrix, rtol=0, atol=1e-12)


def test_the_entry_of_largest_magnitude_of_each_column_is_made_positive():
    vectors = np.array([[1.0, -3.0, 0.0], [-2.0, 2.0, 0.0]])
    fixed = fix_signs(vectors)
    assert fixed.tolist() == [[-1.0, 3.0, 0.0], [2.0, -2.0, 0.0]]
    assert np.array_equal(fix_signs(fixed), fixed)
    assert np.array_equal(fix_signs(-vectors), fixed)


def test_a_basis_does_not_depend_on_the_sign_of_the_matrix():
    matrix = matrix_of((5, 9))
    assert np.array_equal(leading_basis(matrix, 3), leading_basis(-matrix, 3))
    pivots = leading_basis(matrix, 3)[np.abs(leading_basis(matrix, 3)).argmax(axis=0), range(3)]
    assert (pivots > 0).all()


# --- truncated singular value decomposition -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_a_truncation_is_as_near_as_any_matrix_of_its_rank_can_be(shape, dtype):
    matrix = matrix_of(shape).astype(dtype)
    wide = matrix.astype(np.float64)
    u, s, vt = np.linalg.svd(wide, full_matrices=False)
    for rank in range(1, min(shape) + 1):
        left, right = truncated_svd(matrix, rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert left.dtype == right.dtype == np.float64
        assert np.allclose(left @ right, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=0, atol=1e-8 * s[0])
        tail = np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
        assert relative_residual(matrix, left, right) == pytest.approx(tail, abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_both_factors_carry_the_square_root_of_the_singular_values(shape):
    matrix = matrix_of(shape)
    left, right = truncated_svd(matrix, 4)
    values = np.linalg.svd(matrix, compute_uv=False)[:4]
    assert np.allclose(left.T @ left, np.diag(values), rtol=0, atol=1e-8)
    assert np.allclose(right @ right.T, np.diag(values), rtol=0, atol=1e-8)


def test_a_kernel_of_half_precision_has_factors_that_fit_it_too():
    matrix = 3e4 * np.sign(matrix_of((64, 64)))  # its norm, 1.9e6, is far beyond the 65,504 of float16
    factors = truncated_svd(matrix.astype(np.float16), 64)
    assert max(np.abs(factor).max() for factor in factors) < 65_504
    assert np.abs(truncated_svd(matrix, 64)[0] @ truncated_svd(matrix, 64)[1] - matrix).max() < 1e-6


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_a_planted_rank_is_recovered_exactly_and_surplus_directions_are_harmless(shape):
    matrix = of_rank(3, shape)
    for rank in (3, 5, 8):
        left, right = truncated_svd(matrix, rank)
        assert relative_residual(matrix, left, right) < 1e-13
        assert np.isfinite(left).all() and np.isfinite(right).all()
    assert relative_residual(matrix, *truncated_svd(matrix, 2)) > 0.1


def test_a_matrix_of_zeros_has_finite_factors_whose_product_is_zero():
    left, right = truncated_svd(np.zeros((3, 5)), 2)
    assert np.isfinite(left).all()
    assert not (left @ right).any()


def test_directions_of_widely_different_size_are_exact_together_at_full_rank():
    """The Gram matrix cannot tell singular values under 1.5e-8 of the largest apart, and need not."""
    u, v = np.linalg.qr(matrix_of((6, 6)))[0], np.linalg.qr(matrix_of((9, 6), 1))[0]
    values = np.array([1.0, 1e-2, 1e-5, 1e-8, 1e-10, 1e-12])
    matrix = (u * values) @ v.T
    left, right = truncated_svd(matrix, 6)
    assert np.abs(left @ right - matrix).max() < 1e-15
    assert relative_residual(matrix, *truncated_svd(matrix, 3)) == pytest.approx(1e-8, rel=0.01)


# --- tails --------------------------------------------------------------------------------------------------------


def test_the_tail_begins_with_all_of_the_energy_and_ends_with_none():
    assert tail_energy(np.array([3.0, 2.0, 1.0])).tolist() == pytest.approx([1, 5 / 14, 1 / 14, 0])
    assert tail_energy(np.zeros(3)).tolist() == [0, 0, 0, 0]
    assert tail_energy(np.array([])).tolist() == [0]


def test_a_small_tail_keeps_its_digits():
    """Summed from the end: as one minus the head it would be zero."""
    tails = tail_energy(np.array([1.0, 1e-9, 1e-9]))
    assert tails[1:] == pytest.approx([2e-18, 1e-18, 0], rel=1e-12)

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.decompositions.cp_algebra import (
    balance,
    component_norms,
    compose,
    contract_first,
    khatri_rao,
    mttkrp_first,
    mttkrp_rest,
    relative_residual,
    ridge_solve,
)
from onnx_lowrank.decompositions.cp_algorithms import Fit, als, error_preserving_correction, tensor_power
from onnx_lowrank.decompositions.cp_starts import compress, full_rank, generic_rank, orthogonal_terms, pencil_start

LETTERS = "abcde"


def dense(factors):
    """The tensor of CP factors, by einsum alone."""
    modes = LETTERS[: len(factors)]
    return np.einsum(",".join(f"{m}r" for m in modes) + "->" + modes, *factors)


def distance(tensor, factors):
    return np.linalg.norm(tensor - dense(factors)) / np.linalg.norm(tensor)


def squared_norms(factors):
    return float(np.square(component_norms(factors)).sum())


def draw(shape, rank, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, rank)) for n in shape]


def border():
    """a(x)a(x)b + a(x)b(x)a + b(x)a(x)a: rank 3, yet a limit of tensors of rank 2 whose components diverge."""
    a, b = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 2)))[0].T
    tensor = sum(np.einsum("i,j,k->ijk", *vectors) for vectors in [(a, a, b), (a, b, a), (b, a, a)])
    return tensor / np.sqrt(3)


def test_khatri_rao_columns_are_kronecker_products():
    a, b, c = draw((2, 3, 4), 5)
    product = khatri_rao([a, b, c])
    for r in range(5):
        np.testing.assert_allclose(product[:, r], np.kron(np.kron(a[:, r], b[:, r]), c[:, r]), rtol=1e-14)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 2, 3, 5), (3, 2, 2, 2, 4)])
def test_products_with_the_khatri_rao_product_match_einsum(shape):
    factors = draw(shape, 6)
    tensor = np.random.default_rng(1).standard_normal(shape)
    modes = LETTERS[: len(shape)]
    np.testing.assert_allclose(compose(factors), dense(factors), atol=1e-12)
    assert relative_residual(tensor, factors) == pytest.approx(distance(tensor, factors), rel=1e-12)
    partial = contract_first(tensor, factors[0])
    for mode, letter in enumerate(modes):
        others = [i for i in range(len(shape)) if i != mode]
        terms = ",".join([modes, *(f"{modes[i]}r" for i in others)])
        expected = np.einsum(f"{terms}->{letter}r", tensor, *(factors[i] for i in others))
        found = mttkrp_rest(partial, factors[1:], mode - 1) if mode else mttkrp_first(tensor, factors[1:])
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_singular_gram_matrix_gives_a_finite_solution_of_the_consistent_equations():
    half = np.random.default_rng(0).standard_normal((6, 3))
    gram = half @ half.T
    solution = ridge_solve(np.ones((2, 6)) @ gram, gram, 0.0)
    np.testing.assert_allclose(solution @ gram, np.ones((2, 6)) @ gram, rtol=1e-6)
    # with the smallest shift on its diagonal this one is exactly singular, and elimination stops
    unlucky = np.ones((2, 2)) - 2 * np.finfo(float).eps * np.eye(2)
    np.testing.assert_allclose(ridge_solve(np.ones((3, 2)), unlucky, 0.0), np.full((3, 2), 0.5), rtol=1e-12)


@pytest.mark.parametrize("shape", [(7, 4, 5), (20, 3, 2), (5, 2, 3, 4)])
def test_compression_is_orthogonal_and_loses_nothing(shape):
    tensor = np.random.default_rng(0).standard_normal(shape)
    core, bases = compress(tensor)
    modes, small = LETTERS[: len(shape)], LETTERS[: len(shape)].upper()
    terms = ",".join([small, *(f"{m}{s}" for m, s in zip(modes, small, strict=True))])
    np.testing.assert_allclose(np.einsum(f"{terms}->{modes}", core, *bases), tensor, atol=1e-13)
    for basis in bases:
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-13)
    assert core.shape[0] == min(shape[0], int(np.prod(shape[1:])))


def test_compression_drops_the_directions_that_a_planted_tensor_lacks():
    core, _ = compress(dense(draw((9, 8, 7), 3)))
    assert core.shape == (3, 3, 3)


@pytest.mark.parametrize("fixed", [0, -1])
@pytest.mark.parametrize("shape", [(5, 3, 4), (2, 6, 3), (4, 7, 5), (4, 3, 2, 5), (3, 2, 3, 2, 4)])
def test_the_terms_of_the_closed_form_are_orthogonal_and_add_up_to_the_tensor(shape, fixed):
    tensor = np.random.default_rng(0).standard_normal(shape)
    terms = orthogonal_terms(tensor, fixed)
    count = terms.energies.size
    factors = terms.factors(count)
    single = np.array([dense([factor[:, [r]] for factor in factors]).ravel() for r in range(count)])
    overlap = single @ single.T
    np.testing.assert_allclose(overlap, np.diag(np.diag(overlap)), atol=1e-12)
    for rank in (1, count // 3, count // 2, count - 1, count):
        assert np.sqrt(terms.errors[rank]) == pytest.approx(distance(tensor, terms.factors(rank)), abs=1e-13)
    assert np.all(np.diff(terms.errors) <= 0)


@pytest.mark.parametrize("shape", [(5, 3, 4), (64, 9, 3), (3, 9, 20), (2, 25, 2), (4, 3, 2, 5), (3, 2, 3, 2, 4)])
def test_the_better_closed_form_is_complete_at_full_rank_and_not_before(shape):
    tensor = np.random.default_rng(0).standard_normal(shape)
    counts = [orthogonal_terms(tensor, fixed).energies.size for fixed in (0, -1)]
    assert full_rank(shape) == min(counts)


def test_the_generic_rank_counts_parameters_and_knows_matrices():
    assert generic_rank((3, 3, 3)) == pytest.approx(27 / 7)
    assert generic_rank((64, 9, 3)) == 27
    assert generic_rank((2, 25, 2)) == 4
    assert generic_rank((20, 9, 3)) == 20


def test_zero_columns_follow_when_a_rank_exceeds_the_terms():
    tensor = np.random.default_rng(0).standard_normal((2, 2, 2))
    factors = orthogonal_terms(tensor, 0).factors(7)
    assert distance(tensor, factors) < 1e-14
    assert not np.any(factors[0][:, 4:])


@pytest.mark.parametrize("shape", [(8, 9, 7), (10, 3, 9), (8, 3, 3, 7)])
def test_alternating_least_squares_finds_planted_components(shape):
    truth = draw(shape, 4)
    tensor = dense(truth)
    fit = als(tensor, draw(shape, 4, seed=3), iterations=1000, tolerance=1e-6, ridge=0.05)
    assert fit.converged
    assert distance(tensor, fit.factors) < 1e-8
    # not only the sum: CP components are unique, so each of them is found
    found, planted = balance(fit.factors), balance(truth)
    for mine, theirs in zip(found, planted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_the_error_never_rises_and_is_the_distance_of_the_factors():
    tensor = np.random.default_rng(0).standard_normal((12, 9, 10))
    start = draw((12, 9, 10), 20)
    fit = als(tensor, start, iterations=60, tolerance=0.0, ridge=0.05)
    assert len(fit.history) == 60
    assert np.all(np.diff(fit.history) <= 0)
    assert fit.history[-1] < 0.8 * fit.history[1]
    assert fit.relative_error == pytest.approx(distance(tensor, fit.factors), rel=1e-12)
    assert fit.relative_error == pytest.approx(fit.history[-1], rel=1e-4)
    assert not als(tensor, start, iterations=10, tolerance=0.0, ridge=0.05).converged


def test_extrapolation_beats_plain_sweeps(monkeypatch):
    tensor = np.random.default_rng(0).standard_normal((16, 9, 16))
    start = orthogonal_terms(tensor, 0).factors(32)
    ours = als(tensor, start, iterations=60, tolerance=0.0, ridge=0.05)
    monkeypatch.setattr("onnx_lowrank.decompositions.cp_algorithms._Anderson.next", lambda self, before, after: after)
    plain = als(tensor, start, iterations=60, tolerance=0.0, ridge=0.05)
    assert ours.relative_error < 0.99 * plain.relative_error


def test_repeated_and_empty_components_stay_finite():
    tensor = np.random.default_rng(0).standard_normal((6, 4, 5))
    start = [np.concatenate([factor, factor, np.zeros((len(factor), 2))], axis=1) for factor in draw((6, 4, 5), 3)]
    fit = als(tensor, start, iterations=50, tolerance=1e-4, ridge=0.05)
    assert all(np.isfinite(factor).all() for factor in fit.factors)
    assert fit.relative_error < 0.9


def test_the_ridge_holds_a_degenerate_fit_near_the_limit():
    start = draw((6, 6, 6), 2, seed=1)
    free = als(border(), start, iterations=300, tolerance=1e-6, ridge=0.0)
    held = als(border(), start, iterations=300, tolerance=1e-6, ridge=0.05, norm_limit=10.0)
    assert squared_norms(free.factors) > 1000
    assert 5 < squared_norms(held.factors) < 25
    assert free.relative_error < held.relative_error < 0.02


@pytest.mark.parametrize("shape, rank", [((9, 7, 8), 5), ((9, 2, 8), 8), ((9, 3, 2, 8), 4), ((12, 3, 3, 2, 10), 6)])
def test_the_pencil_start_is_exact_for_a_planted_rank_and_for_any_above(shape, rank):
    tensor = dense(draw(shape, rank))
    core, bases = compress(tensor)
    for asked in (rank, rank + 3):
        factors = pencil_start(core, asked)
        assert factors is not None and factors[0].shape[1] == asked
        assert distance(tensor, [basis @ factor for basis, factor in zip(bases, factors, strict=True)]) < 1e-8


def test_the_pencil_start_survives_rounding_to_float32_and_declines_a_generic_tensor():
    tensor = dense(draw((12, 9, 10), 6)).astype(np.float32).astype(np.float64)
    core, _ = compress(tensor)
    factors = pencil_start(core, 6)
    assert factors is not None and distance(core, factors) < 1e-5
    assert pencil_start(core, 5) is None
    noise, _ = compress(np.random.default_rng(0).standard_normal((6, 4, 6)))
    assert pencil_start(noise, 6) is None


def test_every_component_of_the_tensor_power_method_lowers_the_residual():
    tensor = np.random.default_rng(0).standard_normal((8, 3, 3, 7))
    fit = tensor_power(tensor, 12, iterations=100, tolerance=1e-6)
    errors = np.array([1.0, *fit.history])
    assert np.all(np.diff(errors) < 0)
    for rank in (1, 5, 12):
        assert errors[rank] == pytest.approx(distance(tensor, [factor[:, :rank] for factor in fit.factors]), rel=1e-10)
    assert squared_norms(fit.factors) < 1.5 * np.square(np.linalg.norm(tensor))


def test_the_tensor_power_method_finds_orthogonal_components_one_by_one():
    bases = [np.linalg.qr(factor)[0] for factor in draw((8, 5, 6), 3)]
    tensor = dense([bases[0] * [3.0, 2.0, 1.0], *bases[1:]])
    fit = tensor_power(tensor, 3, iterations=100, tolerance=1e-12)
    np.testing.assert_allclose(component_norms(fit.factors), [3.0, 2.0, 1.0], rtol=1e-6)
    assert fit.converged and fit.relative_error < 1e-6
    assert not tensor_power(
        np.random.default_rng(0).standard_normal((8, 5, 6)), 3, iterations=1, tolerance=0.0
    ).converged


def test_error_preserving_correction_lowers_the_norms_within_its_bound():
    start = draw((6, 6, 6), 2, seed=1)
    fit = als(border(), start, iterations=12, tolerance=0.0, ridge=0.0)
    # two components that cancel each other almost, as a diverging fit has them
    noisy = [np.concatenate([f, g, g], axis=1) for f, g in zip(fit.factors, draw((6, 6, 6), 1), strict=True)]
    noisy[0][:, -1] *= -0.999
    before = Fit(tuple(noisy), relative_residual(border(), noisy))
    after = error_preserving_correction(border(), before, slack=1e-3)
    assert after.relative_error <= 1.001 * before.relative_error
    assert distance(border(), after.factors) == pytest.approx(after.relative_error, rel=1e-9)
    assert squared_norms(after.factors) < 0.2 * squared_norms(before.factors)


def test_error_preserving_correction_uses_its_slack_and_no_more():
    tensor = np.random.default_rng(0).standard_normal((8, 9, 7))
    fit = als(tensor, draw((8, 9, 7), 12), iterations=200, tolerance=1e-4, ridge=0.0)
    last = np.inf
    for slack in (1e-3, 1e-2, 1e-1):
        after = error_preserving_correction(tensor, fit, slack=slack)
        assert fit.relative_error < after.relative_error <= (1 + slack) * fit.relative_error
        assert squared_norms(after.factors) < min(last, squared_norms(fit.factors))
        last = squared_norms(after.factors)


def test_an_exact_fit_is_left_alone_by_the_correction():
    truth = draw((6, 5, 4), 2)
    fit = Fit(tuple(truth), 0.0)
    assert error_preserving_correction(dense(truth), fit) is fit


def test_balance_keeps_the_tensor_and_does_not_depend_on_scale_order_or_sign():
    factors = draw((6, 3, 4, 5), 4)
    balanced = balance(factors)
    np.testing.assert_allclose(dense(balanced), dense(factors), atol=1e-12)
    norms = [np.linalg.norm(factor, axis=0) for factor in balanced]
    for norm in norms[1:]:
        np.testing.assert_allclose(norm, norms[0], rtol=1e-12)
    assert np.all(np.diff(norms[0]) <= 0)
    for factor in balanced[1:]:
        assert np.all(factor[np.abs(factor).argmax(axis=0), np.arange(4)] > 0)
    order = [2, 0, 3, 1]
    changed = [(factor * scale)[:, order] for factor, scale in zip(factors, (-4.0, -0.5, 2.0, 0.25), strict=True)]
    for mine, theirs in zip(balance(changed), balanced, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)

"""Large kernels: singular values and factors by single precision and random numbers are held against exact ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank import randomized
from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.linalg import relative_residual, singular_values, tail_energy, truncated_svd
from onnx_lowrank.randomized import SLACK, exactly, low_rank, spectrum

RANK = 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 64 rows are large, and nothing is remembered from another test."""
    monkeypatch.setattr(randomized, "LARGE_SIDE", 64)
    randomized._spectra.clear()


def matrix(rows: int = 96, columns: int = 160, power: float = 0.5, seed: int = 0) -> np.ndarray:
    """Random, with singular values that fall as a power of their number."""
    rng = np.random.default_rng([seed, rows, columns])
    values = rng.standard_normal((rows, columns)) * (np.arange(1, rows + 1) ** -power)[:, None]
    return values.astype(np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_singular_values_are_right_to_a_millionth_of_the_largest_energy(shape: tuple[int, int], scale: float) -> None:
    values = np.float32(scale) * matrix(*shape)
    exact = singular_values(values)
    assert np.abs(spectrum(values) ** 2 - exact**2).max() < 1e-6 * exact[0] ** 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_kernels_in_half_precision_are_read_as_they_are(dtype: np.dtype) -> None:
    values = matrix().astype(dtype)
    exact = singular_values(values)
    assert np.abs(spectrum(values) ** 2 - exact**2).max() < 1e-6 * exact[0] ** 2
    left, right, error = low_rank(values, RANK, rng())
    assert error == pytest.approx(relative_residual(values.astype(np.float64), left, right), rel=1e-4)


def test_a_spectrum_is_computed_once_for_a_matrix_and_its_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    first = spectrum(matrix())
    monkeypatch.setattr(randomized, "_eigenvalues", None)
    assert spectrum(matrix()) is first
    assert spectrum(matrix().T) is first
    with pytest.raises(TypeError):
        spectrum(matrix(seed=1))


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("rank", [1, RANK, 32])
def test_the_error_is_within_one_percent_of_the_least_and_is_told_as_it_is(
    shape: tuple[int, int], power: float, rank: int
) -> None:
    values = matrix(*shape, power=power)
    left, right, error = low_rank(values, rank, rng())
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    least = tail_energy(singular_values(values))[rank]
    residual = relative_residual(values, left.astype(np.float64), right.astype(np.float64))
    assert residual == pytest.approx(error, rel=1e-4)
    assert least * (1 - 1e-4) <= residual**2 <= least * SLACK * (1 + 1e-4)


def test_both_factors_carry_the_roots_of_the_singular_values() -> None:
    left, right, _ = low_rank(matrix(), RANK, rng())
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-3)
    pivots = left[np.abs(left).argmax(axis=0), np.arange(RANK)]
    assert (pivots > 0).all()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    first, again, other = (low_rank(matrix(), RANK, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def exact_bytes(values: np.ndarray, rank: int) -> list[bytes]:
    left, right = truncated_svd(values, rank)
    return [left.tobytes(), right.tobytes(), relative_residual(values, left, right).hex().encode()]


def bytes_of(values: np.ndarray, rank: int) -> list[bytes]:
    left, right, error = low_rank(values, rank, rng())
    return [left.tobytes(), right.tobytes(), error.hex().encode()]


def test_a_random_range_was_taken_where_it_should_be() -> None:
    assert bytes_of(matrix(), RANK) != exact_bytes(matrix(), RANK)


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        (matrix(48, 160), RANK),  # a short side that is small
        (matrix().astype(np.float64), RANK),
        (matrix(), 60),  # more than half of the short side
        (matrix(power=4.0), RANK),  # nothing is left beyond the rank
        (np.zeros((96, 160), np.float32), RANK),
    ],
    ids=["small", "double", "high rank", "low-rank matrix", "zero"],
)
def test_the_eigensolver_does_what_is_not_for_random_numbers(values: np.ndarray, rank: int) -> None:
    assert bytes_of(values, rank) == exact_bytes(values, rank)


def test_the_eigensolver_does_all_where_that_is_asked_for() -> None:
    with exactly():
        assert bytes_of(matrix(), RANK) == exact_bytes(matrix(), RANK)
        assert spectrum(matrix()).tobytes() == singular_values(matrix()).tobytes()
    with exactly(False):
        assert bytes_of(matrix(), RANK) != exact_bytes(matrix(), RANK)


def test_the_eigensolver_steps_in_where_the_range_does_not_come_near_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomized, "PASSES", 1)
    assert bytes_of(matrix(), RANK) == exact_bytes(matrix(), RANK)


def test_columns_that_miss_the_leading_vectors_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(products: np.ndarray, block: np.ndarray, shift: float, rank: int, least: float) -> np.ndarray:
        return np.linalg.qr(block[:, :rank])[0]

    monkeypatch.setattr(randomized, "_leading", poor)
    assert bytes_of(matrix(), RANK) == exact_bytes(matrix(), RANK)


def test_a_decomposition_of_a_large_kernel_is_within_the_bound_of_what_it_foretold() -> None:
    svd, weight = DECOMPOSITIONS["svd"], matrix()
    foretold = svd.errors([weight], [(RANK,)])[0]
    made = svd.factorize([weight], (RANK,), rng=rng())
    assert foretold * (1 - 1e-4) <= made.relative_error**2 <= SLACK * foretold * (1 + 1e-4)

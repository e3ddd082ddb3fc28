"""One contract for every member of the table, and the grammar of the command line."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from onnx_lowrank.ranks import RANK_ESTIMATORS, energy, parse_estimator, ratio, vbmf, weakened_vbmf
from onnx_lowrank.types import LowRankError

NAMES = "vbmf, energy, ratio, break_even, weakened_vbmf"


@pytest.fixture(params=list(RANK_ESTIMATORS))
def estimator(request):
    return RANK_ESTIMATORS[request.param]


def kernel():
    rng = np.random.default_rng(3)
    signal = rng.normal(size=(48, 9)) @ rng.normal(size=(9, 150))
    return (0.01 * (signal + 0.3 * rng.normal(size=signal.shape))).astype(np.float32)


def test_a_compressible_kernel_gets_a_whole_rank_between_one_and_full(estimator):
    rank = estimator(kernel())
    assert type(rank) is int
    assert 0 < rank < 48


def test_either_orientation_and_memory_order_gives_the_same_rank(estimator):
    assert estimator(kernel().T) == estimator(np.ascontiguousarray(kernel().T)) == estimator(kernel())


def test_the_scale_does_not_matter(estimator):
    assert estimator(np.float32(1e-3) * kernel()) == estimator(np.float32(1e3) * kernel()) == estimator(kernel())


def test_the_matrix_is_left_as_it_was(estimator):
    matrix = kernel()
    before = matrix.tobytes()
    estimator(matrix)
    assert matrix.tobytes() == before


@pytest.mark.parametrize("shape", [(4, 7), (1, 5), (5, 1), (1, 1), (6, 6)])
def test_a_matrix_of_zeros_has_rank_zero(estimator, shape):
    assert estimator(np.zeros(shape)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(estimator, bad):
    matrix = kernel()
    matrix[2, 3] = bad
    with pytest.raises(LowRankError, match=r"matrix \(48, 150\) holds NaN or infinity"):
        estimator(matrix)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 5), ()])
def test_what_is_not_a_matrix_is_refused(estimator, shape):
    with pytest.raises(LowRankError, match=r"needs a matrix \(m, n\), got shape .* unfold the kernel first"):
        estimator(np.ones(shape))


def test_complex_numbers_are_refused(estimator):
    with pytest.raises(LowRankError, match=r"needs real numbers, got dtype complex128"):
        estimator(np.ones((2, 2), dtype=complex))


# The grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("energy=0.5", lambda matrix: energy(matrix, 0.5)),
        ("ratio = 2.5e-1", lambda matrix: ratio(matrix, 0.25)),
        ("vbmf=1e-7", lambda matrix: vbmf(matrix, 1e-7)),
        ("weakened_vbmf=0.2", lambda matrix: weakened_vbmf(matrix, 0.2)),
    ],
)
def test_a_value_is_handed_to_the_estimator(text, expected):
    name = text.split("=")[0].strip()
    assert parse_estimator(text)(kernel()) == expected(kernel()) != parse_estimator(name)(kernel())


@pytest.mark.parametrize("name", list(RANK_ESTIMATORS))
def test_a_name_alone_is_the_estimator_with_its_default(name):
    assert parse_estimator(f" {name} ") is RANK_ESTIMATORS[name]


def test_a_parsed_estimator_can_be_sent_to_another_process():
    parsed = parse_estimator("energy=0.5")
    assert pickle.loads(pickle.dumps(parsed))(kernel()) == parsed(kernel())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("svd", "there is no 'svd'"),
        ("", "there is no ''"),
        ("=0.5", "there is no ''"),
        ("VBMF", "there is no 'VBMF'"),
        ("energy=high", "could not convert string to float: 'high'"),
        ("energy=", "could not convert string to float: ''"),
        ("energy=0.5=0.6", "could not convert string to float: '0.5=0.6'"),
        ("energy=95", r"the share of energy to keep is 95.0, expected a number above 0 and up to 1"),
        ("ratio=nan", r"the share of the full rank is nan, expected"),
        ("vbmf=-1", r"the noise variance sigma2 is -1.0, expected a positive number"),
        ("weakened_vbmf=2", r"the weakening factor is 2.0, expected"),
        ("break_even=3", "break_even takes no value"),
    ],
)
def test_a_text_that_names_no_estimator_says_why_and_lists_the_names_on_one_line(text, reason):
    with pytest.raises(LowRankError, match=reason) as caught:
        parse_estimator(text)
    message = str(caught.value)
    assert message.startswith(f"rank estimator {text!r}: ")
    assert message.endswith(f"give NAME or NAME=VALUE, with NAME one of {NAMES}")
    assert "\n" not in message

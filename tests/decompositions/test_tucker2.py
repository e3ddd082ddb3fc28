from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from onnx_lowrank.decompositions.tucker2 import Tucker2
from onnx_lowrank.types import ConvSpec

PAIRS = [(1, 1), (2, 3), (3, 2), (5, 1), (1, 6), (4, 4), (8, 6)]


def weight_of(shape=(8, 6, 3, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def planted(r_out, r_in, shape=(8, 6, 3, 3), seed=1):
    """A kernel of these multilinear ranks."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal((r_out, r_in, *shape[2:]))
    outer, inner = rng.standard_normal((shape[0], r_out)), rng.standard_normal((shape[1], r_in))
    return np.einsum("abhw,oa,ib->oihw", core, outer, inner)


def factorize(weight, rank, member=None):
    return (member or Tucker2()).factorize([weight], rank, rng=np.random.default_rng(0))


def unfolded(weight, mode):
    return np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1)


def projected(weight, outer, inner):
    """`weight` projected on two orthonormal bases of its channels."""
    return np.einsum("oihw,op,ij->pjhw", weight, outer @ outer.T, inner @ inner.T)


def hosvd_error(weight, rank):
    """Relative error of the higher-order SVD, by numpy alone."""
    outer, inner = (np.linalg.svd(unfolded(weight, mode))[0][:, : rank[mode]] for mode in (0, 1))
    return np.linalg.norm(weight - projected(weight, outer, inner)) / np.linalg.norm(weight)


@pytest.mark.parametrize("rank", PAIRS)
def test_the_prediction_is_the_error_of_the_higher_order_svd(rank):
    weight = weight_of()
    assert Tucker2().errors([weight], [rank])[0] == pytest.approx(hosvd_error(weight, rank) ** 2, abs=1e-12)


def test_the_prediction_of_many_pairs_is_that_of_each():
    weight = weight_of()
    together = Tucker2().errors([weight], PAIRS)
    assert together == pytest.approx([Tucker2().errors([weight], [pair])[0] for pair in PAIRS], abs=0)


@pytest.mark.parametrize("rank", PAIRS)
def test_the_iterations_never_end_above_the_higher_order_svd(rank):
    for seed in range(5):
        weight = weight_of(seed=seed)
        assert factorize(weight, rank).relative_error <= hosvd_error(weight, rank) + 1e-12


def test_the_iterations_gain_something_on_a_kernel_without_structure():
    weight = weight_of()
    assert factorize(weight, (2, 2)).relative_error < 0.99 * hosvd_error(weight, (2, 2))


def test_more_sweeps_never_end_above_fewer():
    weight = weight_of(seed=4)
    errors = [factorize(weight, (2, 3), Tucker2(iterations=n, tolerance=0.0)).relative_error for n in (1, 2, 4, 8, 16)]
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("rank", [(2, 2), (3, 2), (5, 4)])
def test_no_turn_of_the_bases_comes_nearer_once_the_iterations_have_converged(rank):
    weight = weight_of()
    made = factorize(weight, rank, Tucker2(iterations=500, tolerance=1e-15))
    first, _, last = made.kernels[0]
    inner, outer = first[:, :, 0, 0].T, last[:, :, 0, 0]
    rng = np.random.default_rng(9)
    for size in np.repeat([1e-3, 1e-2, 0.1], 30):
        turned = [np.linalg.qr(basis + size * rng.standard_normal(basis.shape))[0] for basis in (outer, inner)]
        error = np.linalg.norm(weight - projected(weight, *turned)) / np.linalg.norm(weight)
        assert error > made.relative_error


def test_outer_kernels_are_orthonormal_so_that_the_core_carries_the_scale():
    first, core, last = factorize(1e3 * weight_of(), (3, 2)).kernels[0]
    assert np.allclose(first[:, :, 0, 0] @ first[:, :, 0, 0].T, np.eye(2), rtol=0, atol=1e-12)
    assert np.allclose(last[:, :, 0, 0].T @ last[:, :, 0, 0], np.eye(3), rtol=0, atol=1e-12)
    assert np.linalg.norm(core) < np.linalg.norm(1e3 * weight_of())


@pytest.mark.parametrize("rank", [(1, 1), (2, 4), (4, 2), (3, 3)])
def test_a_planted_pair_of_ranks_is_found_exactly_and_nothing_below_it_is(rank):
    weight = planted(*rank)
    made = factorize(weight, rank)
    assert made.relative_error < 1e-12
    assert made.converged
    assert Tucker2().errors([weight], [rank])[0] < 1e-12
    for below in ((rank[0] - 1, rank[1]), (rank[0], rank[1] - 1)):
        if min(below) > 0:
            assert factorize(weight, below).relative_error > 0.05


def test_the_estimator_is_asked_about_the_outputs_and_about_the_inputs():
    estimate = Tucker2().estimate_rank([planted(2, 4)], lambda matrix: int(np.linalg.matrix_rank(matrix)))
    assert estimate == (2, 4)


def test_equal_input_and_output_channels_of_one_direction_cost_the_other_nothing():
    """A kernel that reads one mixture of its inputs: exact at an input rank of 1, whatever the outputs."""
    weight = np.einsum("ohw,i->oihw", weight_of((8, 3, 3)), [1.0, -2.0, 0.5])
    assert factorize(weight, (8, 1)).relative_error < 1e-12
    assert factorize(weight, (7, 1)).relative_error > 1e-3


def test_the_highest_ranks_are_bounded_by_what_the_other_mode_can_feed():
    assert Tucker2().max_rank([ConvSpec((64, 32, 3, 3))]) == (64, 32)
    assert Tucker2().max_rank([ConvSpec((64, 2, 3, 3))]) == (18, 2)
    assert Tucker2().max_rank([ConvSpec((2, 64, 3))]) == (2, 6)


def test_stopping_early_is_said_with_what_to_try():
    weight = weight_of(seed=2)
    stopped = factorize(weight, (2, 2), Tucker2(iterations=1))
    assert not stopped.converged
    assert "after 1 sweeps: more of them, or a higher rank" in stopped.next_step
    done = factorize(weight, (2, 2), Tucker2(iterations=500))
    assert done.converged
    assert done.next_step == ""


def test_a_pointwise_kernel_is_refused():
    assert "svd says the same" in (Tucker2().refuses([ConvSpec((8, 6, 1, 1))]) or "")
    assert "svd says the same" in (Tucker2().refuses([ConvSpec((8, 6))]) or "")
    assert Tucker2().refuses([ConvSpec((8, 6, 1, 3))]) is None


def test_the_middle_stage_alone_spans_the_kernel():
    spec = ConvSpec((8, 6, 3, 3), strides=(2, 1), pads=(1, 0, 1, 0), dilations=(1, 2))
    first, core, last = (stage.spec for stage in Tucker2().chain([spec], (5, 4))[0])
    assert first == ConvSpec((4, 6, 1, 1))
    assert core == ConvSpec((5, 4, 3, 3), strides=(2, 1), pads=(1, 0, 1, 0), dilations=(1, 2))
    assert last == ConvSpec((8, 5, 1, 1))

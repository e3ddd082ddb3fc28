"""The decompositions that are a truncated SVD of one matrix: what matrix it is, and that nothing is nearer."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.decompositions.matrix import is_pointwise, pointwise
from onnx_lowrank.types import ConvSpec, Stage
from tests.reference import effective_kernel

WEIGHTS = {"svd": (8, 6), "channel_svd": (7, 4, 3, 2), "channel_svd_in": (4, 7, 3, 2), "spatial_svd": (5, 4, 3, 4)}

every_member = pytest.mark.parametrize("name", WEIGHTS)


def weight_of(name):
    return np.random.default_rng(3).standard_normal(WEIGHTS[name])


def by_hand(name: str, weight: np.ndarray) -> np.ndarray:
    """The matrix whose SVD it is, entry by entry."""
    if name in ("svd", "channel_svd"):
        return np.array([row.ravel() for row in weight])
    outputs, inputs, *kernel = weight.shape
    if name == "channel_svd_in":
        return np.array([weight[:, i].ravel() for i in range(inputs)])
    rows = [(i, h) for i in range(inputs) for h in range(kernel[0])]
    columns = [(o, w) for o in range(outputs) for w in range(kernel[1])]
    return np.array([[weight[o, i, h, w] for o, w in columns] for i, h in rows])


def composed(name: str, kernels) -> np.ndarray:
    """The kernel that the chain amounts to, in the order of the weight."""
    weight = weight_of(name)
    chain = DECOMPOSITIONS[name].chain([ConvSpec(weight.shape)], (kernels[0].shape[0],))[0]
    answers = effective_kernel(chain, kernels).swapaxes(0, 1)
    return answers[(..., *(slice(None, None, -1),) * (weight.ndim - 2))]


def factorize(name, weight, rank):
    made = DECOMPOSITIONS[name].factorize([weight], (rank,), rng=np.random.default_rng(0))
    return made.kernels[0], made.relative_error


def test_every_member_that_is_one_matrix_is_tested_here():
    others = {"tucker2", "cp3", "cp4", "separable", "joint_left", "joint_right", "joint_both"}
    assert set(WEIGHTS) == set(DECOMPOSITIONS) - others


@every_member
def test_the_error_of_every_rank_is_the_tail_of_the_matrix_that_the_chain_stands_for(name):
    weight = weight_of(name)
    values = np.linalg.svd(by_hand(name, weight), compute_uv=False)
    assert DECOMPOSITIONS[name].max_rank([ConvSpec(weight.shape)]) == (len(values),)
    for rank in range(1, len(values) + 1):
        tail = np.sum(values[rank:] ** 2) / np.sum(values**2)
        kernels, error = factorize(name, weight, rank)
        measured = np.linalg.norm(composed(name, kernels) - weight) / np.linalg.norm(weight)
        assert error**2 == pytest.approx(tail, abs=1e-12)
        assert measured**2 == pytest.approx(tail, abs=1e-12)
        assert DECOMPOSITIONS[name].errors([weight], [(rank,)])[0] == pytest.approx(tail, abs=1e-12)


def lowest_of_perturbations(name, weight, kernels) -> float:
    """Least error among 150 random perturbations of both kernels, of sizes from 1e-4 to 1."""
    rng = np.random.default_rng(5)
    errors = []
    for size in np.repeat([1e-4, 1e-3, 1e-2, 0.1, 1.0], 30):
        changed = [kernel + size * rng.standard_normal(kernel.shape) for kernel in kernels]
        errors.append(np.linalg.norm(composed(name, changed) - weight) / np.linalg.norm(weight))
    return min(errors)


@every_member
def test_no_perturbation_of_the_kernels_comes_nearer_to_the_weight(name):
    weight = weight_of(name)
    kernels, error = factorize(name, weight, 2)
    assert lowest_of_perturbations(name, weight, kernels) > error
    # the same perturbations do find something nearer where the kernels are not the best ones
    worse = [kernels[0], 0.9 * kernels[1]]
    off = np.linalg.norm(composed(name, worse) - weight) / np.linalg.norm(weight)
    assert off > error
    assert lowest_of_perturbations(name, weight, worse) < off


@every_member
def test_the_estimator_sees_the_matrix_that_is_factorised(name):
    seen = []

    def estimator(matrix):
        seen.append(matrix)
        return 3

    weight = weight_of(name)
    assert DECOMPOSITIONS[name].estimate_rank([weight], estimator) == (3,)
    expected = np.linalg.svd(by_hand(name, weight), compute_uv=False)
    assert np.allclose(np.linalg.svd(seen[0], compute_uv=False), expected)


@pytest.mark.parametrize(
    ("name", "weight_shape", "stages"),
    [
        ("svd", (64, 32), [(8, 32), (64, 8)]),
        ("svd", (64, 32, 1, 1), [(8, 32, 1, 1), (64, 8, 1, 1)]),
        ("channel_svd", (64, 32, 3, 5), [(8, 32, 3, 5), (64, 8, 1, 1)]),
        ("channel_svd_in", (64, 32, 3, 5), [(8, 32, 1, 1), (64, 8, 3, 5)]),
        ("spatial_svd", (64, 32, 3, 5), [(8, 32, 3, 1), (64, 8, 1, 5)]),
        ("spatial_svd", (64, 32, 3, 5, 2), [(8, 32, 3, 1, 1), (64, 8, 1, 5, 2)]),
    ],
)
def test_the_stages_have_the_shapes_of_the_papers(name, weight_shape, stages):
    (chain,) = DECOMPOSITIONS[name].chain([ConvSpec(weight_shape)], (8,))
    assert [stage.spec.weight_shape for stage in chain] == stages


def test_positions_that_a_stride_skips_are_skipped_by_the_first_stage_that_can():
    spec = ConvSpec((8, 6, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    strides = {
        name: [stage.spec.strides for stage in DECOMPOSITIONS[name].chain([spec], (2,))[0]]
        for name in ("channel_svd", "channel_svd_in", "spatial_svd")
    }
    assert strides == {
        "channel_svd": [(2, 2), (1, 1)],
        "channel_svd_in": [(1, 1), (2, 2)],
        "spatial_svd": [(2, 1), (1, 2)],
    }
    (first, second) = DECOMPOSITIONS["svd"].chain([ConvSpec((8, 6, 1, 1), strides=(2, 2))], (2,))[0]
    assert (first.spec.strides, second.spec.strides) == ((2, 2), (1, 1))


@pytest.mark.parametrize(
    ("name", "weight_shape", "reason"),
    [
        ("svd", (8, 6, 3, 3), "channel_svd is the SVD for it"),
        ("channel_svd", (8, 6, 1, 1), "svd is the SVD for it"),
        ("channel_svd_in", (8, 6), "svd is the SVD for it"),
        ("spatial_svd", (8, 6, 3), "no second spatial axis"),
        ("spatial_svd", (8, 6, 1, 3), "no second spatial axis"),
        ("spatial_svd", (8, 6, 3, 1), "no second spatial axis"),
        ("spatial_svd", (8, 6), "no second spatial axis"),
    ],
)
def test_a_kernel_of_the_wrong_form_is_refused(name, weight_shape, reason):
    assert reason in DECOMPOSITIONS[name].refuses([ConvSpec(weight_shape)])


def test_a_separable_kernel_has_rank_one():
    """An outer product of a column and a row, the same for every pair of channels, as in a blur."""
    weight = np.einsum("o,i,h,w->oihw", [1.0, -2.0], [3.0, 1.0, 2.0], [1.0, 2.0, 1.0], [1.0, 0.0, -1.0])
    for name in ("channel_svd", "channel_svd_in", "spatial_svd"):
        assert factorize(name, weight, 1)[1] < 1e-14
    # each channel to itself by a separable kernel: every split has three equal singular values
    itself = np.einsum("oi,h,w->oihw", np.eye(3), [1.0, 2.0, 1.0], [1.0, 0.0, -1.0])
    # one mixture of channels by a diagonal kernel: only the split in space does
    diagonal = np.einsum("o,i,hw->oihw", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], np.eye(3))
    for name in ("channel_svd", "channel_svd_in", "spatial_svd"):
        assert factorize(name, itself, 2)[1] ** 2 == pytest.approx(1 / 3)
        assert factorize(name, diagonal, 2)[1] ** 2 == pytest.approx(1 / 3 if name == "spatial_svd" else 0)


def test_a_matrix_becomes_a_pointwise_kernel_and_is_known_as_one():
    kernel = pointwise(np.arange(6.0).reshape(2, 3), 2)
    assert kernel.shape == (2, 3, 1, 1)
    assert kernel.ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert pointwise(np.ones((2, 3)), 0).shape == (2, 3)
    assert is_pointwise(ConvSpec(kernel.shape))
    assert is_pointwise(ConvSpec((2, 3)))
    assert not is_pointwise(ConvSpec((2, 3, 1, 3)))


def test_the_reference_composes_in_the_order_of_the_weight():
    """What the comparisons of this file rest on: a chain of one stage is its own kernel."""
    weight = weight_of("channel_svd")
    answers = effective_kernel((Stage(ConvSpec(weight.shape)),), (weight,))
    assert np.array_equal(answers.swapaxes(0, 1)[..., ::-1, ::-1], weight)

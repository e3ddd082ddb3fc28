"""Groups and transposed convolutions, against what each group alone and the plain convolution give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from onnx_lowrank.decompositions import DECOMPOSITIONS, lift
from onnx_lowrank.types import Chain, ConvSpec, Factorization, Stage
from tests.reference import convolve, run_chain

SPATIAL = ("channel_svd", "channel_svd_in", "spatial_svd", "tucker2", "cp3")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def factorize(name, spec, weight, rank):
    return lift.factorize(DECOMPOSITIONS[name], [spec], [weight], rank, rng=np.random.default_rng(0))


def low(name, spec):
    return tuple(max(1, min(4, r // 3)) for r in lift.max_rank(DECOMPOSITIONS[name], [spec]))


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPATIAL)
def test_each_group_is_factorised_alone(name):
    spec = ConvSpec((9, 4, 3, 3), group=3)
    weight = normal(9, 4, 3, 3)
    rank = low(name, spec)
    made = factorize(name, spec, weight, rank)
    rng = np.random.default_rng(0)
    for g in range(3):
        alone = DECOMPOSITIONS[name].factorize([weight[3 * g : 3 * g + 3]], rank, rng=rng)
        for kernel, part in zip(made.kernels[0], alone.kernels[0], strict=True):
            assert np.array_equal(np.split(kernel, 3)[g], part)


@pytest.mark.parametrize("name", SPATIAL)
def test_a_group_computes_the_same_within_the_layer_as_alone(name):
    spec = ConvSpec((6, 4, 3, 3), strides=(2, 1), pads=(1, 1, 1, 1), group=2)
    weight, x = normal(6, 4, 3, 3), normal(2, 8, 5, 4, seed=1)
    rank = low(name, spec)
    whole = run_chain(
        lift.chains(DECOMPOSITIONS[name], [spec], rank)[0], factorize(name, spec, weight, rank).kernels[0], x
    )
    one = lift.plain(spec)
    rng = np.random.default_rng(0)
    for g in range(2):
        made = DECOMPOSITIONS[name].factorize([weight[3 * g : 3 * g + 3]], rank, rng=rng)
        alone = run_chain(DECOMPOSITIONS[name].chain([one], rank)[0], made.kernels[0], x[:, 4 * g : 4 * g + 4])
        assert np.allclose(whole[:, 3 * g : 3 * g + 3], alone, rtol=1e-12, atol=1e-12)


def test_the_rank_is_that_of_one_group():
    assert lift.max_rank(DECOMPOSITIONS["channel_svd"], [ConvSpec((8, 3, 3, 3), group=2)]) == (4,)
    assert lift.max_rank(DECOMPOSITIONS["tucker2"], [ConvSpec((8, 3, 3, 3), group=2)]) == (4, 3)


def test_every_stage_keeps_the_groups_and_a_depthwise_stage_multiplies_them():
    spec = ConvSpec((8, 3, 3, 3), group=2)
    groups = {
        name: [(s.spec.weight_shape, s.spec.group) for s in lift.chains(DECOMPOSITIONS[name], [spec], rank)[0]]
        for name, rank in (("tucker2", (2, 1)), ("cp3", (5,)))
    }
    assert groups == {
        "tucker2": [((2, 3, 1, 1), 2), ((4, 1, 3, 3), 2), ((8, 2, 1, 1), 2)],
        "cp3": [((10, 3, 1, 1), 2), ((10, 1, 3, 3), 10), ((8, 5, 1, 1), 2)],
    }


def test_errors_of_groups_are_weighted_by_their_energy():
    """A large kernel and one of a hundredth of its energy: the error is nearly the large one's."""
    spec = ConvSpec((6, 4, 3, 3), group=2)
    large, small = normal(3, 4, 3, 3), normal(3, 4, 3, 3, seed=1)
    small *= 0.1 * np.linalg.norm(large) / np.linalg.norm(small)
    weight = np.concatenate([large, small])
    member = DECOMPOSITIONS["channel_svd"]
    of_large, of_small = (member.errors([part], [(1,), (2,)]) for part in (large, small))
    expected = (100 * of_large + of_small) / 101
    assert lift.errors(member, [spec], [weight], [(1,), (2,)]) == pytest.approx(expected, rel=1e-12)
    assert factorize("channel_svd", spec, weight, (2,)).relative_error ** 2 == pytest.approx(expected[1], rel=1e-9)


def test_a_group_of_zeros_takes_nothing_from_the_others():
    spec = ConvSpec((6, 4, 3, 3), group=2)
    weight = np.concatenate([normal(3, 4, 3, 3), np.zeros((3, 4, 3, 3))])
    for name in SPATIAL:
        rank = low(name, spec)
        alone = DECOMPOSITIONS[name].factorize([weight[:3]], rank, rng=np.random.default_rng(0))
        made = factorize(name, spec, weight, rank)
        assert made.relative_error == pytest.approx(alone.relative_error, rel=1e-12)
        assert all(np.isfinite(kernel).all() for kernel in made.kernels[0])


def test_the_estimated_rank_is_the_largest_of_the_groups():
    spec = ConvSpec((8, 4, 3, 3), group=2)
    one, three = normal(4, 1) @ normal(1, 36), normal(4, 3) @ normal(3, 36)
    weight = np.concatenate([one, three]).reshape(8, 4, 3, 3)

    def rank_of(matrix):
        return int(np.linalg.matrix_rank(matrix))

    assert lift.estimate_rank(DECOMPOSITIONS["channel_svd"], [spec], [weight], rank_of) == (3,)


@dataclass(frozen=True)
class Stubborn:
    """A member whose second factorisation does not converge."""

    name = "stubborn"
    asked: list

    def chain(self, specs, rank) -> tuple[Chain, ...]:
        return ((Stage(specs[0]),),)

    def factorize(self, weights, rank, statistics=None, *, rng, start=None, draft=False) -> Factorization:
        self.asked.append(weights[0].shape)
        stuck = len(self.asked) == 2
        return Factorization(((weights[0],),), 0.0, not stuck, "try more" if stuck else "")


def test_one_group_that_did_not_converge_is_told_for_all():
    spec = ConvSpec((6, 2, 3, 3), group=3)
    member = Stubborn([])
    made = lift.factorize(member, [spec], [normal(6, 2, 3, 3)], (1,), rng=np.random.default_rng(0))  # type: ignore[arg-type]
    assert member.asked == [(2, 2, 3, 3)] * 3
    assert not made.converged
    assert made.next_step == "try more"


# --- transposed convolutions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_chain_is_a_plain_one_on_an_input_with_zeros_in_between(name, group):
    spec = ConvSpec((6, 4, 3, 3), strides=(2, 1), dilations=(1, 2), group=group, transposed=True)
    weight, rank, x = normal(6, 4, 3, 3), low(name, spec), normal(1, 6, 5, 4, seed=1)
    chain = lift.chains(DECOMPOSITIONS[name], [spec], rank)[0]
    kernels = factorize(name, spec, weight, rank).kernels[0]
    spread = np.zeros((1, 6, 9, 4))
    spread[:, :, ::2] = x
    one = ConvSpec((4 * group, 6 // group, 3, 3), pads=(2, 4, 2, 4), dilations=(1, 2), group=group)
    turned = [np.flip(lift.by_output(stage.spec, kernel), (2, 3)) for stage, kernel in zip(chain, kernels, strict=True)]
    expected = run_chain(lift.chains(DECOMPOSITIONS[name], [one], rank)[0], turned, spread)
    assert np.allclose(run_chain(chain, kernels, x), expected, rtol=0, atol=1e-11)


def test_kernels_by_their_outputs_and_back():
    spec, weight = ConvSpec((6, 4, 3), group=2, transposed=True), normal(6, 4, 3)
    turned = lift.by_output(spec, weight)
    assert turned.shape == (8, 3, 3)
    assert np.array_equal(turned[4:], weight[3:].swapaxes(0, 1))
    assert np.array_equal(lift.in_onnx_order(spec, turned), weight)


def test_the_pointwise_stages_of_a_transposed_convolution_are_plain():
    spec = ConvSpec((16, 8, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1), transposed=True, output_padding=(1, 1))
    first, core, last = (stage.spec for stage in lift.chains(DECOMPOSITIONS["tucker2"], [spec], (3, 5))[0])
    assert first == ConvSpec((5, 16, 1, 1))
    assert core == replace(spec, weight_shape=(5, 3, 3, 3))
    assert last == ConvSpec((8, 3, 1, 1))


def test_a_stride_keeps_a_pointwise_stage_transposed():
    spec = ConvSpec((6, 4, 1, 1), strides=(2, 2), transposed=True)
    first, last = (stage.spec for stage in lift.chains(DECOMPOSITIONS["svd"], [spec], (2,))[0])
    assert first == ConvSpec((2, 6, 1, 1))
    assert last == ConvSpec((2, 4, 1, 1), strides=(2, 2), transposed=True)


def test_a_plain_pointwise_stage_has_the_matrix_of_each_group_transposed():
    """A grouped pointwise stage is turned group by group, not as one matrix."""
    spec = ConvSpec((6, 4, 1), group=2, transposed=True)
    weight, x = normal(6, 4, 1), normal(3, 6, 5, seed=1)
    rank = lift.max_rank(DECOMPOSITIONS["svd"], [spec])
    chain, made = lift.chains(DECOMPOSITIONS["svd"], [spec], rank)[0], factorize("svd", spec, weight, rank)
    assert [(s.spec.weight_shape, s.spec.group, s.spec.transposed) for s in chain] == [
        ((6, 3, 1), 2, False),
        ((8, 3, 1), 2, False),
    ]
    assert np.allclose(run_chain(chain, made.kernels[0], x), convolve(x, weight, spec), rtol=0, atol=1e-12)


def test_one_group_of_a_layer_is_plain():
    spec = ConvSpec((6, 4, 3), strides=(2,), pads=(1, 1), group=2, transposed=True, output_padding=(1,))
    assert lift.plain(spec) == ConvSpec((4, 3, 3), strides=(2,), pads=(1, 1), output_padding=(1,))


def test_a_member_refuses_what_a_group_looks_like():
    assert lift.refuses(DECOMPOSITIONS["svd"], [ConvSpec((6, 4, 1, 1), group=2, transposed=True)]) is None
    assert "depthwise" in (lift.refuses(DECOMPOSITIONS["cp3"], [ConvSpec((6, 1, 3, 3), group=6)]) or "")
    reason = lift.refuses(DECOMPOSITIONS["svd"], [ConvSpec((6, 4, 3, 3), group=2)])
    assert reason == DECOMPOSITIONS["svd"].refuses([ConvSpec((3, 4, 3, 3))])

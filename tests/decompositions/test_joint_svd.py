"""Joint decompositions: what is shared, what sharing is worth, and that alternations only improve."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from onnx_lowrank.candidates import Group, chain_params, group_candidates, price
from onnx_lowrank.decompositions import DECOMPOSITIONS, is_joint, lift
from onnx_lowrank.decompositions.joint_fit import SeenKernel
from onnx_lowrank.decompositions.joint_svd import JointBoth, JointSVD
from onnx_lowrank.types import ConvSpec, Layer, LayerStatistics, Stage
from tests.reference import effective_kernel

SPEC = ConvSpec((12, 10, 3, 3), pads=(1, 1, 1, 1))
JOINT = [name for name in DECOMPOSITIONS if is_joint(name)]


def layers(weights, spec: ConvSpec = SPEC, **options) -> Group:
    made = [
        Layer(f"l{i}", "Conv", spec, lambda w=w: w, np.dtype("float32"), (8, 8), 1, f"w{i}")
        for i, w in enumerate(weights)
    ]
    return Group(tuple(made), joint=True, **options)


def random(count: int, spec: ConvSpec = SPEC, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(spec.weight_shape) * 10.0**i for i in range(count)]


def factorized(name: str, weights, rank: int):
    specs = [ConvSpec(w.shape, pads=(1, 1, 1, 1)) for w in weights]
    made = lift.factorize(DECOMPOSITIONS[name], specs, weights, (rank,), rng=np.random.default_rng(0))
    return lift.chains(DECOMPOSITIONS[name], specs, (rank,)), made


def misses(name: str, weights, rank: int) -> list[float]:
    """Squared relative error of each layer, from the kernels themselves."""
    chains, made = factorized(name, weights, rank)
    found = []
    for weight, chain, kernels in zip(weights, chains, made.kernels, strict=True):
        wanted = effective_kernel((Stage(ConvSpec(weight.shape)),), (weight,))
        missed = effective_kernel(chain, kernels) - wanted
        found.append(float(np.square(missed).sum() / np.square(wanted).sum()))
    return found


@pytest.mark.parametrize("name", JOINT)
def test_shared_kernels_are_the_same_arrays_in_every_layer(name: str) -> None:
    chains, made = factorized(name, random(3), 5)
    seen: dict[str, np.ndarray] = {}
    for chain, kernels in zip(chains, made.kernels, strict=True):
        for stage, kernel in zip(chain, kernels, strict=True):
            assert kernel.shape == stage.spec.weight_shape
            ends = np.cumsum([shape[stage.parts[0].axis] for _, shape in stage.pieces])[:-1] if stage.parts else []
            pieces = np.split(kernel, ends, axis=stage.parts[0].axis) if stage.parts else [kernel]
            for (tag, shape), piece in zip(stage.pieces, pieces, strict=True):
                assert piece.shape == shape
                if tag:
                    np.testing.assert_array_equal(piece, seen.setdefault(tag, piece))
    assert seen


@pytest.mark.parametrize("name", JOINT)
def test_layers_together_are_exact_at_full_rank_whatever_their_norms(name: str) -> None:
    weights = random(3)
    specs = [SPEC] * 3
    (rank,) = lift.max_rank(DECOMPOSITIONS[name], specs)
    assert max(misses(name, weights, rank)) < 1e-18


@pytest.mark.parametrize("name", ["joint_left", "joint_right"])
def test_the_error_foretold_is_that_of_the_kernels_and_no_layer_is_drowned(name: str) -> None:
    weights = random(3)  # their norms are 1, 10 and 100 times as large
    each = misses(name, weights, 6)
    foretold = DECOMPOSITIONS[name].errors(weights, [(6,)])[0]
    assert foretold == pytest.approx(np.mean(each), rel=1e-9)
    assert factorized(name, weights, 6)[1].relative_error ** 2 == pytest.approx(foretold, rel=1e-9)
    assert max(each) < 2 * min(each)


def test_no_other_shared_factor_does_better() -> None:
    weights = random(3, seed=1)
    best = sum(misses("joint_left", weights, 4))
    rng = np.random.default_rng(2)
    matrices = [np.moveaxis(w, (1, 2), (-2, -1)).reshape(-1, 30) / np.linalg.norm(w) for w in weights]
    chains, made = factorized("joint_left", weights, 4)
    shared = made.kernels[0][0].reshape(4, 30)
    for size in (1e-3, 1e-1):
        moved = np.linalg.qr((shared + size * rng.standard_normal(shared.shape)).T)[0].T
        other = sum(np.square(m - m @ moved.T @ moved).sum() for m in matrices)
        assert other > best
    del chains


@pytest.mark.parametrize("planted", ["joint_left", "joint_right", "joint_both"])
def test_at_equal_parameters_planted_sharing_beats_separate_ranks(planted: str) -> None:
    rng = np.random.default_rng(3)
    count, rank = 4, 6
    columns, rows = 30, 36
    right, left = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
    half = rank // 2
    matrices = {
        "joint_left": [rng.standard_normal((rows, rank)) @ right for _ in range(count)],
        "joint_right": [left @ rng.standard_normal((rank, columns)) for _ in range(count)],
        "joint_both": [
            rng.standard_normal((rows, half)) @ right[:half] + left[:, :half] @ rng.standard_normal((half, columns))
            for _ in range(count)
        ],
    }[planted]
    weights = [
        np.moveaxis(m.reshape(12, 3, 10, 3), 1, -1) + 0.01 * rng.standard_normal(SPEC.weight_shape) for m in matrices
    ]
    group = layers(weights)
    joint = price(group, planted, (rank,), 0.0)
    separate = 0
    while (
        chain_params(price(Group(group.layers[:1]), "spatial_svd", (separate + 1,), 0.0).chains) * count
        <= joint.cost.params
    ):
        separate += 1
    alone = [misses("spatial_svd", [w], separate)[0] for w in weights]
    assert np.mean(misses(planted, weights, rank)) < 0.05
    assert np.mean(misses(planted, weights, rank)) < 0.2 * np.mean(alone)


def test_alternations_of_both_sides_never_raise_the_error() -> None:
    trace = JointBoth().objective(random(4), 8, 30)
    assert len(trace) > 5
    assert all(after <= before + 1e-14 for before, after in pairwise(trace))
    assert trace[-1] < 0.99 * trace[0]
    # and end below what either side does alone at the same rank of each
    left, right = (DECOMPOSITIONS[name].errors(random(4), [(4,)])[0] for name in ("joint_left", "joint_right"))
    assert trace[-1] < min(left, right)


def test_a_first_layer_of_other_width_shares_only_the_second_stage() -> None:
    narrow, wide = ConvSpec((12, 5, 3, 3)), ConvSpec((12, 10, 3, 3))
    refuses = {name: lift.refuses(DECOMPOSITIONS[name], [narrow, wide]) for name in JOINT}
    assert refuses["joint_right"] is None
    assert "input channels" in str(refuses["joint_left"])
    assert "channels" in str(refuses["joint_both"])
    rng = np.random.default_rng(0)
    assert max(misses("joint_right", [rng.standard_normal(s.weight_shape) for s in (narrow, wide)], 36)) < 1e-18


@pytest.mark.parametrize(
    "specs",
    [
        [ConvSpec((8, 4, 3, 3), group=2)] * 2,
        [ConvSpec((8, 8, 3, 3), transposed=True)] * 2,
        [ConvSpec((8, 8, 3, 3)), ConvSpec((8, 8, 1, 1))],
    ],
)
def test_layers_that_cannot_be_joined_are_refused(specs) -> None:
    assert all(lift.refuses(DECOMPOSITIONS[name], specs) for name in JOINT)


def test_what_is_shared_is_paid_for_once() -> None:
    group = layers(random(3))
    first, second = 10 * 3, 12 * 3  # of a rank of one
    assert price(group, "joint_left", (4,), 0.0).cost.params == 4 * (first + 3 * second)
    assert price(group, "joint_right", (4,), 0.0).cost.params == 4 * (3 * first + second)
    assert price(group, "joint_both", (5,), 0.0).cost.params == 3 * (first + 3 * second) + 2 * (3 * first + second)
    assert group.dense.cost.params == 3 * SPEC.params
    separate = sum(price(Group((layer,)), "spatial_svd", (4,), 0.0).cost.macs for layer in group.layers)
    assert price(group, "joint_both", (4,), 0.0).cost.macs == separate


def test_joint_methods_are_tried_on_groups_of_layers_and_others_on_single_ones() -> None:
    group = layers([w.astype(np.float32) for w in random(2)])
    methods = ("spatial_svd", *JOINT)
    together, _ = group_candidates(group, methods, 4)
    alone, _ = group_candidates(Group(group.layers[:1]), methods, 4)
    assert {c.decomposition for c in together[1:]} == set(JOINT)
    assert {c.decomposition for c in alone[1:]} == {"spatial_svd"}
    # each layer counts for as much as it does by itself
    errors = {c.rank: c.error for c in together if c.decomposition == "joint_left"}
    rank = min(errors)
    assert errors[rank] == pytest.approx(sum(misses("joint_left", random(2), rank[0])), rel=1e-5)


def seen_by(count: int, size: int = 90) -> list[LayerStatistics]:
    """Second moments of inputs that vary a lot in some directions and hardly in others, differently in each layer."""
    found = []
    for index in range(count):
        rng = np.random.default_rng(10 + index)
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
        rows = rng.standard_normal((4 * size, size)) * np.geomspace(1, 0.01, size) @ basis
        found.append(LayerStatistics(np.zeros(size), rows.T @ rows / len(rows), len(rows)))
    return found


def output_errors(weights, statistics, kernels) -> list[float]:
    return [
        SeenKernel(weight, stats.covariance).error(*stages)
        for weight, stats, stages in zip(weights, statistics, kernels, strict=True)
    ]


@pytest.mark.parametrize("name", JOINT)
def test_with_statistics_the_error_of_the_outputs_falls_from_turn_to_turn(name: str) -> None:
    weights, statistics = random(3), seen_by(3)
    member = DECOMPOSITIONS[name]
    assert isinstance(member, JointSVD)
    seen = [SeenKernel(w, s.covariance) for w, s in zip(weights, statistics, strict=True)]
    plain = member.factorize(weights, (6,), rng=np.random.default_rng(0))
    trace = [np.mean(output_errors(weights, statistics, plain.kernels))]
    trace += [member._weighted(weights, seen, 6, rounds)[1] for rounds in (1, 2, 4, 8)]
    assert all(after <= before + 1e-12 for before, after in pairwise(trace))
    assert trace[1] < 0.8 * trace[0]
    assert trace[-1] < 0.8 * trace[1]
    made = member.factorize(weights, (6,), statistics, rng=np.random.default_rng(0))
    assert made.relative_error**2 == pytest.approx(np.mean(output_errors(weights, statistics, made.kernels)), rel=1e-9)


@pytest.mark.parametrize("name", JOINT)
def test_a_refit_leaves_what_is_shared_as_it_is_and_is_the_least_error_for_the_rest(name: str) -> None:
    weights, statistics = random(2), seen_by(2)
    member = DECOMPOSITIONS[name]
    assert isinstance(member, JointSVD)
    kernels = member.factorize(weights, (6,), rng=np.random.default_rng(0)).kernels[0]
    seen = SeenKernel(weights[0], statistics[0].covariance, rows=np.linspace(0.5, 2, 12))
    first, second = member.refitted(seen, kernels)
    rows, columns = member.shared(6)
    np.testing.assert_array_equal(first[rows], kernels[0][rows])
    np.testing.assert_array_equal(second[:, columns], kernels[1][:, columns])
    best = seen.error(first, second)
    assert best < seen.error(*kernels)
    rng = np.random.default_rng(1)
    for _ in range(10):
        moved = [first.copy(), second.copy()]
        moved[0][~rows] += 1e-2 * rng.standard_normal(moved[0][~rows].shape)
        moved[1][:, ~columns] += 1e-2 * rng.standard_normal(moved[1][:, ~columns].shape)
        assert seen.error(*moved) > best - 1e-9

from __future__ import annotations

import itertools
import math
import pickle
import re

import numpy as np
import pytest

from onnx_lowrank import candidates
from onnx_lowrank.candidates import (
    RANKS_PER_MODE,
    Group,
    chain_macs,
    chain_params,
    estimated_candidate,
    group_candidates,
    group_layers,
    pareto,
    price,
    rank_grid,
    saves,
    show_rank,
)
from onnx_lowrank.decompositions import DECOMPOSITIONS, lift
from onnx_lowrank.layer_tasks import loaded
from onnx_lowrank.types import DENSE, Candidate, ConvSpec, Cost, Layer, LowRankError, Skip, Stage
from tests.reference import counted_macs

SPECS = {
    "gemm": (ConvSpec((6, 10)), ()),
    "pointwise": (ConvSpec((6, 5, 1, 1), strides=(2, 2)), (5, 4)),
    "one axis": (ConvSpec((6, 4, 3), strides=(2,), pads=(1, 1)), (9,)),
    "padded": (ConvSpec((5, 4, 3, 3), pads=(1, 1, 1, 1)), (4, 5)),
    "strides": (ConvSpec((5, 6, 3, 2), (2, 1), pads=(1, 0, 0, 1), dilations=(1, 2)), (6, 5)),
    "automatic": (ConvSpec((6, 5, 3, 3), strides=(1, 2), auto_pad="SAME_UPPER"), (4, 5)),
    "three axes": (ConvSpec((3, 4, 2, 3, 2), (1, 2, 1)), (3, 4, 3)),
    "groups": (ConvSpec((8, 3, 3, 3), (1, 2), pads=(1, 1, 1, 1), group=2), (4, 5)),
    "transposed": (
        ConvSpec((6, 5, 3, 3), (2, 2), pads=(1, 1, 1, 1), transposed=True, output_padding=(1, 0)),
        (3, 4),
    ),
    "transposed groups": (ConvSpec((6, 4, 3, 2), (2, 1), group=2, transposed=True), (3, 3)),
    "transposed pointwise": (ConvSpec((6, 4, 1, 1), (2, 2), transposed=True), (3, 3)),
}


class Reader:
    """A kernel of normal numbers, and how often it was read."""

    def __init__(self, shape, seed=0, value=None):
        self.value = np.random.default_rng(seed).standard_normal(shape) if value is None else value
        self.reads = 0

    def __call__(self):
        self.reads += 1
        return self.value


def layer_of(spec, size=(), name="layer", *, value=None, **options):
    op_type = ("ConvTranspose" if spec.transposed else "Conv") if spec.ndim else "Gemm"
    options = {"weight_name": f"{name}.weight", **options}
    return Layer(name, op_type, spec, Reader(spec.weight_shape, value=value), np.dtype("float32"), size, **options)


def candidate(macs, params, error=0.1, name="svd"):
    return Candidate(("layer",), name, (1,), (), Cost(macs, params), error)


WIDE = layer_of(ConvSpec((32, 32, 3, 3), pads=(1, 1, 1, 1)), (8, 8))


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", SPECS)
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_the_cost_of_every_chain_is_that_counted_position_by_position(name, label):
    spec, size = SPECS[label]
    layer = layer_of(spec, size)
    if lift.refuses(DECOMPOSITIONS[name], [spec]):
        with pytest.raises(LowRankError, match=rf"layer 'layer' cannot be decomposed by {name}: \S+"):
            price(Group((layer,)), name, (1,), 0.0)
        return
    highest = lift.max_rank(DECOMPOSITIONS[name], [spec])
    for rank in {(1,) * len(highest), tuple(min(2, r) for r in highest), highest}:
        made = price(Group((layer,)), name, rank, 0.25)
        (chain,) = made.chains
        assert made.cost.macs == counted_macs(chain, size)
        assert made.cost.params == sum(np.zeros(stage.spec.weight_shape).size for stage in chain)
        assert (made.layers, made.decomposition, made.rank, made.error) == (("layer",), name, rank, 0.25)


@pytest.mark.parametrize("label", SPECS)
def test_the_cost_of_a_layer_left_dense_is_that_counted_position_by_position(label):
    spec, size = SPECS[label]
    dense = Group((layer_of(spec, size),)).dense
    assert dense.cost == Cost(counted_macs((Stage(spec),), size), np.zeros(spec.weight_shape).size)
    assert (dense.decomposition, dense.rank, dense.chains, dense.error, dense.dense) == (DENSE, (), (), 0.0, True)


@pytest.mark.parametrize(
    ("name", "rank", "formula"),
    [
        ("channel_svd", (8,), 14 * 14 * (8 * 64 * 9 + 128 * 8)),
        ("channel_svd_in", (8,), 28 * 28 * 8 * 64 + 14 * 14 * 128 * 8 * 9),
        ("spatial_svd", (8,), 14 * 28 * 8 * 64 * 3 + 14 * 14 * 128 * 8 * 3),
        ("tucker2", (16, 8), 28 * 28 * 8 * 64 + 14 * 14 * 16 * 8 * 9 + 14 * 14 * 128 * 16),
        ("cp3", (8,), 28 * 28 * 8 * 64 + 14 * 14 * 8 * 9 + 14 * 14 * 128 * 8),
        ("cp4", (8,), 28 * 28 * 8 * 64 + 14 * 28 * 8 * 3 + 14 * 14 * 8 * 3 + 14 * 14 * 128 * 8),
    ],
)
def test_the_macs_of_a_strided_layer_are_those_of_the_formulas(name, rank, formula):
    """64 to 128 channels, 3x3, stride 2, on 28 x 28: the first stage without a stride sees all positions."""
    spec = ConvSpec((128, 64, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    assert price(Group((layer_of(spec, (28, 28)),)), name, rank, 0.0).cost.macs == formula


def test_every_row_of_a_product_counts():
    layer = layer_of(ConvSpec((8, 16)), batch=10)
    assert price(Group((layer,)), "svd", (2,), 0.0).cost == Cost(10 * (2 * 16 + 8 * 2), 48)
    assert chain_macs((Stage(ConvSpec((8, 16))),), layer) == layer.macs == 1280


def test_a_kernel_shared_by_several_stages_counts_once():
    shared, own = Stage(ConvSpec((4, 6)), "u"), Stage(ConvSpec((8, 4)))
    assert chain_params([(shared, own)]) == 24 + 32
    assert chain_params([(shared, own), (shared, own)]) == 24 + 64
    assert chain_params([(shared, Stage(ConvSpec((8, 4)), "v"))] * 3) == 24 + 32
    assert chain_params([]) == 0


# --- groups of layers ---------------------------------------------------------------------------------------------


def test_layers_that_read_one_kernel_are_decided_together():
    spec = ConvSpec((8, 6, 3, 3))
    a, b = layer_of(spec, (5, 5), "a", weight_name="w"), layer_of(spec, (9, 9), "b", weight_name="w")
    c = layer_of(spec, (5, 5), "c")
    groups = group_layers([a, c, b])
    assert [group.names for group in groups] == [("a", "b"), ("c",)]
    assert groups[0].dense.cost == Cost(a.macs + b.macs, spec.params)
    assert groups[0].dense.layers == ("a", "b")


def test_a_layer_whose_kernel_something_else_reads_is_decided_alone():
    spec = ConvSpec((8, 6, 3, 3))
    layers = [layer_of(spec, (5, 5), name, weight_name="w", weight_kept=True) for name in "ab"]
    assert [group.names for group in group_layers(layers)] == [("a",), ("b",)]


def test_a_node_that_is_called_like_another_layers_kernel_is_not_taken_for_it():
    kept = layer_of(ConvSpec((8, 6)), name="w", weight_name="v", weight_kept=True)
    other = layer_of(ConvSpec((8, 6)), name="b", weight_name="w")
    assert [group.names for group in group_layers([kept, other])] == [("w",), ("b",)]


def test_the_kernels_of_a_group_are_stored_once_and_its_macs_counted_for_each_layer():
    spec = ConvSpec((8, 6, 3, 3))
    strided = ConvSpec((8, 6, 3, 3), strides=(2, 2))
    a, b = layer_of(spec, (5, 5), "a", weight_name="w"), layer_of(strided, (9, 9), "b", weight_name="w")
    made = price(Group((a, b)), "channel_svd", (2,), 0.0)
    assert made.layers == ("a", "b")
    assert [[stage.shared for stage in chain] for chain in made.chains] == [["w_0", "w_1"]] * 2
    assert [chain[0].spec.strides for chain in made.chains] == [(1, 1), (2, 2)]
    assert made.cost.params == 2 * 54 + 8 * 2
    assert made.cost.macs == counted_macs(made.chains[0], (5, 5)) + counted_macs(made.chains[1], (9, 9))


def test_a_kernel_that_stays_in_the_file_counts_beside_the_new_ones():
    layer = layer_of(ConvSpec((32, 32)), weight_kept=True)
    assert price(Group((layer,)), "svd", (4,), 0.0).cost.params == 1024 + 256


def test_a_kernel_that_stays_in_the_file_is_left_alone_for_that_reason():
    layer = layer_of(ConvSpec((32, 32)), weight_kept=True)
    found, skip = group_candidates(Group((layer,)), ["svd"], 8)
    assert [c.decomposition for c in found] == [DENSE]
    assert skip is not None
    assert "something else reads its kernel" in skip.reason


def test_a_loaded_group_can_be_sent_to_another_process():
    group = Group((layer_of(ConvSpec((8, 6)), name="a"), layer_of(ConvSpec((8, 6)), name="b")))
    sent = pickle.loads(pickle.dumps(loaded(group)))
    assert sent == group
    assert np.array_equal(sent.layers[1].read_weight(), group.layers[0].read_weight())


# --- price --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [(0,), (33,), (-1,), (), (4, 4)])
def test_a_rank_that_the_layer_does_not_have_is_refused(rank):
    message = rf"^rank {re.escape(show_rank(rank) or '[]')} of svd for layer 'layer': 1 number\(s\) were expected, from 1 to 32$"
    with pytest.raises(LowRankError, match=message):
        price(Group((layer_of(ConvSpec((64, 32))),)), "svd", rank, 0.0)


def test_a_rank_beyond_one_mode_of_two_is_refused():
    assert price(Group((WIDE,)), "tucker2", (32, 32), 0.0).rank == (32, 32)
    for rank in ((33, 1), (1, 33), (0, 4), (4,)):
        with pytest.raises(LowRankError, match=r"2 number\(s\) were expected, from 1 to 32x32"):
            price(Group((WIDE,)), "tucker2", rank, 0.0)


def test_an_unknown_decomposition_is_refused():
    with pytest.raises(LowRankError, match="no decomposition is called 'qr'"):
        price(Group((WIDE,)), "qr", (1,), 0.0)


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 8, 12, 16])
@pytest.mark.parametrize("top", [1, 2, 5, 7, 8, 15, 16, 17, 64, 100, 513, 4096])
def test_a_grid_of_ranks_is_aligned_within_range_and_short(top, block):
    ranks = [rank for (rank,) in rank_grid((top,), block)]
    assert ranks == sorted(set(ranks))
    assert all(1 <= rank <= top for rank in ranks)
    assert all(rank % block == 0 for rank in ranks if rank >= block)
    below = [rank for rank in ranks if rank < block]
    assert below == [p for p in (1, 2, 4, 8) if p < block and p <= top]
    aligned = [rank for rank in ranks if rank >= block]
    assert len(aligned) == min(top // block, RANKS_PER_MODE[1])
    if aligned:
        assert (aligned[0], aligned[-1]) == (block, top // block * block)


@pytest.mark.parametrize("highest", [(64, 32), (512, 7), (8, 8), (1, 100), (30, 20, 10)])
def test_a_grid_over_several_modes_is_that_of_each_mode_crossed(highest):
    grid = rank_grid(highest, 8)
    each = [sorted({rank[mode] for rank in grid}) for mode in range(len(highest))]
    assert grid == list(itertools.product(*each))
    for ranks, top in zip(each, highest, strict=True):
        assert len(ranks) <= RANKS_PER_MODE.get(len(highest), 8) + 3
        assert all(rank <= top and (rank % 8 == 0 or rank in (1, 2, 4)) for rank in ranks)


def test_every_rank_of_a_grid_can_be_priced():
    for name in ("channel_svd", "spatial_svd", "tucker2", "cp3"):
        for rank in rank_grid(lift.max_rank(DECOMPOSITIONS[name], [WIDE.spec]), 16):
            price(Group((WIDE,)), name, rank, 0.0)


# --- candidates ---------------------------------------------------------------------------------------------------


def test_a_candidate_saves_where_one_count_falls_and_the_other_does_not_rise():
    dense = candidate(100, 100, 0.0)
    assert saves(candidate(99, 100), dense)
    assert saves(candidate(100, 99), dense)
    assert saves(candidate(1, 1), dense)
    assert not saves(candidate(100, 100), dense)
    assert not saves(candidate(1, 101), dense)
    assert not saves(candidate(101, 1), dense)


def beats(a, b):
    """Whether `a` is at least as good as `b` in everything, and better in something."""
    first, second = ((c.cost.macs, c.cost.params, c.error) for c in (a, b))
    return first != second and all(x <= y for x, y in zip(first, second, strict=True))


def test_the_front_is_what_no_other_candidate_beats():
    rng = np.random.default_rng(0)
    for _ in range(30):
        some = [
            candidate(int(m), int(p), float(e) / 8)
            for m, p, e in zip(rng.integers(1, 12, 40), rng.integers(1, 12, 40), rng.integers(0, 8, 40), strict=True)
        ]
        expected = {c for c in some if not any(beats(other, c) for other in some)}
        front = pareto(some)
        assert set(front) == expected
        assert len(front) == len(expected)  # of equal ones, one is left
        assert [c.error for c in front] == sorted(c.error for c in front)
        assert 1 <= len(front) < len(some)
    assert pareto([]) == []


METHODS = ("channel_svd", "channel_svd_in", "spatial_svd", "tucker2")


def same_method(a, b):
    return a.decomposition == b.decomposition


def test_candidates_begin_with_the_dense_one_and_are_fronts_of_what_saves_by_each_method():
    found, skip = group_candidates(Group((WIDE,)), METHODS, 8)
    assert skip is None
    dense, *others = found
    assert dense == Group((WIDE,)).dense
    assert len(others) > 5
    assert all(saves(c, dense) and 0 < c.error <= 1 for c in others)
    assert not any(beats(a, b) for a in others for b in others if same_method(a, b))
    assert {c.decomposition for c in others} > {"tucker2"}


def test_candidates_are_the_front_of_each_method_over_every_rank_of_its_grid():
    everything = []
    for name in METHODS:
        grid = rank_grid(lift.max_rank(DECOMPOSITIONS[name], [WIDE.spec]), 8)
        errors = lift.errors(DECOMPOSITIONS[name], [WIDE.spec], [WIDE.read_weight()], grid)
        everything += [price(Group((WIDE,)), name, r, float(e)) for r, e in zip(grid, errors, strict=True)]
    dense = Group((WIDE,)).dense
    useful = [c for c in everything if saves(c, dense)]
    expected = {(c.decomposition, c.rank) for c in useful if not any(beats(o, c) for o in useful if same_method(o, c))}
    found, _ = group_candidates(Group((WIDE,)), METHODS, 8)
    assert {(c.decomposition, c.rank) for c in found[1:]} == expected


def test_a_kernel_is_read_only_where_something_can_be_saved_and_then_once():
    wide = layer_of(WIDE.spec, (8, 8))
    group_candidates(Group((wide,)), METHODS, 8)
    assert wide.read_weight.reads == 1
    small = layer_of(ConvSpec((2, 2, 1, 1)), (8, 8))
    group_candidates(Group((small,)), ("svd",), 8)
    assert small.read_weight.reads == 0


@pytest.mark.parametrize(
    ("spec", "methods", "reason"),
    [
        (ConvSpec((6, 1, 3, 3), group=6), METHODS, "depthwise"),
        (ConvSpec((2, 2, 1, 1)), ("svd",), "too small: svd saves nothing at any rank of its grid"),
        (ConvSpec((8, 8, 1, 1)), ("channel_svd",), "its kernel is pointwise"),
        (ConvSpec((8, 8, 3)), ("spatial_svd",), "no second spatial axis"),
        (ConvSpec((8, 8)), (), "none of the methods  applies"),
    ],
)
def test_a_layer_that_nothing_applies_to_is_skipped_with_the_reason(spec, methods, reason):
    layer = layer_of(spec, (8,) * spec.ndim)
    found, skip = group_candidates(Group((layer,)), methods, 8)
    assert found == (Group((layer,)).dense,)
    assert skip is not None
    assert (skip.layer, skip.op_type) == ("layer", layer.op_type)
    assert reason in skip.reason


def test_a_kernel_of_zeros_costs_no_error_at_any_rank():
    layer = layer_of(WIDE.spec, (8, 8), value=np.zeros(WIDE.spec.weight_shape))
    found, _ = group_candidates(Group((layer,)), METHODS, 8)
    assert {c.error for c in found} == {0.0}
    assert min(c.cost.macs for c in found) < 0.1 * WIDE.macs


def test_rounding_never_makes_an_error_negative(monkeypatch):
    monkeypatch.setattr(candidates.lift, "errors", lambda d, s, w, ranks, *_: np.full(len(ranks), -1e-17))
    found, _ = group_candidates(Group((WIDE,)), ["channel_svd"], 8)
    assert {c.error for c in found} == {0.0}


# --- estimated ranks ----------------------------------------------------------------------------------------------


def test_an_estimated_rank_is_aligned_upwards():
    made = estimated_candidate(Group((WIDE,)), ["channel_svd"], lambda matrix: 9, 8)
    assert isinstance(made, Candidate)
    assert (made.decomposition, made.rank) == ("channel_svd", (16,))
    expected = lift.errors(DECOMPOSITIONS["channel_svd"], [WIDE.spec], [WIDE.read_weight()], [(16,)])[0]
    assert made.error == pytest.approx(expected)


def test_an_estimated_rank_is_never_aligned_beyond_the_highest():
    layer = layer_of(ConvSpec((20, 64, 3, 3)), (8, 8))
    made = estimated_candidate(Group((layer,)), ["channel_svd"], lambda matrix: 17, 16)
    assert isinstance(made, Skip)  # rank 20 of 20 saves nothing
    assert "channel_svd at the estimated rank 20 saves nothing: left dense" in made.reason


def test_the_first_method_that_applies_is_taken():
    made = estimated_candidate(Group((WIDE,)), ["svd", "tucker2", "channel_svd"], lambda matrix: 8, 8)
    assert isinstance(made, Candidate)
    assert (made.decomposition, made.rank) == ("tucker2", (8, 8))


def test_an_estimate_of_zero_leaves_the_layer_dense():
    made = estimated_candidate(Group((WIDE,)), ["tucker2"], lambda matrix: 0, 8)
    assert isinstance(made, Skip)
    assert made.reason == "tucker2: the estimated rank is 0, so no rank is safe: left dense"


def test_a_layer_that_no_method_applies_to_is_skipped_by_an_estimator_too():
    made = estimated_candidate(Group((WIDE,)), ["svd"], lambda matrix: 8, 8)
    assert isinstance(made, Skip)
    assert "channel_svd is the SVD for it" in made.reason
    assert isinstance(estimated_candidate(Group((WIDE,)), [], lambda matrix: 8, 8), Skip)


def test_ranks_are_shown_as_people_write_them():
    assert [show_rank(rank) for rank in ((32,), (32, 16), ())] == ["32", "32x16", ""]
    assert math.isfinite(price(Group((WIDE,)), "tucker2", (8, 8), 0.5).error)


def test_transposed_and_grouped_layers_that_read_one_kernel_are_priced_as_one() -> None:
    for spec in (ConvSpec((32, 32, 3, 3), transposed=True), ConvSpec((32, 16, 3, 3), group=2)):
        a, b = (layer_of(spec, (8, 8), name, weight_name="w") for name in "ab")
        found, skip = group_candidates(Group((a, b)), ["channel_svd"], 8)
        assert skip is None
        assert len(found) > 1

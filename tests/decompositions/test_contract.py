"""One contract for every member of the table: what the rest of the package relies on, whatever the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import onnx
import pytest

from onnx_lowrank.candidates import Group, price
from onnx_lowrank.decompositions import DECOMPOSITIONS, find_decomposition, lift
from onnx_lowrank.types import Chain, ConvSpec, Factorization, Layer, LowRankError, Rank, Stage
from tests.helpers import run
from tests.reference import convolve, effective_kernel, responses

EXACT = 1e-10
"""Relative: some hundred roundings of float64 and the condition of a square root of eps in the solvers."""


@dataclass(frozen=True)
class Case:
    """A layer and the spatial sizes of its input."""

    spec: ConvSpec
    size: tuple[int, ...] = ()


CASES = {
    "gemm to fewer": Case(ConvSpec((6, 10))),
    "gemm to more": Case(ConvSpec((10, 6))),
    "pointwise with strides": Case(ConvSpec((8, 6, 1, 1), strides=(2, 2)), (5, 4)),
    "pointwise with pads": Case(ConvSpec((4, 6, 1, 1), pads=(1, 0, 0, 1)), (3, 2)),
    "one axis": Case(ConvSpec((6, 4, 3), strides=(2,), pads=(1, 1)), (7,)),
    "to more channels": Case(ConvSpec((8, 6, 3, 3), pads=(1, 1, 1, 1)), (4, 5)),
    "to fewer channels": Case(ConvSpec((5, 9, 3, 2), (2, 1), pads=(1, 0, 0, 1), dilations=(1, 2)), (6, 5)),
    "automatic padding": Case(ConvSpec((6, 5, 3, 3), strides=(1, 2), auto_pad="SAME_LOWER"), (4, 5)),
    "no padding": Case(ConvSpec((4, 6, 2, 3), auto_pad="VALID"), (4, 4)),
    "a row": Case(ConvSpec((6, 4, 1, 3), strides=(1, 2), auto_pad="SAME_UPPER"), (3, 6)),
    "a column": Case(ConvSpec((6, 4, 3, 1), pads=(1, 0, 1, 0)), (3, 2)),
    "three axes": Case(ConvSpec((4, 5, 2, 3, 2), (1, 2, 1), pads=(0, 1, 1, 1, 0, 0)), (3, 4, 3)),
    "one output channel": Case(ConvSpec((1, 6, 3, 3)), (4, 3)),
    "one input channel": Case(ConvSpec((6, 1, 3, 3)), (4, 3)),
    "groups": Case(ConvSpec((8, 3, 3, 3), (1, 2), pads=(1, 1, 1, 1), group=2), (4, 5)),
    "transposed": Case(
        ConvSpec((6, 5, 3, 3), (2, 2), pads=(1, 1, 1, 1), transposed=True, output_padding=(1, 0)), (3, 4)
    ),
    "transposed, automatic padding": Case(
        ConvSpec((4, 6, 3, 3), (2, 1), auto_pad="SAME_UPPER", transposed=True), (3, 3)
    ),
    "transposed groups": Case(ConvSpec((6, 4, 3, 2), (2, 1), group=2, transposed=True), (3, 3)),
    "transposed one axis": Case(ConvSpec((6, 4, 3), dilations=(2,), transposed=True), (4,)),
    "transposed pointwise": Case(ConvSpec((6, 4, 1, 1), (2, 2), transposed=True), (3, 3)),
    "transposed pointwise with pads": Case(ConvSpec((6, 4, 1, 1), pads=(1, 0, 0, 1), transposed=True), (4, 3)),
    "transposed pointwise groups": Case(ConvSpec((6, 4, 1, 1), group=2, transposed=True), (3, 2)),
}

APPLY = [
    (name, label)
    for name, decomposition in DECOMPOSITIONS.items()
    for label, case in CASES.items()
    if lift.refuses(decomposition, [case.spec]) is None
]

BOUNDED = [(name, label) for name, label in APPLY if not name.startswith("cp")]
"""A prediction for CP is neither equal to the error nor a bound on it."""

FEW = ("gemm to fewer", "to fewer channels", "three axes", "one output channel", "transposed")
"""Layers for what does not hang on strides or padding."""

every_member_and_layer = pytest.mark.parametrize(("name", "label"), APPLY)
every_member_and_a_few_layers = pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name, label in APPLY if label in FEW]
)


@cache
def weight_of(label: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.standard_normal(CASES[label].spec.weight_shape)


def highest(name: str, label: str) -> Rank:
    return lift.max_rank(DECOMPOSITIONS[name], [CASES[label].spec])


def ladder(name: str, label: str) -> list[Rank]:
    """Ranks from the lowest to the highest, each at least the one before in every mode."""
    shares = (0, 0.25, 0.6, 0.85, 1)
    if name.startswith("cp"):  # a fit takes a hundred times as long as a singular value decomposition
        shares = (0, 0.4, 1) if label in FEW else (0, 1)
    return sorted({tuple(max(1, int(r * share)) for r in highest(name, label)) for share in shares})


def middle(name: str, label: str) -> Rank:
    """A rank at which something is lost, where there is one."""
    return ladder(name, label)[min(1, len(ladder(name, label)) - 1)]


def chain_of(name: str, label: str, rank: Rank) -> Chain:
    return lift.chains(DECOMPOSITIONS[name], [CASES[label].spec], rank)[0]


def factorize(name: str, label: str, rank: Rank, weight: np.ndarray, seed: int = 0) -> Factorization:
    return lift.factorize(DECOMPOSITIONS[name], [CASES[label].spec], [weight], rank, rng=np.random.default_rng(seed))


@cache
def factorized(name: str, label: str, rank: Rank) -> Factorization:
    return factorize(name, label, rank, weight_of(label))


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative error, of arrays that must have one shape."""
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def whole(label: str, weight: np.ndarray) -> np.ndarray:
    """The layer's own kernel as the reference sees it, with zeros between groups."""
    return effective_kernel((Stage(CASES[label].spec),), (weight,))


def measured_error(name: str, label: str, rank: Rank, made: Factorization, weight: np.ndarray) -> float:
    """Relative error of the kernel that the chain amounts to."""
    return distance(effective_kernel(chain_of(name, label, rank), made.kernels[0]), whole(label, weight))


def layer_of(label: str) -> Layer:
    case = CASES[label]
    op_type = ("ConvTranspose" if case.spec.transposed else "Conv") if case.spec.ndim else "Gemm"
    return Layer(label, op_type, case.spec, lambda: weight_of(label), np.dtype("float64"), case.size)


def with_two_channels_swapped(chain: Chain, kernels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first two output channels exchanged, or the first two input channels of a layer with one output."""
    index, axis = len(chain) - 1, int(chain[-1].spec.transposed)
    if kernels[index].shape[axis] == 1:
        index, axis = 0, int(not chain[0].spec.transposed and chain[0].spec.group == 1)
    order = [1, 0, *range(2, kernels[index].shape[axis])]
    return [np.take(k, order, axis=axis) if i == index else k for i, k in enumerate(kernels)]


# --- the reference itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if case.spec.ndim])
def test_the_reference_convolution_is_that_of_onnx_runtime(label):
    case = CASES[label]
    spec = case.spec
    kernel = weight_of(label).astype(np.float32)
    x = np.random.default_rng(0).standard_normal((2, spec.in_channels, *case.size)).astype(np.float32)
    attributes = {"strides": spec.strides, "dilations": spec.dilations, "group": spec.group, "auto_pad": spec.auto_pad}
    if spec.auto_pad == "NOTSET":
        attributes["pads"] = spec.pads
    if spec.transposed:
        attributes["output_padding"] = spec.output_padding
    node = onnx.helper.make_node(layer_of(label).op_type, ["x", "w"], ["y"], **attributes)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [info("x", onnx.TensorProto.FLOAT, x.shape)],
        [info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(kernel, "w")],
    )
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    assert distance(convolve(x, kernel, spec), run(model, {"x": x})[0]) < 1e-5


def test_every_layer_has_a_member_and_every_member_several_layers():
    assert {label for _, label in APPLY} == set(CASES)
    for name in DECOMPOSITIONS:
        assert sum(member == name for member, _ in APPLY) >= 6


def test_the_table_is_keyed_by_the_members_own_names():
    assert all(name == decomposition.name for name, decomposition in DECOMPOSITIONS.items())
    assert find_decomposition("tucker2") is DECOMPOSITIONS["tucker2"]
    with pytest.raises(
        LowRankError, match=r"no decomposition is called 'tucker': one of svd, .*joint_both was expected"
    ):
        find_decomposition("tucker")


# --- the contract -------------------------------------------------------------------------------------------------


@every_member_and_layer
def test_kernels_have_the_shapes_that_the_chain_declares(name, label):
    for rank in ladder(name, label):
        chain, made = chain_of(name, label, rank), factorized(name, label, rank)
        assert len(made.kernels) == 1
        assert [kernel.shape for kernel in made.kernels[0]] == [stage.spec.weight_shape for stage in chain]
        assert all(kernel.dtype == np.float64 for kernel in made.kernels[0])
        assert not any(stage.shared for stage in chain)


@every_member_and_layer
def test_the_chain_has_the_layers_channels_and_output_size(name, label):
    case = CASES[label]
    for rank in ladder(name, label):
        chain = chain_of(name, label, rank)
        assert chain[0].spec.in_channels == case.spec.in_channels
        assert chain[-1].spec.out_channels == case.spec.out_channels
        size = case.size
        for before, after in pairwise(chain):
            assert before.spec.out_channels == after.spec.in_channels
        for stage in chain:
            size = stage.spec.output_size(size)
        assert size == case.spec.output_size(case.size)


@every_member_and_layer
def test_the_chain_computes_the_layer_at_the_highest_rank(name, label):
    """With its strides, pads and groups: at every place of the input, the answer to a one is the layer's."""
    case, rank = CASES[label], highest(name, label)
    made = factorized(name, label, rank)
    expected = responses((Stage(case.spec),), (weight_of(label),), case.size)
    assert distance(responses(chain_of(name, label, rank), made.kernels[0], case.size), expected) < EXACT
    assert made.relative_error < EXACT
    assert made.converged


@every_member_and_layer
def test_the_error_reported_is_that_of_the_composed_kernels(name, label):
    for rank in ladder(name, label):
        made = factorized(name, label, rank)
        measured = measured_error(name, label, rank, made, weight_of(label))
        assert made.relative_error == pytest.approx(measured, rel=1e-9, abs=1e-12)


@every_member_and_layer
def test_a_wrong_kernel_is_told_from_the_right_one(name, label):
    """Scaled by 1.01 or with two channels swapped: the comparisons above do fail on that."""
    rank = highest(name, label)
    chain, kernels = chain_of(name, label, rank), factorized(name, label, rank).kernels[0]
    kernel, size = whole(label, weight_of(label)), CASES[label].size
    expected = responses((Stage(CASES[label].spec),), (weight_of(label),), size)
    scaled = (*kernels[:-1], 1.01 * kernels[-1])
    assert distance(effective_kernel(chain, scaled), kernel) == pytest.approx(0.01, rel=1e-6)
    assert distance(responses(chain, scaled, size), expected) == pytest.approx(0.01, rel=1e-6)
    swapped = with_two_channels_swapped(chain, kernels)
    assert distance(effective_kernel(chain, swapped), kernel) > 0.1
    assert distance(responses(chain, swapped, size), expected) > 0.1


@every_member_and_layer
def test_the_error_falls_with_the_rank(name, label):
    errors = [factorized(name, label, rank).relative_error for rank in ladder(name, label)]
    # an iteration may stop a little above the optimum of its rank, but a larger rank is never worth less than that
    slack = 0.01 if name in ("tucker2", "cp3", "cp4") else 1e-9
    assert all(after <= before + slack for before, after in pairwise(errors))
    assert errors[-1] < EXACT
    assert len(errors) == 1 or errors[0] > 0.1
    assert errors[0] < 1


@every_member_and_layer
def test_predicted_errors_are_shares_that_fall_with_the_rank_to_zero(name, label):
    ranks = ladder(name, label)
    predicted = lift.errors(DECOMPOSITIONS[name], [CASES[label].spec], [weight_of(label)], ranks)
    assert predicted.shape == (len(ranks),)
    assert (predicted >= 0).all() and (predicted <= 1).all()
    assert (np.diff(predicted) <= 1e-12).all()
    assert predicted[-1] < 1e-12
    assert len(ranks) == 1 or predicted[0] > 0.01
    backwards = lift.errors(DECOMPOSITIONS[name], [CASES[label].spec], [weight_of(label)], ranks[::-1])
    np.testing.assert_allclose(backwards[::-1], predicted, rtol=1e-12, atol=1e-15)  # sums of another order


@pytest.mark.parametrize(("name", "label"), BOUNDED)
def test_predicted_errors_are_those_of_the_factorisation_or_a_bound_on_them(name, label):
    ranks = ladder(name, label)
    predicted = lift.errors(DECOMPOSITIONS[name], [CASES[label].spec], [weight_of(label)], ranks)
    actual = np.array([factorized(name, label, rank).relative_error ** 2 for rank in ranks])
    if name == "tucker2":
        assert (actual <= predicted + 1e-9).all()
        assert (predicted <= 1.2 * actual + 1e-9).all()  # and not an empty bound
    else:
        assert actual == pytest.approx(predicted, abs=1e-9)


@every_member_and_a_few_layers
def test_the_same_seed_gives_the_same_bytes(name, label):
    rank = middle(name, label)
    again = factorize(name, label, rank, weight_of(label).copy())
    for one, other in zip(factorized(name, label, rank).kernels[0], again.kernels[0], strict=True):
        assert one.tobytes() == other.tobytes()
    assert again.relative_error == factorized(name, label, rank).relative_error


@every_member_and_a_few_layers
def test_a_kernel_of_float32_is_worked_on_in_float64(name, label):
    rank = middle(name, label)
    narrow = weight_of(label).astype(np.float32)
    before = narrow.tobytes()
    made, wide = factorize(name, label, rank, narrow), factorize(name, label, rank, narrow.astype(np.float64))
    for one, other in zip(made.kernels[0], wide.kernels[0], strict=True):
        assert one.dtype == np.float64
        assert one.tobytes() == other.tobytes()
    assert made.relative_error == pytest.approx(wide.relative_error, rel=1e-12, abs=1e-15)
    assert narrow.tobytes() == before
    specs = [CASES[label].spec]
    predicted = lift.errors(DECOMPOSITIONS[name], specs, [narrow], [rank])
    assert predicted == pytest.approx(lift.errors(DECOMPOSITIONS[name], specs, [narrow.astype(float)], [rank]))


@every_member_and_a_few_layers
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_a_kernel_does_not_matter(name, label, scale):
    rank = middle(name, label)
    made = factorize(name, label, rank, scale * weight_of(label))
    assert made.relative_error == pytest.approx(factorized(name, label, rank).relative_error, rel=1e-6, abs=1e-12)
    assert measured_error(name, label, rank, made, scale * weight_of(label)) == pytest.approx(
        made.relative_error, rel=1e-9, abs=1e-12
    )
    specs, ranks = [CASES[label].spec], ladder(name, label)
    predicted = lift.errors(DECOMPOSITIONS[name], specs, [scale * weight_of(label)], ranks)
    expected = lift.errors(DECOMPOSITIONS[name], specs, [weight_of(label)], ranks)
    assert predicted == pytest.approx(expected, rel=1e-6, abs=1e-12)


@every_member_and_a_few_layers
def test_a_kernel_of_zeros_becomes_kernels_that_compute_zeros(name, label):
    zeros = np.zeros(CASES[label].spec.weight_shape)
    for rank in ladder(name, label)[:2]:
        made = factorize(name, label, rank, zeros)
        assert made.relative_error == 0
        assert made.converged
        composed = effective_kernel(chain_of(name, label, rank), made.kernels[0])
        assert composed.shape == whole(label, zeros).shape
        assert not composed.any()
        assert all(np.isfinite(kernel).all() for kernel in made.kernels[0])
    assert not lift.errors(DECOMPOSITIONS[name], [CASES[label].spec], [zeros], ladder(name, label)).any()


def planted(name: str, label: str, rank: Rank) -> np.ndarray:
    """A kernel of exactly this rank: what a chain of random kernels amounts to, as the layer stores it."""
    rng = np.random.default_rng(11)
    spec, chain = CASES[label].spec, chain_of(name, label, rank)
    composed = effective_kernel(chain, [rng.standard_normal(stage.spec.weight_shape) for stage in chain])
    if not spec.transposed:
        composed = composed[(..., *(slice(None, None, -1),) * spec.ndim)]  # a convolution answers with a mirror image
    inputs, outputs = np.split(composed, spec.group), []
    for g, block in enumerate(inputs):
        outputs.append(np.split(block, spec.group, axis=1)[g])  # (in, out, k...) of one group
    return np.concatenate([block if spec.transposed else block.swapaxes(0, 1) for block in outputs])


@every_member_and_a_few_layers
def test_a_kernel_of_rank_one_is_found_exactly_at_rank_one(name, label):
    rank = ladder(name, label)[0]
    weight = planted(name, label, rank)
    made = factorize(name, label, rank, weight)
    assert measured_error(name, label, rank, made, weight) < EXACT
    assert made.converged
    assert lift.errors(DECOMPOSITIONS[name], [CASES[label].spec], [weight], [rank])[0] < 1e-12


@every_member_and_a_few_layers
def test_a_kernel_of_a_planted_rank_is_found_at_that_rank_and_not_below(name, label):
    top = highest(name, label)
    rank = tuple(min(2, r) for r in top)
    weight = planted(name, label, rank)
    made = factorize(name, label, rank, weight)
    # alternating least squares approaches an exact fit of several components without reaching it
    assert measured_error(name, label, rank, made, weight) < (1e-3 if name.startswith("cp") else EXACT)
    if rank != ladder(name, label)[0]:
        below = ladder(name, label)[0]
        assert measured_error(name, label, below, factorize(name, label, below, weight), weight) > 0.05


@every_member_and_a_few_layers
def test_a_rank_beyond_that_of_a_deficient_kernel_does_no_harm(name, label):
    """Directions without energy: nothing is divided by them."""
    weight = planted(name, label, ladder(name, label)[0])
    rank = highest(name, label)
    made = factorize(name, label, rank, weight)
    assert all(np.isfinite(kernel).all() for kernel in made.kernels[0])
    assert measured_error(name, label, rank, made, weight) < EXACT
    assert max(np.abs(kernel).max() for kernel in made.kernels[0]) < 10 * max(1.0, np.abs(weight).max())


@every_member_and_a_few_layers
def test_dead_channels_stay_dead(name, label):
    """A pruned channel is common, and must not become noise."""
    weight = weight_of(label).copy()
    weight[0] = 0.0
    if not weight.any():
        return
    rank = middle(name, label)
    made = factorize(name, label, rank, weight)
    composed = effective_kernel(chain_of(name, label, rank), made.kernels[0])
    dead = composed[0] if CASES[label].spec.transposed else composed[:, 0]
    assert np.abs(dead).max() < 1e-10 * np.abs(composed).max()


@every_member_and_a_few_layers
def test_the_rank_of_an_estimator_is_one_that_the_member_can_be_priced_at(name, label):
    decomposition, specs = DECOMPOSITIONS[name], [CASES[label].spec]
    top = highest(name, label)

    def full(matrix: np.ndarray) -> int:
        assert matrix.ndim == 2
        return int(np.linalg.matrix_rank(matrix))

    estimate = lift.estimate_rank(decomposition, specs, [weight_of(label)], full)
    assert len(estimate) == len(top)
    assert all(1 <= r <= most for r, most in zip(estimate, top, strict=True))
    nothing = lift.estimate_rank(decomposition, specs, [weight_of(label)], lambda matrix: 0)
    assert nothing == (0,) * len(top)


@every_member_and_a_few_layers
def test_ranks_that_do_not_exist_are_refused(name, label):
    group, top = Group((layer_of(label),)), highest(name, label)
    show = "x".join(map(str, top))
    assert price(group, name, top, 0.0).rank == top
    for bad in (tuple(0 for _ in top), (-1,) * len(top), (*top[:-1], top[-1] + 1), (), (*top, 1)):
        with pytest.raises(LowRankError, match=rf"of {name} for layer '{label}': {len(top)} number.*1 to {show}$"):
            price(group, name, bad, 0.0)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_a_depthwise_layer_is_refused_with_a_reason(name):
    spec = ConvSpec((6, 1, 3, 3), group=6)
    assert "depthwise" in (lift.refuses(DECOMPOSITIONS[name], [spec]) or "")
    group = Group((Layer("d", "Conv", spec, lambda: np.ones(spec.weight_shape), np.dtype("float32"), (4, 4)),))
    with pytest.raises(LowRankError, match=rf"layer 'd' cannot be decomposed by {name}: depthwise"):
        price(group, name, (1,), 0.0)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("label", CASES)
def test_a_refusal_gives_its_reason(name, label):
    reason = lift.refuses(DECOMPOSITIONS[name], [CASES[label].spec])
    assert reason is None or len(reason) > 20
    assert (reason is None) == ((name, label) in APPLY)

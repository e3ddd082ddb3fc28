from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from onnx_lowrank.types import (
    DENSE,
    Budget,
    Candidate,
    ConvSpec,
    Cost,
    Layer,
    LowRankError,
    Plan,
    Skip,
    Stage,
)
from tests.reference import convolve, counted_macs

SPECS = [
    (ConvSpec((2, 3, 3)), (9,)),
    (ConvSpec((2, 3, 3), (2,), pads=(1, 0), dilations=(2,)), (8,)),
    (ConvSpec((4, 3, 3, 2), (2, 3), pads=(1, 0, 2, 1)), (7, 9)),
    (ConvSpec((4, 3, 3, 3), (2, 3), auto_pad="SAME_UPPER"), (7, 8)),
    (ConvSpec((4, 3, 3, 3), (2, 1), pads=(5, 5, 5, 5), auto_pad="VALID"), (7, 8)),
    (ConvSpec((4, 1, 2, 2), group=2), (3, 3)),
    (ConvSpec((2, 3, 1, 2, 3), (1, 2, 2), pads=(0, 1, 0, 0, 0, 1)), (2, 5, 6)),
    (ConvSpec((3, 2, 3), (2,), pads=(1, 1), transposed=True, output_padding=(1,)), (5,)),
    (ConvSpec((3, 2, 3, 2), (2, 3), dilations=(2, 1), transposed=True), (4, 3)),
    (ConvSpec((4, 3, 4, 3), (2, 1), auto_pad="SAME_LOWER", transposed=True, group=2), (4, 3)),
    (ConvSpec((3, 2, 3, 3), (2, 2), auto_pad="VALID", transposed=True, output_padding=(1, 0)), (4, 3)),
]


def layer(spec, size=(), **options):
    return Layer("name", "Conv", spec, lambda: np.zeros(spec.weight_shape), np.dtype("float32"), size, **options)


# --- ConvSpec -----------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_one_or_zero_for_each_axis():
    spec = ConvSpec((8, 4, 3, 5))
    assert (spec.strides, spec.pads, spec.dilations, spec.output_padding) == ((1, 1), (0, 0, 0, 0), (1, 1), (0, 0))
    assert ConvSpec((8, 4, 3, 5), strides=[1, 1], pads=[0] * 4) == spec  # type: ignore[arg-type]
    matrix = ConvSpec((8, 4))
    assert (matrix.strides, matrix.pads, matrix.kernel, matrix.ndim) == ((), (), (), 0)


def test_channels_follow_from_the_kernel_the_groups_and_the_direction():
    for spec, outputs, inputs, params in (
        (ConvSpec((8, 4, 3, 5)), 8, 4, 480),
        (ConvSpec((8, 4, 3, 5), group=2), 8, 8, 480),
        (ConvSpec((8, 4, 3, 5), transposed=True), 4, 8, 480),
        (ConvSpec((8, 4, 3, 5), group=2, transposed=True), 8, 8, 480),
        (ConvSpec((8, 4)), 8, 4, 32),
    ):
        assert (spec.out_channels, spec.in_channels, spec.params) == (outputs, inputs, params)


def test_depthwise_is_one_input_channel_for_each_of_several_groups():
    assert ConvSpec((8, 1, 3, 3), group=8).depthwise
    assert ConvSpec((16, 1, 3, 3), group=8).depthwise
    assert ConvSpec((8, 1, 3, 3), group=8, transposed=True).depthwise
    assert not ConvSpec((8, 2, 3, 3), group=4).depthwise
    assert not ConvSpec((8, 1, 3, 3)).depthwise  # one input channel, not one for each group


@pytest.mark.parametrize(("spec", "size"), SPECS)
def test_the_output_size_is_that_of_the_convolution(spec, size):
    x = np.zeros((1, spec.in_channels, *size))
    assert spec.output_size(size) == convolve(x, np.zeros(spec.weight_shape), spec).shape[2:]


def test_a_stage_keeps_stride_pads_and_dilation_of_the_axes_that_it_spans():
    spec = ConvSpec((8, 4, 3, 5), strides=(2, 3), pads=(1, 2, 3, 4), dilations=(2, 1))
    assert spec.stage(6, 4, [0]) == ConvSpec((6, 4, 3, 1), (2, 1), pads=(1, 0, 3, 0), dilations=(2, 1))
    assert spec.stage(8, 6, [1]) == ConvSpec((8, 6, 1, 5), (1, 3), pads=(0, 2, 0, 4), dilations=(1, 1))
    assert spec.stage(6, 1, [0, 1], group=6) == dataclasses.replace(spec, weight_shape=(6, 1, 3, 5), group=6)
    assert spec.stage(6, 4) == ConvSpec((6, 4, 1, 1))


def test_a_stage_of_a_transposed_convolution_keeps_its_output_padding_too():
    spec = ConvSpec((8, 4, 3, 3), (2, 2), transposed=True, output_padding=(1, 1))
    assert spec.stage(8, 5, [1]) == ConvSpec((8, 5, 1, 3), (1, 2), transposed=True, output_padding=(0, 1))


def test_only_a_stage_that_spans_an_axis_pads_automatically():
    spec = ConvSpec((8, 4, 3, 3), (2, 2), auto_pad="SAME_LOWER")
    assert spec.stage(8, 5, [1]).auto_pad == "SAME_LOWER"
    assert spec.stage(5, 4).auto_pad == "NOTSET"


@pytest.mark.parametrize(("spec", "size"), SPECS)
def test_stages_that_span_an_axis_each_give_the_layers_output_size(spec, size):
    plain = dataclasses.replace(spec, group=1)
    after = size
    for axis in range(spec.ndim):
        after = plain.stage(2, 2, [axis]).output_size(after)
    assert after == spec.output_size(size)


# --- Layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "size"), SPECS)
def test_the_macs_of_a_layer_are_those_counted_one_by_one(spec, size):
    assert layer(spec, size).macs == counted_macs((Stage(spec),), size)
    assert layer(spec, size, batch=5).macs == 5 * counted_macs((Stage(spec),), size)


def test_a_matrix_product_has_a_multiplication_for_each_entry_and_row():
    assert layer(ConvSpec((8, 4)), batch=10).macs == 320


def test_two_layers_are_compared_by_what_they_are_and_not_by_their_readers():
    assert layer(ConvSpec((8, 4))) == layer(ConvSpec((8, 4)))
    assert layer(ConvSpec((8, 4))) != layer(ConvSpec((8, 4)), batch=2)


# --- Cost, Budget, Plan -------------------------------------------------------------------------------------------


def test_costs_add_up():
    assert Cost(3, 4) + Cost(10, 20) == Cost(13, 24)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, 50.0, math.nan, math.inf])
def test_a_budget_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(LowRankError, match=r"^budget macs=\S+: a fraction .* above 0 and at most 1 .* macs=0\.5$"):
        Budget("macs", ratio)


def test_a_budget_may_be_all_of_the_original():
    assert Budget("params", 1.0).ratio == 1


def test_errors_are_value_errors():
    assert issubclass(LowRankError, ValueError)


def test_a_plan_adds_up_its_choices_and_the_rest():
    choices = (
        Candidate(("a",), DENSE, (), (), Cost(10, 1), 0.0),
        Candidate(("b", "c"), "svd", (2,), (), Cost(20, 5), 0.25),
        Candidate(("d",), "cp3", (4,), (), Cost(5, 2), 0.5),
    )
    plan = Plan(choices, (Skip("e", "Conv", "depthwise"),), Cost(15, 2), Cost(200, 40))
    assert [choice.dense for choice in choices] == [True, False, False]
    assert plan.cost == Cost(50, 10)
    assert plan.error == 0.75
    assert plan.ratio("macs") == 0.25
    assert plan.ratio("params") == 0.25


def test_a_plan_of_a_model_without_cost_leaves_all_of_it():
    assert Plan(()).ratio("macs") == 1
    assert Plan(()).cost == Cost(0, 0)


def test_notes_are_added_behind_those_there_are():
    plan = Plan((), notes=("one",)).with_notes("two", "three")
    assert plan.notes == ("one", "two", "three")
    assert Plan(()).with_notes().notes == ()

"""Sizes for one sample: what the user gives, what the model fixes, what is assumed and said, and what follows from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_lowrank.graph import shapes as module
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import Shapes, infer, model_inputs, sample_shapes, with_outputs
from onnx_lowrank.types import InputSpec, LowRankError
from tests.helpers import feeds_of, normal, parse, run


def spec(name: str, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, shape, np.dtype(np.float32))


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_have_names_sizes_and_types_and_initializers_are_none() -> None:
    model = parse(
        "g (float[N,3,?,8] x, int64[2] ids, float16 s, bfloat16[1] h, float[1] w) => (float[] y) { y = Neg (x) }",
        w=normal(1),
    )
    found = model_inputs(load(model))
    assert [(i.name, i.shape, i.dtype.name) for i in found] == [
        ("x", ("N", 3, None, 8), "float32"),
        ("ids", (2,), "int64"),
        ("s", (), "float16"),
        ("h", (1,), "bfloat16"),
    ]


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_is_no_size_is_unknown(size: int) -> None:
    model = parse("g (float[1,4] x) => (float[] y) { y = Neg (x) }")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = size
    assert model_inputs(load(model))[0].shape == (1, None)


def test_an_input_that_is_not_a_tensor_is_refused() -> None:
    model = parse("g (seq(float[1]) x) => (float[] y) { y = ConcatFromSequence <axis=0> (x) }")
    with pytest.raises(
        LowRankError, match="input 'x' is not a tensor: only models whose inputs are tensors can be fed"
    ):
        model_inputs(load(model))


def test_an_input_of_an_unknown_type_is_refused() -> None:
    model = parse("g (float[1] x) => (float[] y) { y = Neg (x) }")
    model.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(LowRankError, match="input 'x' has a type of number 99, which ONNX does not have"):
        model_inputs(load(model))


# --- sizes for one sample --------------------------------------------------------------------------------------------


def test_sizes_that_the_model_fixes_are_taken_without_a_note() -> None:
    assert sample_shapes([spec("x", 2, 3, 5, 7), spec("s")], {}) == ({"x": (2, 3, 5, 7), "s": ()}, ())


def test_a_batch_is_one_sample_without_a_note() -> None:
    assert sample_shapes([spec("x", "N", 3), spec("z", None, 4)], {}) == ({"x": (1, 3), "z": (1, 4)}, ())


def test_sizes_that_are_assumed_are_said_with_the_option_that_gives_them() -> None:
    sizes, notes = sample_shapes([spec("x", "N", 3, "H", None), spec("ids", 1, "L")], {})
    assert sizes == {"x": (1, 3, 224, 224), "ids": (1, 128)}
    assert notes == (
        "input 'x' has unknown sizes [N, 3, H, ?], taken as [1, 3, 224, 224]: give --input-shape x:1,3,224,224 with yours",
        "input 'ids' has unknown sizes [1, L], taken as [1, 128]: give --input-shape ids:1,128 with yours",
    )


def test_sizes_that_are_given_are_taken_without_a_note() -> None:
    assert sample_shapes([spec("x", "N", 3, "H", "W")], {"x": (2, 3, 64, 48)}) == ({"x": (2, 3, 64, 48)}, ())


def test_an_axis_of_one_name_has_one_size() -> None:
    inputs = [spec("ids", "N", "L"), spec("mask", "N", 1, "L", "L"), spec("past", "N", "P")]
    sizes, _ = sample_shapes(inputs, {})
    assert sizes == {"ids": (1, 128), "mask": (1, 1, 128, 128), "past": (1, 128)}
    sizes, _ = sample_shapes(inputs, {"mask": (2, 1, 64, 64)})
    assert sizes == {"ids": (2, 64), "mask": (2, 1, 64, 64), "past": (2, 128)}
    assert list(sizes) == ["ids", "mask", "past"]


def test_sizes_given_for_an_input_that_is_not_there_are_refused() -> None:
    with pytest.raises(LowRankError, match="input shape given for 'image': the model's inputs are x, z"):
        sample_shapes([spec("x", 1), spec("z", 1)], {"image": (1,)})
    with pytest.raises(LowRankError, match="the model's inputs are none"):
        sample_shapes([], {"image": (1,)})


@pytest.mark.parametrize("given", [(1, 3, 224), (1, 4, 8, 8), (1, 3, 8, 9)])
def test_sizes_that_disagree_with_the_model_are_refused(given: tuple[int, ...]) -> None:
    with pytest.raises(LowRankError, match=r"input shape \[1, .*\] given for 'x': the model expects \[N, 3, \?, 8\]"):
        sample_shapes([spec("x", "N", 3, None, 8)], {"x": given})


# --- inference -------------------------------------------------------------------------------------------------------


def inferred(text: str, given: Shapes, **stored: np.ndarray) -> Shapes:
    return infer(load(parse(text, **stored)), given)


def test_sizes_follow_through_shape_gather_concat_and_reshape() -> None:
    text = """g (float[N,C,H,W] x) => (float[] y) {
        s = Shape (x)
        n = Gather (s, zero)
        nn = Unsqueeze (n, axis)
        m = Concat <axis=0> (nn, minus)
        f = Reshape (x, m)
        y = MatMul (f, w)
    }"""
    arrays = {"zero": np.int64(0), "axis": np.array([0]), "minus": np.array([-1])}
    found = inferred(text, {"x": (2, 3, 4, 5)}, w=normal(60, 7), **arrays)
    assert (found["f"], found["y"]) == ((2, 60), (2, 7))
    found = inferred(text, {"x": (1, 3, 8, 8)}, w=normal(192, 7), **arrays)
    assert (found["f"], found["y"]) == ((1, 192), (1, 7))


def test_sizes_that_the_model_claims_do_not_stand_against_those_of_the_sample() -> None:
    model = parse("g (float[N,4,H,W] x) => (float[1,6,1,1] y) { a = Relu (x) y = Conv (a, w) }", w=normal(6, 4, 3, 3))
    model.graph.value_info.append(helper.make_tensor_value_info("a", 1, [9, 4, 9, 9]))
    found = infer(load(model), {"x": (2, 4, 7, 8)})
    assert (found["a"], found["y"]) == ((2, 4, 7, 8), (2, 6, 5, 6))


def test_weights_are_known_by_their_shape_alone() -> None:
    large = normal(128, 128)
    assert large.size > module.SMALL
    found = inferred("g (float[N,128] x) => (float[] y) { y = MatMul (x, w) }", {"x": (3, 128)}, w=large)
    assert (found["w"], found["y"]) == ((128, 128), (3, 128))


def test_sizes_of_functions_and_bodies_are_inferred_from_outside() -> None:
    model = parse(
        """g (float[N,5] x, bool c) => (float[] y, float[] z) {
            y = local.f (x)
            z = If (c) <
                then_branch = t () => (float[] p) { p = Concat <axis=0> (x, x) },
                else_branch = e () => (float[] q) { q = Concat <axis=0> (x, x) }
            >
        }"""
    )
    body = [helper.make_node("Transpose", ["i"], ["o"], perm=[1, 0])]
    model.functions.append(helper.make_function("local", "f", ["i"], ["o"], body, model.opset_import))
    model.opset_import.append(helper.make_opsetid("local", 1))
    found = infer(load(model), {"x": (3, 5), "c": ()})
    assert (found["y"], found["z"]) == ((5, 3), (6, 5))


def test_what_inference_cannot_tell_is_left_out_and_what_it_can_is_kept() -> None:
    model = parse("g (float[1,4] x) => (float[] y) { a = Relu (x) b = some.where.op (a) y = Neg (b) }")
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    assert infer(load(model), {"x": (1, 4)}) == {"x": (1, 4), "a": (1, 4)}


def test_sizes_are_inferred_for_versions_that_list_initializers_as_inputs() -> None:
    model = parse(
        "g (float[N,5] x, float[5,4] w) => (float[] y) { y = MatMul (x, w) }", opset=8, ir_version=3, w=normal(5, 4)
    )
    assert infer(load(model), {"x": (3, 5)})["y"] == (3, 4)


def test_sizes_for_an_input_of_unknown_rank_are_those_given() -> None:
    found = inferred("g (float[] x) => (float[] y) { y = MatMul (x, w) }", {"x": (2, 3, 5)}, w=normal(5, 4))
    assert found["y"] == (2, 3, 4)


@pytest.mark.parametrize("sizes", [(2, 4, 9, 7), (1, 4, 12, 12)])
def test_inference_agrees_with_onnx_runtime(sizes: tuple[int, ...]) -> None:
    model = parse(
        """g (float[N,4,H,W] x) => (float[] y) {
            a = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (x, w)
            b = MaxPool <kernel_shape=[2,2], strides=[2,2], ceil_mode=1> (a)
            c = ConvTranspose <strides=[2,2], output_padding=[1,0]> (b, t)
            d = GlobalAveragePool (c)
            y = Flatten (d)
        }""",
        w=normal(6, 4, 3, 3),
        t=normal(6, 3, 2, 2),
    )
    names = ["a", "b", "c", "d", "y"]
    outputs = run(with_outputs(load(model), names).proto, feeds_of(model, x=sizes))
    order = ["y", "a", "b", "c", "d"]
    found = infer(load(model), {"x": sizes})
    assert {name: found[name] for name in names} == dict(zip(order, (o.shape for o in outputs), strict=True))


def test_a_model_that_returns_more_is_a_copy() -> None:
    model = load(parse("g (float[1,4] x) => (float[] y) { a = Relu (x) y = Neg (a) }"))
    before = model.proto.SerializeToString()
    more = with_outputs(model, ["a", "y"])
    assert [o.name for o in more.graph.output] == ["y", "a"]
    assert model.proto.SerializeToString() == before
    assert isinstance(more.proto, onnx.ModelProto)

"""BatchNormalization is folded into the convolution before it where that is exact, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.model import load
from onnx_lowrank.types import LowRankError
from tests.helpers import assert_same_function, decompose, feeds_of, find, normal, parse, stored, with_stored

OUT = 6


def statistics(count: int = OUT, dtype: str = "float32") -> dict[str, np.ndarray]:
    names = ("scale", "shift", "mean", "variance")
    values = {name: normal(count, seed=seed) for seed, name in enumerate(names, 10)}
    values["variance"] = np.abs(values["variance"]) + np.float32(0.1)
    return {name: value.astype(dtype) for name, value in values.items()}


def normalised(
    conv: str = "h = Conv (x, w, b)",
    norm: str = "y = BatchNormalization (h, scale, shift, mean, variance)",
    *,
    outputs: str = "float[] y",
    opset: int = 17,
    ir_version: int = 8,
    **stored_too: np.ndarray,
) -> onnx.ModelProto:
    arrays = {"w": normal(OUT, 4, 3, 3), "b": normal(OUT), **statistics()} | stored_too
    used = {name: value for name, value in arrays.items() if f" {name}" in conv + norm or f"({name}" in conv + norm}
    text = f"g (float[2,4,6,6] x) => ({outputs}) {{ {conv} {norm} }}"
    return parse(text, opset=opset, ir_version=ir_version, **used)


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy after folding."""
    copy = load(model).copy()
    count = fold_batchnorm(copy)
    before, after = ([node.op_type for node in m.graph.node].count("BatchNormalization") for m in (model, copy))
    assert count == before - after
    return copy.proto


def assert_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    result = folded(model)
    assert "BatchNormalization" not in {node.op_type for node in result.graph.node}
    assert_same_function(result, model, feeds_of(model))
    return result


def assert_left(model: onnx.ModelProto) -> None:
    assert folded(model).SerializeToString() == model.SerializeToString()


# --- where it is exact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        ("h = Conv (x, w, b)", (OUT, 4, 3, 3)),
        ("h = Conv <strides=[2,1], pads=[1,0,2,1], dilations=[1,2]> (x, w)", (OUT, 4, 3, 2)),
        ("h = Conv <group=2> (x, w, b)", (OUT, 2, 3, 3)),
        ("h = Conv <group=4> (x, w, b)", (8, 1, 3, 3)),
        ("h = ConvTranspose (x, w, b)", (4, OUT, 3, 3)),
        ("h = ConvTranspose <strides=[2,2], output_padding=[1,0]> (x, w)", (4, OUT, 2, 3)),
        ("h = ConvTranspose <group=2> (x, w, b)", (4, 3, 3, 3)),
        ("h = ConvTranspose <group=4, strides=[2,2]> (x, w)", (4, 2, 3, 3)),
    ],
)
def test_a_normalisation_after_a_convolution_is_folded_exactly(conv: str, shape: tuple[int, ...]) -> None:
    group = int(conv.split("group=")[1][0]) if "group" in conv else 1
    out = shape[1] * group if "Transpose" in conv else shape[0]
    model = normalised(conv, w=normal(*shape), b=normal(out), **statistics(out))
    result = assert_folded(model)
    assert [node.op_type for node in result.graph.node] == [model.graph.node[0].op_type]
    assert len(result.graph.initializer) == 2


def test_the_comparison_fails_for_a_fold_that_is_slightly_wrong() -> None:
    model = normalised()
    result = folded(model)
    for tensor in result.graph.initializer:
        value = stored(result, tensor.name)
        swapped = value.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        for wrong in (value * np.float32(1.01), swapped):
            with pytest.raises(AssertionError, match="off by"):
                assert_same_function(with_stored(result, tensor.name, wrong), model, feeds_of(model))


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_the_epsilon_of_the_node_is_used(epsilon: float) -> None:
    assert_folded(normalised(norm=f"y = BatchNormalization <epsilon={epsilon}> (h, scale, shift, mean, variance)"))


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_every_operator_set_that_the_runtime_has_is_folded(opset: int) -> None:
    assert_folded(normalised(opset=opset))


def test_a_bias_with_an_empty_name_is_no_bias() -> None:
    model = normalised()
    model.graph.node[0].input[2] = ""
    assert_folded(model)


def test_statistics_may_be_derived_and_shared_and_go_only_when_nothing_reads_them() -> None:
    model = normalised(
        conv="i = Identity (scale) h = Conv (x, w, b) k = Conv (x, v)",
        norm="""y = BatchNormalization (h, i, shift, mean, variance)
            z = BatchNormalization (k, i, shift, mean, variance)
            s = Add (y, shift_back)
            t = Relu (mean)""",
        outputs="float[] s, float[] z, float[] t",
        v=normal(OUT, 4, 3, 3, seed=7),
        shift_back=np.float32(0.1),
    )
    result = assert_folded(model)
    names = {tensor.name for tensor in result.graph.initializer}
    assert "mean" in names
    assert not {"scale", "shift", "variance", "w", "v", "b"} & names
    assert "Identity" not in {node.op_type for node in result.graph.node}


def test_the_convolution_keeps_its_name_and_place_and_takes_the_output() -> None:
    model = normalised(conv='a = Relu (x) ["conv"] h = Conv (a, w, b)')
    model.graph.value_info.append(helper.make_tensor_value_info("h", 1, [2, OUT, 4, 4]))
    model.graph.value_info.append(helper.make_tensor_value_info("a", 1, [2, 4, 6, 6]))
    result = assert_folded(model)
    assert [node.name for node in result.graph.node] == ["", "conv"]
    assert list(result.graph.node[1].output) == ["y"]
    assert [value.name for value in result.graph.value_info] == ["a"], "the tensor between the two is gone"


def test_names_of_what_is_new_differ_from_every_other() -> None:
    model = normalised(conv="w_folded = Relu (x) h = Conv (w_folded, w, b)")
    names = [tensor.name for tensor in assert_folded(model).graph.initializer]
    assert names == ["w_folded_1", "y_bias_folded"]


def test_the_model_given_is_not_changed_by_folding_a_copy() -> None:
    model = normalised()
    before = model.SerializeToString()
    folded(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("ir_version", [3, 8])
def test_where_initializers_are_listed_as_inputs_the_new_ones_are_too(ir_version: int) -> None:
    model = normalised(opset=8, ir_version=ir_version)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    result = assert_folded(model)
    assert {value.name for value in result.graph.input} == {"x", *(t.name for t in result.graph.initializer)}
    assert len(find(result).layers) == 1, "its kernel is not taken for one that is fed"


def test_a_folded_convolution_decomposes_exactly() -> None:
    model = normalised()
    assert_same_function(decompose(folded(model), "tucker2").model, model, feeds_of(model))


# --- where it is not -------------------------------------------------------------------------------------------------


def test_a_convolution_with_another_reader_is_left() -> None:
    assert_left(normalised(norm="y = BatchNormalization (h, scale, shift, mean, variance) z = Relu (h)"))
    assert_left(normalised(outputs="float[] y, float[] h"))


def test_a_convolution_that_a_body_reads_is_left() -> None:
    model = normalised(
        norm="""y = BatchNormalization (h, scale, shift, mean, variance)
            z = If (c) <
                then_branch = t () => (float[] p) { p = Neg (h) }, else_branch = e () => (float[] q) { q = Neg (x) }
            >""",
        outputs="float[] y, float[] z",
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    assert_left(model)


def test_a_kernel_that_is_read_elsewhere_is_left() -> None:
    assert_left(normalised(conv="h = Conv (x, w, b) k = Conv (x, w)", outputs="float[] y, float[] k"))
    assert_left(normalised(conv="i = Identity (w) h = Conv (x, i, b) k = Conv (x, w)", outputs="float[] y, float[] k"))


@pytest.mark.parametrize(
    "norm",
    [
        "y, m, v = BatchNormalization <training_mode=1> (h, scale, shift, mean, variance)",
        "y = BatchNormalization <training_mode=1> (h, scale, shift, mean, variance)",
    ],
)
def test_training_is_left(norm: str) -> None:
    assert_left(normalised(norm=norm))


def test_running_statistics_that_are_returned_are_left() -> None:
    assert_left(normalised(norm="y, m, v = BatchNormalization (h, scale, shift, mean, variance)", opset=9))


def test_statistics_for_each_element_are_left() -> None:
    model = normalised(norm="y = BatchNormalization <spatial=0> (h, scale, shift, mean, variance)", opset=7)
    assert_left(model)


def test_the_form_before_operator_set_7_is_left() -> None:
    assert_left(normalised(norm="y = BatchNormalization <is_test=0> (h, scale, shift, mean, variance)", opset=6))


def test_a_convolution_of_another_domain_is_left() -> None:
    for position in (0, 1):
        model = normalised()
        model.graph.node[position].domain = "some.where"
        assert_left(model)


@pytest.mark.parametrize("name", ["w", "b", "scale", "variance"])
def test_what_a_user_may_feed_is_left(name: str) -> None:
    model = normalised()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    assert_left(model)


@pytest.mark.parametrize("name", ["w", "b", "mean"])
def test_what_is_quantised_is_left(name: str) -> None:
    model = normalised(conv="h = Conv (x, w, b)")
    for node in model.graph.node:
        node.input[:] = [f"{name}_float" if i == name else i for i in node.input]
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", [name, "step"], [f"{name}_float"]))
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = np.ones(tuple(tensor.dims), np.int32 if name == "b" else np.int8)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), "step"))
    assert_left(model)


@pytest.mark.parametrize("name", ["w", "b", "shift"])
def test_what_is_computed_is_left(name: str) -> None:
    model = normalised()
    for node in model.graph.node:
        node.input[:] = [f"{name}_made" if i == name else i for i in node.input]
    model.graph.node.insert(0, helper.make_node("Neg", [name], [f"{name}_made"]))
    assert_left(model)


def test_a_normalisation_after_something_else_is_left() -> None:
    assert_left(normalised(conv="k = Conv (x, w, b) h = Relu (k)"))
    model = parse(
        "g (float[2,6,4,4] x) => (float[] y) { y = BatchNormalization (x, scale, shift, mean, variance) }",
        **statistics(),
    )
    assert_left(model)


def test_a_product_that_overflows_half_precision_is_left() -> None:
    arrays = {name: value.astype(np.float16) for name, value in {"w": normal(OUT, 4, 3, 3), **statistics()}.items()}
    arrays["scale"] = np.full(OUT, 6e4, np.float16)
    arrays["w"] = np.full_like(arrays["w"], 2)
    model = parse(
        "g (float16[2,4,6,6] x) => (float16[] y) { h = Conv (x, w) y = BatchNormalization (h, scale, shift, mean, variance) }",
        **arrays,
    )
    assert_left(model)


def test_statistics_of_another_length_are_left() -> None:
    assert_left(normalised(mean=normal(1)))
    assert_left(normalised(conv="h = ConvTranspose <group=2> (x, w, b)", w=normal(4, OUT, 3, 3)))


def test_a_damaged_statistic_is_an_error_that_names_it() -> None:
    model = normalised()
    next(t for t in model.graph.initializer if t.name == "mean").raw_data = b"123"
    with pytest.raises(LowRankError, match="tensor 'mean' is damaged"):
        folded(model)


def test_after_a_kernel_that_is_used_twice_a_scale_and_a_shift_are_left() -> None:
    model = normalised(
        conv="h = Conv (x, w) k = Conv (x, w)",
        norm="""y = BatchNormalization (h, scale, shift, mean, variance)
            z = BatchNormalization (k, scale2, shift2, mean2, variance2)""",
        outputs="float[] y, float[] z",
        **{f"{name}2": value + np.float32(0.3) for name, value in statistics().items()},
    )
    copy = load(model).copy()
    assert fold_batchnorm(copy) == 0
    assert_same_function(copy.proto, model, feeds_of(model))
    first, second = (node for node in copy.graph.node if node.op_type == "BatchNormalization")
    assert first.input[3:] == second.input[3:]  # stored once
    assert len(copy.graph.initializer) == len(model.graph.initializer) - 2

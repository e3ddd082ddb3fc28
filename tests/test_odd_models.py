"""Models that are valid and unlike most: each becomes what was asked for, or is left alone or refused with its reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lowrank as lr
from onnx_lowrank.types import LowRankError
from tests.helpers import feeds_of, normal, parse, run

MATRIX = normal(16, 12)
ALONE = "g (float[3,16] x) => (float[m,n] y) { y = MatMul (x, w) }"

VALID: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "an input that is an output": ("g (float[3,16] x) => (float[3,16] x, float[m,n] y) { y = MatMul (x, w) }", {}),
    "a layer that nothing reads": ("g (float[3,16] x) => (float[a,b] y) { d = MatMul (x, w) y = Relu (x) }", {}),
    "an output in a chain": (
        "g (float[3,16] x) => (float[m,n] d, float[a,b] y) { d = MatMul (x, w) y = MatMul (d, v) }",
        {"v": normal(12, 10)},
    ),
    "an input that nothing reads": ("g (bool b, float[3,16] x) => (float[m,n] y) { y = MatMul (x, w) }", {}),
    "a number for a result": (
        "g (float[3,16] x) => (float y) { d = MatMul (x, w) y = ReduceSum <keepdims=0> (d) }",
        {},
    ),
    "whole numbers for a result": (
        "g (float[3,16] x) => (int64[m,n] y) { d = MatMul (x, w) y = Cast <to=7> (d) }",
        {},
    ),
    "truth for a result": ("g (float[3,16] x) => (bool[m,n] y) { d = MatMul (x, w) y = Cast <to=9> (d) }", {}),
    "text for a result": ("g (float[3,16] x) => (string[m,n] y) { d = MatMul (x, w) y = Cast <to=8> (d) }", {}),
    "quantised activations around a float kernel": (
        """g (float[3,16] x) => (float[m,n] y) {
            q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, w)
        }""",
        {"s": np.float32(0.1), "z": np.uint8(128)},
    ),
    "an optional input left out": (
        "g (float[3,16] x) => (float[m,n] y) { d = Clip (x, , top) y = MatMul (d, w) }",
        {"top": np.float32(0.5)},
    ),
    "a local function beside the layer": (
        "g (float[3,16] x) => (float[m,n] y) { d = my.twice (x) y = MatMul (d, w) }",
        {},
    ),
    "a product inside a body and outside": (
        """g (float[3,16] x, bool c) => (float[m,n] y) {
            d = MatMul (x, w)
            y = If (c) <then_branch = g1 () => (float[m,n] t) { t = MatMul (x, w) },
                        else_branch = g2 () => (float[m,n] e) { e = Add (d, d) }>
        }""",
        {},
    ),
}


def odd(name: str) -> onnx.ModelProto:
    text, arrays = VALID[name]
    model = parse(text, w=MATRIX, **arrays)
    if "my." in text:
        body = [helper.make_node("Add", ["a", "a"], ["b"])]
        model.opset_import.append(helper.make_opsetid("my", 1))
        model.functions.append(helper.make_function("my", "twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    return model


@pytest.mark.parametrize("name", VALID)
def test_an_odd_model_is_compressed_and_returns_what_it_did_in_kind(name: str) -> None:
    model = odd(name)
    result = lr.compress(model, budget={"macs": 0.9}, align=1, jobs=1)
    inside = name == "a product inside a body and outside"  # which keeps the kernel
    assert [layer.decomposition for layer in result.report.layers[:1]] == ([] if inside else ["svd"])
    onnx.checker.check_model(result.model, full_check=True)
    feeds = feeds_of(model)
    expected, actual = run(model, feeds), run(result.model, feeds)
    assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]
    names = [[value.name for value in values] for values in (model.graph.output, result.model.graph.output)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("scale", "changed"),
    [(0.0, True), (1e-42, True), (1e38, None), (np.logspace(-30, 30, 12, dtype="float32"), None)],
    ids=["zeros", "denormal", "huge", "of any size"],
)
@pytest.mark.parametrize("options", [{"budget": {"macs": 0.9}}, {"rank": "vbmf"}, {"rank": "energy=0.9"}])
def test_kernels_of_extreme_numbers_are_decomposed_or_left_and_never_broken(
    scale: float | np.ndarray, changed: bool | None, options: dict[str, object]
) -> None:
    kernel = np.clip(MATRIX * scale, -3e38, 3e38).astype("float32")
    result = lr.compress(parse(ALONE, w=kernel), align=1, jobs=1, **options)
    if changed and "budget" in options:
        assert len(result.report.layers) == 1
    for tensor in result.model.graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all()


@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "FLOAT8E5M2", "COMPLEX64", "INT4", "STRING"])
def test_a_kernel_of_a_type_that_is_not_decomposed_is_left_with_its_type(kind: str) -> None:
    model = parse(ALONE)
    tensor = TensorProto(name="w", data_type=getattr(TensorProto, kind), dims=[16, 12])
    if kind == "STRING":
        tensor.string_data.extend([b"a"] * MATRIX.size)
    else:
        tensor.raw_data = b"\x01" * {"INT4": 96, "COMPLEX64": 8 * 192}.get(kind, 192)
    model.graph.initializer.append(tensor)
    (skip,) = lr.inspect(model).skips
    assert skip.reason.startswith("its weight has type ")


def test_an_embedding_that_is_also_the_last_product_stays_one_tensor() -> None:
    text = """g (int64[N,4] i) => (float[N,4,v] y) {
        e = Gather (w, i) t = Transpose <perm=[1,0]> (w) y = MatMul (e, t)
    }"""
    model = parse(text, w=normal(40, 16))
    result = lr.compress(model, budget={"params": 0.9}, align=1, jobs=1)
    assert not result.report.layers
    assert result.model.SerializeToString() == model.SerializeToString()
    assert "something else reads its kernel too" in result.report.skips[0].reason


def sequence(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("SequenceConstruct", ["y", "y"], ["s"]))
    model.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))


def optional(model: onnx.ModelProto) -> None:
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    model.graph.input.append(helper.make_value_info("o", helper.make_optional_type_proto(kind)))


def from_values(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Greater", ["y", "zero"], ["b"]))
    model.graph.node.append(helper.make_node("Flatten", ["b"], ["f"], axis=0))
    model.graph.node.append(helper.make_node("Squeeze", ["f", "axes"], ["c"]))
    model.graph.node.append(helper.make_node("Compress", ["y", "c"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["k"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (sequence, "output 1 is a sequence, a map or nothing: only models whose outputs are tensors"),
        (optional, "input 'o' is not a tensor"),
        (from_values, "whose sizes do not follow from values"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(change: Callable[[onnx.ModelProto], None], said: str) -> None:
    model = parse(ALONE, w=MATRIX)
    change(model)
    onnx.checker.check_model(model)
    with pytest.raises(LowRankError, match=said):
        lr.compress(model, budget={"macs": 0.6}, align=1, jobs=1)


def test_a_model_without_inputs_has_nothing_to_decompose() -> None:
    text = "g () => (float[m,n] y) { k = Constant <value = float[1,16] {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> () y = MatMul (k, w) }"
    model = parse(text, w=MATRIX)
    assert [skip.reason for skip in lr.inspect(model).skips] == ["both of its inputs are constant"]
    with pytest.raises(LowRankError, match="no layer to decompose"):
        lr.compress(model, budget={"macs": 0.9})

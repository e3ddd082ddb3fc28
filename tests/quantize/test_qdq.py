"""Models in eight bits: valid, small, near to what they were, with the names and the nodes that were asked for left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from onnx_lowrank.graph.model import load
from onnx_lowrank.quantize import as_quantized, beginnings, check_unquantized, insert_qdq, measure_ranges, prepared
from onnx_lowrank.quantize.ranges import find_ranges
from onnx_lowrank.quantize.rounding import rounding_of
from onnx_lowrank.types import LowRankError
from tests.helpers import feeds_of, normal, parse, run

TEXT = """g (float[N, 3, 16, 16] x) => (float[N, 10] y) {
  [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  [bend] r = Relu (a)
  [second] b = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w2)
  [norm] n = BatchNormalization (b, gain, shift, mean, variance)
  [third] c = Conv <pads = [1, 1, 1, 1]> (n, w3)
  [sum] s = Add (c, n)
  [pool] p = GlobalAveragePool (s)
  [flat] f = Flatten (p)
  [last] y = Gemm <transB = 1> (f, w4, b4)
}"""


def network(*, opset: int = 17) -> onnx.ModelProto:
    norm = {"gain": 1 + normal(16, seed=5), "shift": normal(16, seed=6), "mean": normal(16, seed=7)}
    return parse(
        TEXT,
        opset=opset,
        w1=normal(8, 3, 3, 3),
        b1=normal(8, seed=1),
        w2=normal(16, 8, 3, 3, seed=2),
        w3=normal(16, 16, 3, 3, seed=3),
        w4=normal(10, 16, seed=4),
        b4=normal(10, seed=8),
        variance=np.ones(16, np.float32),
        **norm,
    )


def quantized(proto: onnx.ModelProto, **options):
    feeds = feeds_of(proto, x=(32, 3, 16, 16))
    ready = prepared(load(proto), [feeds])
    return feeds, ready, insert_qdq(ready, measure_ranges(ready, [feeds]), **options)


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("signed", [False, True])
def test_outputs_stay_near_and_weights_take_a_byte(opset: int, signed: bool) -> None:
    proto = network(opset=opset)
    feeds, _, model = quantized(proto, signed=signed)
    onnx.checker.check_model(model.proto, full_check=True)
    (got,), (wanted,) = run(model.proto, feeds), run(proto, feeds)
    assert np.square(got - wanted).sum() < 3e-3 * np.square(wanted).sum()
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1)
    assert kinds == {onnx.TensorProto.INT8: 4}
    assert (model.proto.ir_version, model.proto.producer_name) == (proto.ir_version, proto.producer_name)


def test_names_of_nodes_inputs_and_outputs_stay() -> None:
    proto = network()
    _, _, model = quantized(proto)
    names = {node.name for node in model.graph.node if node.name}
    assert {"first", "second", "third", "last"} <= names <= {node.name for node in proto.graph.node}
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["y"]


def test_nodes_left_in_floating_point_are_as_they_were() -> None:
    proto = network()
    _, ready, model = quantized(proto, float_nodes=["first", "bend", "second"])
    old = {tensor.name: tensor for tensor in ready.graph.initializer}
    kept = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in old}
    assert {"w1", "b1"} <= set(kept)
    assert all(tensor.SerializeToString() == old[name].SerializeToString() for name, tensor in kept.items())
    (first,) = [node for node in model.graph.node if node.name == "first"]
    assert list(first.input) == ["x", "w1", "b1"]


def test_nothing_that_is_added_is_stored_twice() -> None:
    _, ready, model = quantized(network())
    before = {tensor.name for tensor in ready.graph.initializer}
    added = [tensor for tensor in model.graph.initializer if tensor.name not in before]
    values = [(tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes()) for tensor in added]
    assert len(set(values)) == len(values)
    scales = 4 * sum(int(np.prod(tensor.dims)) for tensor in added if tensor.data_type == onnx.TensorProto.FLOAT)
    weights = sum(int(np.prod(tensor.dims)) for tensor in added if len(tensor.dims) > 1)
    assert len(model.proto.SerializeToString()) < weights + scales + 6000


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_what_is_joined_has_one_scale_only_where_that_fits_all(factor: float) -> None:
    text = """g (float[N, 3, 8, 8] x) => (float[N, 16, 8, 8] y) {
      [one] a = Conv (x, w1)
      [two] b = Conv (x, w2)
      [join] y = Concat <axis = 1> (a, b)
    }"""
    proto = parse(text, w1=normal(8, 3, 1, 1), w2=factor * normal(8, 3, 1, 1, seed=1))
    feeds = {"x": normal(4, 3, 8, 8)}
    ready = prepared(load(proto), [feeds])
    model = insert_qdq(ready, measure_ranges(ready, [feeds]))
    (got,), (wanted,) = run(model.proto, feeds), run(proto, feeds)
    for part in (slice(8), slice(8, 16)):
        assert np.square((got - wanted)[:, part]).sum() < 3e-3 * np.square(wanted[:, part]).sum()


def test_a_kernel_that_may_be_fed_is_left_alone() -> None:
    text = """g (float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y) {
      [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      [two] b = Conv <pads = [1, 1, 1, 1]> (a, w2)
      [three] c = Conv <pads = [1, 1, 1, 1]> (b, w3)
      [four] y = Conv <pads = [1, 1, 1, 1]> (c, w4)
    }"""
    kernels = {f"w{index}": normal(8, 3 if index == 1 else 8, 3, 3, seed=index) for index in (1, 2, 3, 4)}
    proto = parse(text, **kernels)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w2", onnx.TensorProto.FLOAT, [8, 8, 3, 3]))
    feeds = {"x": normal(4, 3, 8, 8)}
    ready = prepared(load(proto), [feeds])
    model = insert_qdq(ready, measure_ranges(ready, [feeds]))
    other = feeds | {"w2": normal(8, 8, 3, 3, seed=9)}
    (got,), (wanted,) = run(model.proto, other), run(proto, other)
    assert np.square(got - wanted).sum() < 3e-2 * np.square(wanted).sum()
    assert any(
        len(tensor.dims) == 4 and tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer
    )


def test_what_a_branch_reads_is_made_before_it() -> None:
    text = """g (float[N, 3, 8, 8] x, bool c) => (float[N, 8, 8, 8] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      r = Relu (a)
      y = If (c) <
        then_branch = t () => (float[N, 8, 8, 8] z) { z = Conv <pads = [1, 1, 1, 1]> (r, w2) },
        else_branch = e () => (float[N, 8, 8, 8] z2) { z2 = Identity (r) }
      >
    }"""
    proto = parse(text, w1=normal(8, 3, 3, 3), w2=normal(8, 8, 3, 3))
    feeds = {"x": normal(4, 3, 8, 8), "c": np.array(True)}
    ready = prepared(load(proto), [feeds])
    model = insert_qdq(ready, measure_ranges(ready, [feeds]))
    onnx.checker.check_model(model.proto, full_check=True)
    (got,), (wanted,) = run(model.proto, feeds), run(proto, feeds)
    assert np.square(got - wanted).sum() < 3e-3 * np.square(wanted).sum()


def test_a_model_without_its_own_ranges_runs_all_the_same() -> None:
    proto = network()
    model = as_quantized(load(proto), {"x": (1, 3, 16, 16)})
    assert run(model.proto, feeds_of(proto, x=(2, 3, 16, 16)))[0].shape == (2, 10)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) >= 5


def test_the_beginning_of_a_model_ends_where_pictures_shrink() -> None:
    proto = network()
    ready = prepared(load(proto), [feeds_of(proto, x=(2, 3, 16, 16))])
    shapes = {"a": (1, 8, 16, 16), "b": (1, 16, 8, 8), "n": (1, 16, 8, 8), "c": (1, 16, 8, 8)}
    assert beginnings(ready, shapes) == [[], ["first", "bend"]]
    assert beginnings(ready, {}) == [[]]


def test_a_quantised_model_is_refused_with_the_way_that_works() -> None:
    _, _, model = quantized(network())
    with pytest.raises(LowRankError, match=r"quantised already .* give the float model"):
        check_unquantized(model)
    check_unquantized(load(network()))


def test_rare_values_far_out_are_cut_off() -> None:
    proto = parse("g (float[N, 400] x) => (float[N, 400] y) { y = MatMul (x, w) }", w=np.eye(400, dtype=np.float32))
    x = np.random.default_rng(3).standard_normal((400, 400)).astype(np.float32)
    x[0, 0] = 10
    _, high = find_ranges(load(proto), [{"x": x}], ["x"])["x"]
    assert 4 < high < 9


def test_zero_is_always_within_the_range() -> None:
    proto = parse("g (float[N, 4] x) => (float[N, 4] y) { y = MatMul (x, w) }", w=np.eye(4, dtype=np.float32))
    low, high = find_ranges(load(proto), [{"x": 5 + np.abs(normal(64, 4))}], ["x"])["x"]
    assert low == 0 and high > 5


def test_what_is_rounded_is_read_off_the_model() -> None:
    _, ready, model = quantized(network(), float_nodes=["first", "bend"])
    rounding = rounding_of(ready, model)
    assert set(rounding.weights) == {"w2_folded", "w3", "w4"}
    assert all(axis == 0 for axis in rounding.weights.values())
    assert "x" not in rounding.activations
    assert {"r", "f"} <= set(rounding.activations)


MASKED = """g (float[N, 6, 8] x) => (float[N, 6, 6] y) {
  [one] a = MatMul (x, w)
  [turned] t = Transpose <perm = [0, 2, 1]> (x)
  [scores] s = MatMul (a, t)
  [masked] m = Add (s, mask)
  [soft] y = Softmax (m)
}"""


@pytest.mark.parametrize("far", [-np.inf, -3.4e38, -1e4])
def test_masks_stay_in_floating_point(far: float) -> None:
    mask = np.triu(np.full((6, 6), far, np.float32), 1)
    mask[np.tril_indices(6)] = 0
    proto = parse(MASKED, w=normal(8, 8), mask=mask)
    feeds = feeds_of(proto, x=(32, 6, 8))
    ready = prepared(load(proto), [feeds])
    model = insert_qdq(ready, measure_ranges(ready, [feeds]))
    (got,), (wanted,) = run(model.proto, feeds), run(proto, feeds)
    assert np.square(got - wanted).sum() < 1e-3 * np.square(wanted).sum()
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def test_nodes_without_names_are_quantised_too() -> None:
    proto = network()
    for node in proto.graph.node:
        node.name = ""
    feeds, ready, model = quantized(proto)
    assert Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1) == {3: 4}
    assert len(rounding_of(ready, model).weights) == 4
    (got,), (wanted,) = run(model.proto, feeds), run(proto, feeds)
    assert np.square(got - wanted).sum() < 3e-3 * np.square(wanted).sum()


def test_kernels_in_constant_nodes_are_kernels() -> None:
    text = "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { w = Constant <value = float[1] {0}> () y = Conv (x, w) }"
    proto = parse(text)
    proto.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(normal(4, 4, 1, 1), "w"))
    feeds = feeds_of(proto, x=(8, 4, 8, 8))
    check_unquantized(load(proto))
    ready = prepared(load(proto), [feeds])
    model = insert_qdq(ready, measure_ranges(ready, [feeds]))
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)


def test_models_that_were_prepared_for_quantisation_are_quantised() -> None:
    proto = network()
    onnx.helper.set_model_props(proto, {"onnx.infer": "onnxruntime.quant"})
    _, _, model = quantized(proto)
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert [prop.key for prop in model.proto.metadata_props] == ["onnx.infer"]


def test_a_fixed_batch_is_run_whole() -> None:
    proto = parse("g (float[32, 4] x) => (float[32, 4] y) { y = MatMul (x, w) }", w=normal(4, 4))
    assert find_ranges(load(proto), [{"x": normal(32, 4, seed=2)}], ["x", "y"]).keys() == {"x", "y"}


def test_kernels_of_half_precision_are_refused() -> None:
    proto = parse("g (float16[N, 4] x) => (float16[N, 4] y) { y = MatMul (x, w) }", w=normal(4, 4).astype(np.float16))
    with pytest.raises(LowRankError, match="all of them float32"):
        check_unquantized(load(proto))

"""Every node with a kernel is a layer or a skip with its reason, and the cost of a model is counted independently."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.graph.find import OTHERS, SUPPORTED, find_layers, model_cost, sized_tensors
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import infer, model_inputs, sample_shapes
from onnx_lowrank.types import ConvSpec, Cost, LowRankError
from tests.helpers import decompose, feeds_of, find, half, normal, parse

KERNEL = normal(6, 4, 3, 3)
MATRIX = normal(5, 4)


def reasons(model: onnx.ModelProto, **shapes: Sequence[int]) -> list[str]:
    found = find(model, **shapes)
    assert found.layers == ()
    return [skip.reason for skip in found.skips]


def conv(attributes: str = "", inputs: str = "x, w", **stored: np.ndarray) -> onnx.ModelProto:
    return parse(
        f'g (float[1,4,6,6] x) => (float[] y) {{ ["conv"] y = Conv {attributes and f"<{attributes}>"} ({inputs}) }}',
        **(stored or {"w": KERNEL}),
    )


def product(text: str, shape: str = "3,5", opset: int = 17, **stored: np.ndarray) -> onnx.ModelProto:
    return parse(f"g (float[{shape}] x) => (float[] y) {{ {text} }}", opset=opset, **(stored or {"w": MATRIX}))


# --- layers ----------------------------------------------------------------------------------------------------------


def test_a_convolution_is_described_in_full() -> None:
    model = conv(
        "strides=[2,1], pads=[1,0,2,1], dilations=[1,2], group=2", "x, w, b", w=normal(6, 2, 3, 3), b=normal(6)
    )
    (layer,) = find(model).layers
    assert layer.spec == ConvSpec((6, 2, 3, 3), (2, 1), (1, 0, 2, 1), (1, 2), 2)
    assert (layer.name, layer.op_type, layer.input_size, layer.batch) == ("conv", "Conv", (6, 6), 1)
    assert (layer.weight_name, layer.weight_kept, layer.bias, layer.dtype) == ("w", False, True, np.float32)
    np.testing.assert_array_equal(layer.read_weight(), normal(6, 2, 3, 3))


@pytest.mark.parametrize(
    ("text", "shape", "rows", "transposed"),
    [
        ("y = Gemm (x, w)", "3,5", 3, True),
        ("y = Gemm <transB=1> (x, w)", "3,4", 3, False),
        ("y = Gemm <transA=1> (x, w)", "5,3", 3, True),
        ("y = MatMul (x, w)", "3,5", 3, True),
        ("y = MatMul (x, w)", "2,7,5", 14, True),
        ("y = MatMul (x, w)", "5", 1, True),
        ("y = MatMul (w, x)", "4,3", 3, False),
        ("y = MatMul (w, x)", "2,4,3", 6, False),
        ("y = MatMul (w, x)", "4", 1, False),
    ],
)
def test_a_product_is_a_kernel_of_outputs_by_inputs_for_each_row(
    text: str, shape: str, rows: int, transposed: bool
) -> None:
    (layer,) = find(product(text, shape)).layers
    kernel = MATRIX.T if transposed else MATRIX
    np.testing.assert_array_equal(layer.read_weight(), kernel)
    assert (layer.spec, layer.batch, layer.input_size) == (ConvSpec(kernel.shape), rows, ())
    assert layer.macs == rows * kernel.size


def test_layers_are_in_the_order_of_the_graph_and_say_where_they_are() -> None:
    model = product('["b"] t = MatMul (x, w) r = Relu (t) ["a"] y = MatMul (v, r)', w=normal(5, 4), v=normal(2, 3))
    found = find(model)
    assert [layer.name for layer in found.layers] == ["b", "a"]
    assert [(found.places[n].position, found.places[n].weight_input) for n in ("b", "a")] == [(0, 1), (2, 0)]


def test_nodes_of_the_standard_domain_by_its_full_name_are_layers() -> None:
    model = conv()
    model.graph.node[0].domain = "ai.onnx"
    assert len(find(model).layers) == 1


# --- skips -----------------------------------------------------------------------------------------------------------


def test_a_kernel_that_is_computed_is_left_alone() -> None:
    model = parse("g (float[1,4,6,6] x, float[6,4,3,3] w) => (float[] y) { y = Conv (x, w) }")
    assert reasons(model) == ["its weight is computed when the model runs"]


@pytest.mark.parametrize(
    "form",
    [
        "d = DequantizeLinear (w, s) y = MatMul (x, d)",
        "d = DequantizeLinear (w, s) t = Transpose (d) y = MatMul (x, t)",
        "d = DequantizeLinear (w, s) t = Transpose (d) y = Gemm (x, t)",
        "q = QuantizeLinear (v, s) d = DequantizeLinear (q, s) y = MatMul (x, d)",
    ],
)
def test_a_quantised_kernel_is_left_alone(form: str) -> None:
    arrays = {"w": np.ones((5, 5), np.int8), "v": normal(5, 5), "s": np.float32(0.1)}
    expected = (
        r"its weight is quantised (DequantizeLinear): decompose the float model, then quantise; or give --dequantize"
    )
    assert reasons(product(form, **arrays)) == [expected]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int32", np.int32), ("int64", np.int64), ("uint32", np.uint32), ("uint64", np.uint64)]
)
def test_a_kernel_of_whole_numbers_is_left_alone(kind: str, dtype: type) -> None:
    model = parse(f"g ({kind}[3,5] x) => ({kind}[] y) {{ y = MatMul (x, w) }}", w=np.ones((5, 4), dtype))
    assert reasons(model) == [f"its weight has type {kind}: one of float32, float64, float16, bfloat16 was expected"]


def test_an_empty_kernel_is_left_alone() -> None:
    assert reasons(product("y = MatMul (x, w)", w=np.zeros((5, 0), np.float32))) == ["its weight is empty"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_kernel_that_is_not_finite_stops_the_work(value: float) -> None:
    kernel = KERNEL.copy()
    kernel[3, 2, 1, 0] = value
    with pytest.raises(LowRankError, match="weight 'w' holds NaN or infinity: the model is damaged or did not train"):
        find(conv(w=kernel))


def test_all_zeros_are_a_layer_like_any_other() -> None:
    model = conv(w=np.zeros_like(KERNEL))
    rewritten = decompose(model, "channel_svd", half)
    assert rewritten.reports[0].relative_error == 0
    assert not any(numpy_helper.to_array(t)[0].any() for t in rewritten.model.graph.initializer if t.name[-1] == "0")


def test_padding_that_follows_from_the_output_shape_is_left_alone() -> None:
    model = parse(
        "g (float[1,4,6,6] x) => (float[] y) { y = ConvTranspose <output_shape=[13,13], strides=[2,2]> (x, w) }",
        w=normal(4, 6, 3, 3),
    )
    assert reasons(model) == ["its padding follows from output_shape: export it with explicit pads"]


def test_a_kernel_without_spatial_axes_is_left_alone() -> None:
    model = parse("g (float[1,4] x) => (float[] y) { y = Conv (x, w) }", w=normal(6, 4))
    assert reasons(model) == ["its kernel has 2 axes: at least 3 were expected"]


@pytest.mark.parametrize(
    "attributes",
    [
        "strides=[1]",
        "pads=[1,1]",
        "dilations=[1,1,1]",
        "group=0",
        "group=5",
        "strides=[0,1]",
        "strides=[-1,1]",
        "dilations=[1,-2]",
        "kernel_shape=[5,5]",
        "kernel_shape=[3]",
        'auto_pad="SAME"',
        'auto_pad="same_upper"',
    ],
)
def test_attributes_that_do_not_fit_the_kernel_are_left_alone(attributes: str) -> None:
    # without shape inference, which divides by some of these
    found = find_layers(load(conv(attributes)), {"x": (1, 4, 6, 6)})
    assert [skip.reason for skip in found.skips] == ["its attributes do not fit its kernel: the model is damaged"]


def test_padding_that_is_no_text_is_left_alone() -> None:
    model = conv("group=1")
    model.graph.node[0].attribute.append(helper.make_attribute("auto_pad", b"\xff\xfe"))
    found = find_layers(load(model), {"x": (1, 4, 6, 6)})
    assert [skip.reason for skip in found.skips] == ["its attributes do not fit its kernel: the model is damaged"]


def test_a_gemm_with_its_weight_first_is_left_alone() -> None:
    expected = "its first input is the weight: only a MatMul is decomposed in this form"
    assert reasons(product("y = Gemm (w, x)", "4,3")) == [expected]


def test_a_gemm_before_operator_set_7_is_left_alone() -> None:
    model = product("y = Gemm <broadcast=1> (x, w, b)", opset=6, w=MATRIX, b=normal(4))
    assert reasons(model) == ["Gemm before opset 7 has a form of its own: convert the model to opset 7 or later"]


def test_a_gemm_whose_weight_is_no_matrix_is_left_alone() -> None:
    assert reasons(product("y = Gemm (x, w)", w=normal(1, 5, 4))) == ["its weight has 3 axes: 2 were expected"]


@pytest.mark.parametrize(
    ("shape", "what"),
    [((2, 5, 4), "3 axes (one matrix for each batch)"), ((5,), "1 axes (a vector has nothing to factorise)")],
)
def test_a_matmul_whose_weight_is_no_matrix_is_left_alone(shape: tuple[int, ...], what: str) -> None:
    assert reasons(product("y = MatMul (x, w)", w=normal(*shape))) == [f"its weight has {what}: 2 were expected"]


def test_a_product_of_constants_is_left_alone() -> None:
    model = product("c = MatMul (v, w) y = Add (x, c)", "3,4", w=MATRIX, v=normal(3, 5))
    assert reasons(model) == ["both of its inputs are constant"]


def test_a_layer_whose_input_has_no_known_size_is_left_alone() -> None:
    model = parse("g (float[1,4,6,6] x) => (float[] y) { a = some.where.op (x) y = Conv (a, w) }", w=KERNEL)
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    assert reasons(model) == ["the size of its input is not known: give --input-shape"]


def test_a_layer_whose_input_has_no_known_rank_is_left_alone_until_its_size_is_given() -> None:
    model = parse("g (float[] x) => (float[] y) { y = Conv (x, w) }", w=KERNEL)
    assert reasons(model) == ["the size of its input is not known: give --input-shape"]
    assert find(model, x=(1, 4, 8, 8)).layers[0].input_size == (8, 8)


def test_a_node_with_too_few_inputs_is_left_alone() -> None:
    model = conv()
    del model.graph.node[0].input[1]
    assert reasons(model) == ["it has too few inputs or outputs: the model is damaged"]


def test_layers_in_bodies_are_left_alone() -> None:
    model = parse(
        """g (float[3,5] x, bool c, int64 trips) => (float[] y, float[] z) {
            y = If (c) <
                then_branch = t () => (float[] p) { ["in_if"] p = MatMul (x, w) },
                else_branch = e () => (float[] q) { q = If (c) <
                    then_branch = d () => (float[] r) { r = Gemm (x, w) },
                    else_branch = f () => (float[] s) { s = Neg (x) }
                > }
            >
            z = Loop (trips, c, x) <body = b (int64 i, bool going, float[3,5] state) => (bool go, float[] next) {
                go = Identity (going)
                ["in_loop"] m = MatMul (state, w)
                next = MatMul (m, v)
            }>
        }""",
        w=MATRIX,
        v=normal(4, 5),
    )
    found = find(model)
    why = "inside the body of an If, Loop or Scan: how often it runs is not known"
    assert found.layers == ()
    assert [(s.layer, s.op_type, s.reason) for s in found.skips] == [
        ("in_if", "MatMul", why),
        ("r", "Gemm", why),
        ("in_loop", "MatMul", why),
        ("next", "MatMul", why),
    ]


def test_layers_in_functions_are_left_alone_at_any_depth() -> None:
    model = product("y = local.f (x, w)")
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"], name="inner")]
    branch = helper.make_graph([helper.make_node("MatMul", ["c", "b"], ["d"], name="deep")], "t", [], [])
    nodes.append(helper.make_node("If", ["k"], ["e"], then_branch=branch, else_branch=branch))
    nodes.append(helper.make_node("MatMul", ["c", "b"], ["f"], name="not ours", domain="some.where"))
    model.functions.append(helper.make_function("local", "f", ["a", "b", "k"], ["e"], nodes, model.opset_import))
    found = find(model)
    assert [(s.layer, s.reason) for s in found.skips] == [
        (name, "inside the function f: inline it first") for name in ("inner", "deep", "deep")
    ]


@pytest.mark.parametrize("op_type", OTHERS)
def test_other_operators_with_kernels_are_left_alone_with_their_reason(op_type: str) -> None:
    model = product("y = Relu (x)")
    model.graph.node.append(helper.make_node(op_type, ["x", "w"], ["other"], name="other", domain="some.where"))
    (skip,) = find(model).skips
    assert (skip.layer, skip.op_type, skip.reason) == ("other", op_type, OTHERS[op_type])
    del model.graph.initializer[:]
    assert find(model).skips == (), "without a stored kernel there is nothing to say"


def test_a_custom_operator_of_a_known_name_is_none_of_ours() -> None:
    model = conv()
    model.graph.node[0].domain = "some.where"
    found = find(model)
    assert (found.layers, found.skips) == ((), ())
    assert model_cost(load(model), {})[0] == Cost(0, KERNEL.size)
    assert sized_tensors(load(model)) == []


# --- cost ------------------------------------------------------------------------------------------------------------

MIXED = """g (float[N,4,9,8] x, float[N,5] q) => (float[] u, float[] v) {
    a = Conv <strides=[2,1], pads=[1,1,1,0], dilations=[1,2], group=2> (x, w, b)
    c = ConvTranspose <strides=[2,2], output_padding=[1,1]> (a, t)
    e = Relu (c)
    s = Constant <value = int64[2] {0, -1}> ()
    f = Reshape (e, s)
    m = MatMul (f, dense)
    p = Transpose <perm=[1,0]> (q)
    g = Gemm <transA=1, transB=1> (p, h)
    u = MatMul (m, k)
    z = MatMul (left, p)
    y = Constant <value = float[5] {1, 2, 3, 4, 5}> ()
    v = Add (g, z)
}"""


def mixed() -> onnx.ModelProto:
    return parse(
        MIXED,
        w=normal(6, 2, 3, 3),
        b=normal(6),
        t=normal(6, 3, 2, 2),
        dense=normal(3 * 11 * 11, 7),
        h=normal(4, 5),
        k=normal(7, 2),
        left=normal(2, 5),
    )


def counted_by_running(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Cost:
    """MACs from the shapes that ONNX Runtime reports for every tensor, by the definition of each operator."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = sorted({t for node in copy.graph.node for t in node.output})
    copy.graph.ClearField("output")
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = dict(zip(names, (value.shape for value in session.run(names, feeds)), strict=True))
    shapes |= {name: value.shape for name, value in feeds.items()}
    shapes |= {t.name: tuple(t.dims) for t in copy.graph.initializer}
    macs = 0
    for node in copy.graph.node:
        if node.op_type not in SUPPORTED:
            continue
        first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
        if node.op_type == "Conv":  # each output element: one product for each kernel element of its filter
            macs += math.prod(out) * math.prod(second[1:])
        elif node.op_type == "ConvTranspose":  # each input element is spread by its filter
            macs += math.prod(first) * math.prod(second[1:])
        else:
            inner = {a.name: a.i for a in node.attribute}.get("transA", 0)
            macs += math.prod(out) * (first[0] if inner else first[-1])
    sizes = [t.dims for t in copy.graph.initializer]
    sizes += [a.t.dims for node in copy.graph.node for a in node.attribute if a.name == "value"]
    return Cost(macs, sum(math.prod(size) for size in sizes))


def cost_of(model: onnx.ModelProto, **shapes: Sequence[int]) -> tuple[Cost, tuple[str, ...]]:
    loaded = load(model)
    sizes, _ = sample_shapes(model_inputs(loaded), shapes)
    return model_cost(loaded, infer(loaded, sizes))


def test_the_cost_of_a_model_is_what_an_independent_count_of_a_run_gives() -> None:
    model = mixed()
    assert cost_of(model) == (counted_by_running(model, feeds_of(model)), ())


def test_the_cost_follows_the_sizes_that_are_given() -> None:
    model = parse("g (float[N,4,H,W] x) => (float[] y) { y = Conv <strides=[2,2]> (x, w) }", w=KERNEL)
    for sizes in [(1, 4, 9, 9), (3, 4, 12, 7)]:
        assert cost_of(model, x=sizes)[0] == counted_by_running(model, feeds_of(model, x=sizes))


@pytest.mark.parametrize("name", ["svd", "channel_svd", "tucker2", "cp3"])
def test_what_is_saved_is_what_the_layers_say(name: str) -> None:
    model = mixed()
    rewritten = decompose(model, name, half)
    assert rewritten.reports
    before, after = cost_of(model)[0], cost_of(rewritten.model)[0]
    assert after == counted_by_running(rewritten.model, feeds_of(model))
    assert after.macs == before.macs + sum(r.macs_after - r.macs_before for r in rewritten.reports)
    assert after.params == before.params + sum(r.params_after - r.params_before for r in rewritten.reports)


def test_layers_count_their_macs_as_the_model_does() -> None:
    found = find(mixed())
    assert sum(layer.macs for layer in found.layers) == cost_of(mixed())[0].macs


def test_nodes_of_unknown_size_are_named_and_not_counted() -> None:
    model = parse(
        'g (float[1,4,6,6] x) => (float[] y) { a = some.where.op (x) ["lost"] b = Conv (a, w) y = Conv (b, w) }',
        w=KERNEL,
    )
    assert cost_of(model) == (Cost(0, KERNEL.size), ("lost", "y"))


def test_parameters_are_counted_in_every_form_and_once() -> None:
    model = parse(
        """g (float[3,5] x, bool c) => (float[] y) {
            a = MatMul (x, w)
            b = Constant <value_floats = [1.0, 2.0, 3.0]> ()
            s = Constant <value = int64[2] {1, 2}> ()
            y = If (c) <
                then_branch = t () => (float[] p) <float[2] inner = {1, 2}> { p = MatMul (x, w) },
                else_branch = e () => (float[] q) { k = Constant <value = float[1] {2}> () q = MatMul (x, w) }
            >
        }""",
        w=MATRIX,
    )
    assert cost_of(model)[0].params == MATRIX.size + 3 + 2 + 2 + 1


def test_the_tensors_whose_sizes_are_needed_are_those_that_layers_read_and_make() -> None:
    model = product("t = MatMul (x, w) r = Relu (t) y = Conv (r, v, b)", w=MATRIX, v=KERNEL, b=normal(6))
    assert sized_tensors(load(model)) == ["r", "t", "v", "w", "x", "y"]


def test_an_initializer_without_data_is_an_error_that_names_it() -> None:
    model = product("y = MatMul (x, w)", other=normal(1))
    model.graph.initializer.append(onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5, 4]))
    with pytest.raises(LowRankError, match="tensor 'w' is damaged"):
        find(model)

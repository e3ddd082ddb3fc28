"""What a layer becomes computes what the layer computed: exactly at full rank, and with the composed kernel below it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.decompositions import DECOMPOSITIONS, lift
from tests.helpers import (
    assert_close,
    assert_same_function,
    composed,
    decompose,
    feeds_of,
    find,
    half,
    normal,
    ones,
    parse,
    regrouped,
    stored,
    ungrouped,
    with_stored,
)


@dataclass(frozen=True)
class Case:
    """One convolution: its attributes in ONNX text, its kernel, and the sizes of its input."""

    what: str
    op_type: str
    attributes: str
    weight: tuple[int, ...]
    size: tuple[int, ...]
    channels: int = 4
    bias: bool = True
    group: int = 1

    def model(self, dtype: str = "float32") -> onnx.ModelProto:
        kind = {"float32": "float", "float64": "double", "float16": "float16", "bfloat16": "bfloat16"}[dtype]
        attributes = ", ".join(filter(None, [self.attributes, f"group={self.group}" if self.group > 1 else ""]))
        sizes = ",".join(map(str, (2, self.channels, *self.size)))
        model = parse(
            f"g ({kind}[{sizes}] x) => ({kind}[{','.join('nchwd'[: len(self.weight)])}] y) "
            f'{{ ["conv"] y = {self.op_type} {f"<{attributes}>" if attributes else ""} (x, w{", b" if self.bias else ""}) }}',
            w=normal(*self.weight, dtype=dtype),
        )
        if self.bias:
            out = self.weight[1] * self.group if self.op_type == "ConvTranspose" else self.weight[0]
            model.graph.initializer.append(onnx.numpy_helper.from_array(normal(out, seed=5, dtype=dtype), "b"))
        return model


PLAIN = [
    Case("kernel shape left out", "Conv", "", (6, 4, 3, 3), (7, 6)),
    Case("kernel shape given", "Conv", "kernel_shape=[3,3]", (6, 4, 3, 3), (7, 6), bias=False),
    Case("strides", "Conv", "strides=[2,3], pads=[1,1,1,1]", (6, 4, 3, 3), (9, 8)),
    Case("asymmetric pads", "Conv", "pads=[2,0,1,3]", (6, 4, 3, 3), (7, 6)),
    Case("dilations", "Conv", "dilations=[2,3], pads=[2,1,0,3]", (5, 4, 3, 2), (9, 8)),
    Case("all at once", "Conv", "strides=[2,1], pads=[1,0,2,1], dilations=[1,2]", (6, 4, 3, 2), (9, 8)),
    Case("pads wider than the kernel", "Conv", "pads=[4,0,5,4]", (6, 4, 3, 3), (5, 6)),
    Case("groups", "Conv", "pads=[1,1,1,1], strides=[2,1]", (6, 2, 3, 3), (7, 6), group=2),
    Case("groups of one output", "Conv", "pads=[1,1,1,1]", (2, 2, 3, 3), (7, 6), group=2),
    Case("VALID", "Conv", 'auto_pad="VALID", strides=[2,1], dilations=[2,1]', (6, 4, 3, 3), (9, 8)),
    Case("SAME_UPPER", "Conv", 'auto_pad="SAME_UPPER", strides=[2,1]', (6, 4, 3, 2), (8, 7)),
    Case("SAME_LOWER", "Conv", 'auto_pad="SAME_LOWER", strides=[2,1]', (6, 4, 3, 2), (8, 7)),
    Case("SAME_UPPER of groups", "Conv", 'auto_pad="SAME_UPPER", strides=[2,2]', (6, 2, 2, 3), (8, 7), group=2),
    Case("SAME with a stride over a size of 1", "Conv", 'auto_pad="SAME_UPPER", strides=[2,2]', (6, 4, 3, 1), (7, 6)),
    Case("pointwise", "Conv", "", (6, 4, 1, 1), (5, 5)),
    Case("pointwise with strides and pads", "Conv", "strides=[2,2], pads=[1,0,0,2]", (6, 4, 1, 1), (5, 6)),
    Case("pointwise SAME", "Conv", 'auto_pad="SAME_LOWER", strides=[2,3]', (6, 4, 1, 1), (5, 6)),
    Case("pointwise of groups", "Conv", "strides=[2,1]", (6, 4, 1, 1), (5, 5), channels=8, group=2),
    Case("one row", "Conv", "strides=[2,2], pads=[1,1,0,1]", (6, 4, 1, 3), (6, 7)),
    Case("one column", "Conv", "strides=[2,2], pads=[1,1,0,1]", (6, 4, 3, 1), (6, 7)),
    Case("one input channel", "Conv", "pads=[1,1,1,1]", (6, 1, 3, 3), (6, 6), channels=1),
    Case("one output channel", "Conv", "pads=[1,1,1,1]", (1, 4, 3, 3), (6, 6)),
    Case("1-D", "Conv", "strides=[2], pads=[0,2], dilations=[2]", (6, 4, 3), (11,)),
    Case("1-D SAME", "Conv", 'auto_pad="SAME_LOWER", strides=[2]', (6, 4, 4), (10,), bias=False),
    Case("1-D of groups", "Conv", "pads=[1,1]", (4, 2, 3), (7,), group=2),
    Case("1-D pointwise", "Conv", "strides=[2]", (6, 4, 1), (7,)),
    Case("3-D", "Conv", "strides=[1,2,1], pads=[1,0,1,0,1,2], dilations=[1,1,2]", (5, 4, 3, 2, 2), (5, 6, 5)),
    Case("3-D SAME", "Conv", 'auto_pad="SAME_UPPER", strides=[2,1,2]', (5, 4, 2, 3, 3), (5, 4, 5)),
    Case("3-D of groups", "Conv", "pads=[1,1,1,1,1,1]", (6, 2, 3, 3, 3), (4, 3, 4), group=2),
    Case("3-D one frame", "Conv", "strides=[2,1,1]", (5, 4, 1, 3, 3), (4, 5, 4)),
]

TRANSPOSED = [
    Case("kernel shape left out", "ConvTranspose", "", (4, 6, 3, 3), (5, 4)),
    Case("strides", "ConvTranspose", "strides=[2,3]", (4, 6, 3, 3), (4, 3), bias=False),
    Case("asymmetric pads", "ConvTranspose", "strides=[2,2], pads=[1,0,2,1]", (4, 6, 3, 4), (4, 3)),
    Case("dilations", "ConvTranspose", "dilations=[2,1], strides=[1,2], pads=[1,0,0,1]", (4, 6, 3, 2), (4, 5)),
    Case(
        "output padding",
        "ConvTranspose",
        "strides=[2,3], output_padding=[1,2], pads=[1,1,1,1]",
        (4, 6, 3, 3),
        (4, 3),
    ),
    Case("groups", "ConvTranspose", "strides=[2,1], pads=[1,0,0,1]", (4, 3, 3, 3), (4, 5), group=2),
    Case(
        "groups with output padding",
        "ConvTranspose",
        "strides=[2,2], output_padding=[1,1]",
        (4, 3, 3, 3),
        (3, 3),
        group=2,
    ),
    Case("VALID", "ConvTranspose", 'auto_pad="VALID", strides=[2,2]', (4, 6, 3, 2), (4, 3)),
    Case("SAME_UPPER", "ConvTranspose", 'auto_pad="SAME_UPPER", strides=[2,2]', (4, 6, 3, 4), (4, 3)),
    Case("SAME_LOWER", "ConvTranspose", 'auto_pad="SAME_LOWER", strides=[2,2]', (4, 6, 3, 5), (4, 3)),
    Case("pointwise", "ConvTranspose", "", (4, 6, 1, 1), (4, 3)),
    Case("pointwise with strides", "ConvTranspose", "strides=[2,2], output_padding=[1,0]", (4, 6, 1, 1), (4, 3)),
    Case("pointwise of groups", "ConvTranspose", "", (8, 3, 1, 1), (4, 3), channels=8, group=2),
    Case("one row", "ConvTranspose", "strides=[2,2], pads=[0,1,0,1]", (4, 6, 1, 3), (4, 3)),
    Case("1-D", "ConvTranspose", "strides=[3], pads=[1,0], output_padding=[1], dilations=[2]", (4, 6, 3), (6,)),
    Case("1-D of groups", "ConvTranspose", "strides=[2]", (4, 2, 3), (6,), group=2),
    Case(
        "3-D",
        "ConvTranspose",
        "strides=[1,2,2], pads=[1,0,1,0,1,0], output_padding=[0,1,1]",
        (4, 5, 3, 2, 3),
        (3, 3, 2),
    ),
    Case("3-D of groups", "ConvTranspose", "strides=[2,1,1]", (4, 3, 2, 3, 3), (2, 3, 3), group=2),
]


def applying(case: Case) -> list[str]:
    """Names of the decompositions that a case can be written as."""
    specs = [find(case.model()).layers[0].spec]
    return [name for name, member in DECOMPOSITIONS.items() if lift.refuses(member, specs) is None]


CASES = [
    pytest.param(case, name, id=f"{case.op_type}: {case.what}, {name}")
    for case in PLAIN + TRANSPOSED
    for name in applying(case)
]


def assert_exact(rewritten_model: onnx.ModelProto, original: onnx.ModelProto, *, nodes: int) -> None:
    """The same function, by more nodes than one."""
    assert len(rewritten_model.graph.node) == len(original.graph.node) + nodes - 1
    assert_same_function(rewritten_model, original, feeds_of(original))


@pytest.mark.parametrize(("case", "name"), CASES)
def test_a_convolution_at_full_rank_computes_what_it_did(case: Case, name: str) -> None:
    original = case.model()
    rewritten = decompose(original, name)
    assert rewritten.reports[0].relative_error < 1e-6
    assert_exact(rewritten.model, original, nodes=len(rewritten.nodes["conv"]))


@pytest.mark.parametrize(("case", "name"), CASES)
def test_a_convolution_at_low_rank_computes_the_composed_kernel(case: Case, name: str) -> None:
    original = case.model()
    rewritten = decompose(original, name, lambda highest: tuple(min(2, r) for r in highest))
    transposed = case.op_type == "ConvTranspose"
    kernel = regrouped(composed(rewritten, "conv"), case.group, transposed=transposed)
    assert kernel.shape == case.weight
    assert_same_function(rewritten.model, with_stored(original, "w", kernel.astype(np.float32)), feeds_of(original))
    lost = np.linalg.norm(kernel - stored(original, "w")) / np.linalg.norm(stored(original, "w"))
    np.testing.assert_allclose(lost, rewritten.reports[0].relative_error, atol=1e-6)


def test_every_decomposition_is_used_on_convolutions_of_each_kind() -> None:
    for cases in (PLAIN, TRANSPOSED):
        assert {name for case in cases for name in applying(case)} == set(DECOMPOSITIONS)


@pytest.mark.parametrize("case", [PLAIN[5], TRANSPOSED[4]], ids=lambda case: case.op_type)
@pytest.mark.parametrize("name", ["channel_svd", "spatial_svd", "tucker2", "cp4"])
def test_the_comparison_fails_for_kernels_that_are_slightly_wrong(case: Case, name: str) -> None:
    original = case.model()
    right = decompose(original, name).model
    first = next(t.name for t in right.graph.initializer if t.name.endswith("_lowrank_0"))
    kernel = stored(right, first)
    swapped = kernel.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    for wrong in (kernel * 1.01, swapped, np.flip(kernel, axis=1)):
        with pytest.raises(AssertionError, match="off by"):
            assert_same_function(with_stored(right, first, wrong.astype(np.float32)), original, feeds_of(original))


@pytest.mark.parametrize(
    ("attribute", "value"), [("pads", [0, 1, 2, 1]), ("pads", [1, 0, 1, 2]), ("strides", [1, 2]), ("dilations", [2, 1])]
)
def test_the_comparison_fails_for_an_attribute_on_the_wrong_axis(attribute: str, value: list[int]) -> None:
    original = Case("", "Conv", "strides=[2,1], pads=[1,0,2,1], dilations=[1,2]", (6, 4, 3, 3), (9, 9)).model()
    rewritten = decompose(original, "channel_svd")
    conv = rewritten.node(rewritten.nodes["conv"][0])
    next(a for a in conv.attribute if a.name == attribute).ints[:] = value
    with pytest.raises(AssertionError):
        assert_same_function(rewritten.model, original, feeds_of(original))


# --- sizes that are not known when the model is made -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["channel_svd", "channel_svd_in", "spatial_svd", "tucker2", "cp3", "cp4", "separable"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_follows_the_size_of_each_input(name: str, op_type: str, auto_pad: str) -> None:
    shape = (4, 4, 3, 4)
    original = parse(
        f'g (float[N,4,H,W] x) => (float[N,4,p,q] y) {{ y = {op_type} <auto_pad="{auto_pad}", strides=[2,2]> (x, w) }}',
        w=normal(*shape),
    )
    rewritten = decompose(original, name, x=(1, 4, 8, 8)).model
    for sizes in [(1, 4, 7, 8), (3, 4, 8, 7), (2, 4, 5, 5), (1, 4, 6, 9)]:
        assert_same_function(rewritten, original, feeds_of(original, x=sizes))


def test_batch_and_sizes_stay_dynamic() -> None:
    original = parse(
        "g (float[N,4,H,W] x) => (float[N,6,H,W] y) { y = Conv <pads=[1,1,1,1]> (x, w, b) }",
        w=normal(6, 4, 3, 3),
        b=normal(6),
    )
    rewritten = decompose(original, "tucker2", x=(1, 4, 8, 8)).model
    assert rewritten.graph.input == original.graph.input
    assert rewritten.graph.output == original.graph.output
    for sizes in [(1, 4, 3, 3), (5, 4, 9, 2)]:
        assert_same_function(rewritten, original, feeds_of(original, x=sizes))


# --- bias ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_a_bias_with_an_empty_name_is_no_bias(op_type: str) -> None:
    original = parse(
        f"g (float[1,4,5,5] x) => (float[] y) {{ y = {op_type} (x, w, b) }}",
        w=normal(4, 4, 3, 3),
    )
    original.graph.node[0].input[2] = ""
    rewritten = decompose(original, "channel_svd")
    assert not rewritten.found.layers[0].bias
    assert_exact(rewritten.model, original, nodes=2)


def test_the_bias_is_added_once_by_the_last_node_even_where_it_is_computed() -> None:
    original = parse(
        "g (float[1,4,5,5] x, float[6] b) => (float[] y) { c = Neg (b) y = Conv <pads=[1,1,1,1]> (x, w, c) }",
        w=normal(6, 4, 3, 3),
    )
    rewritten = decompose(original, "tucker2")
    last = rewritten.node("y")
    assert list(last.input)[2] == "c"
    assert_exact(rewritten.model, original, nodes=3)


# --- products --------------------------------------------------------------------------------------------------------

M, K, N = 3, 5, 4
ADDENDS = {"none": None, "scalar": (), "[1]": (1,), "[N]": (N,), "[1, N]": (1, N), "[M, 1]": (M, 1), "[M, N]": (M, N)}


def gemm(
    trans_a: int, trans_b: int, scale: str, addend: tuple[int, ...] | None, dtype: str = "float32"
) -> onnx.ModelProto:
    kind = {"float32": "float", "float64": "double"}[dtype]
    rows = f"{K},{M}" if trans_a else f"{M},{K}"
    flags = ", ".join(filter(None, ["transA=1" if trans_a else "", "transB=1" if trans_b else "", scale]))
    stored_arrays = {"w": normal(N, K, dtype=dtype) if trans_b else normal(K, N, dtype=dtype)}
    if addend is not None:
        stored_arrays["c"] = np.asarray(normal(*addend, seed=3), dtype)
    return parse(
        f"g ({kind}[{rows}] x) => ({kind}[m,n] y) "
        f'{{ ["gemm"] y = Gemm {f"<{flags}>" if flags else ""} (x, w{"" if addend is None else ", c"}) }}',
        **stored_arrays,
    )


@pytest.mark.parametrize("addend", ADDENDS)
@pytest.mark.parametrize("scale", ["", "alpha=0.5", "alpha=1.5, beta=-2.0"])
@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product((0, 1), (0, 1))))
def test_a_gemm_at_full_rank_computes_what_it_did(trans_a: int, trans_b: int, scale: str, addend: str) -> None:
    original = gemm(trans_a, trans_b, scale, ADDENDS[addend])
    assert_exact(decompose(original, "svd").model, original, nodes=2)


@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product((0, 1), (0, 1))))
def test_a_gemm_at_low_rank_computes_the_composed_matrix(trans_a: int, trans_b: int) -> None:
    original = gemm(trans_a, trans_b, "alpha=1.5, beta=-2.0", (N,))
    rewritten = decompose(original, "svd", half)
    matrix = composed(rewritten, "gemm")
    low = with_stored(original, "w", (matrix if trans_b else matrix.T).astype(np.float32))
    assert_same_function(rewritten.model, low, feeds_of(original))
    with pytest.raises(AssertionError, match="off by"):
        assert_same_function(rewritten.model, original, feeds_of(original))


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 21])
@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product((0, 1), (0, 1))))
def test_a_gemm_is_valid_in_every_operator_set(trans_a: int, trans_b: int, opset: int) -> None:
    original = gemm(trans_a, trans_b, "alpha=0.5", (N,))
    original.opset_import[0].version = opset
    rewritten = decompose(original, "svd").model
    onnx.checker.check_model(rewritten, full_check=True)
    assert_exact(rewritten, original, nodes=2)


MATMULS = {
    "weight right, matrix": ("3,5", "x, w", (5, 4)),
    "weight right, batch": ("2,3,5", "x, w", (5, 4)),
    "weight right, two batch axes": ("2,2,3,5", "x, w", (5, 4)),
    "weight right, vector": ("5", "x, w", (5, 4)),
    "weight left, matrix": ("5,3", "w, x", (4, 5)),
    "weight left, batch": ("2,5,3", "w, x", (4, 5)),
    "weight left, vector": ("5", "w, x", (4, 5)),
}


def matmul(what: str, dtype: str = "float32") -> onnx.ModelProto:
    shape, inputs, weight = MATMULS[what]
    kind = {"float32": "float", "float64": "double", "float16": "float16"}[dtype]
    return parse(
        f'g ({kind}[{shape}] x) => ({kind}[] y) {{ ["matmul"] y = MatMul ({inputs}) }}', w=normal(*weight, dtype=dtype)
    )


@pytest.mark.parametrize("what", MATMULS)
def test_a_matmul_at_full_rank_computes_what_it_did(what: str) -> None:
    original = matmul(what)
    assert_exact(decompose(original, "svd").model, original, nodes=2)


@pytest.mark.parametrize("what", MATMULS)
def test_a_matmul_at_low_rank_computes_the_composed_matrix(what: str) -> None:
    original = matmul(what)
    rewritten = decompose(original, "svd", half)
    matrix = composed(rewritten, "matmul")
    low = with_stored(original, "w", (matrix.T if "right" in what else matrix).astype(np.float32))
    assert_same_function(rewritten.model, low, feeds_of(original))
    with pytest.raises(AssertionError, match="off by"):
        assert_same_function(rewritten.model, original, feeds_of(original))


def test_a_matmul_takes_any_number_of_rows() -> None:
    original = parse("g (float[N,S,5] x) => (float[N,S,4] y) { y = MatMul (x, w) }", w=normal(5, 4))
    rewritten = decompose(original, "svd", x=(1, 7, 5)).model
    for shape in [(1, 1, 5), (3, 9, 5)]:
        assert_same_function(rewritten, original, feeds_of(original, x=shape))


# --- precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", MATMULS)
def test_products_in_float64_agree_to_its_precision(what: str) -> None:
    original = matmul(what, "float64")
    assert_same_function(decompose(original, "svd").model, original, feeds_of(original), 1e-12)


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_gemm_in_float64_agrees_to_its_precision(trans_b: int) -> None:
    original = gemm(1, trans_b, "alpha=1.5, beta=-2.0", (1, N), "float64")
    assert_same_function(decompose(original, "svd").model, original, feeds_of(original), 1e-12)


@pytest.mark.parametrize("name", ["channel_svd", "channel_svd_in", "spatial_svd", "tucker2", "cp3", "cp4", "separable"])
@pytest.mark.parametrize("case", [PLAIN[2], PLAIN[7]], ids=lambda case: case.what)
def test_convolutions_in_float64_agree_to_its_precision(case: Case, name: str) -> None:
    # ONNX Runtime has no convolution in float64: the reference implementation of the operators runs them
    original = case.model("float64")
    rewritten = decompose(original, name).model
    assert all(t.data_type == onnx.TensorProto.DOUBLE for t in rewritten.graph.initializer)
    feeds = feeds_of(original)
    actual, expected = (list(ReferenceEvaluator(model).run(None, feeds)) for model in (rewritten, original))
    assert_close(actual, expected, 1e-12)


HALF_STEPS = 4
"""Roundings allowed for: one of each of up to three kernels, and one of what lies between two stages."""


@pytest.mark.parametrize("name", ["channel_svd", "channel_svd_in", "spatial_svd", "tucker2", "cp3", "cp4", "separable"])
def test_a_convolution_in_float16_agrees_to_its_precision(name: str) -> None:
    original = PLAIN[2].model("float16")
    rewritten = decompose(original, name).model
    assert all(t.data_type == onnx.TensorProto.FLOAT16 for t in rewritten.graph.initializer)
    eps = float(np.finfo(np.float16).eps)
    assert_same_function(rewritten, original, feeds_of(original), HALF_STEPS * eps)
    with pytest.raises(AssertionError, match="off by"):
        assert_same_function(decompose(original, name, ones).model, original, feeds_of(original), HALF_STEPS * eps)


def test_a_matmul_in_float16_agrees_to_its_precision() -> None:
    original = matmul("weight right, batch", "float16")
    eps = float(np.finfo(np.float16).eps)
    assert_same_function(decompose(original, "svd").model, original, feeds_of(original), HALF_STEPS * eps)


@pytest.mark.parametrize("name", ["channel_svd", "channel_svd_in", "spatial_svd", "tucker2", "cp3", "cp4", "separable"])
def test_kernels_in_bfloat16_compose_to_the_original_within_its_precision(name: str) -> None:
    original = PLAIN[2].model("bfloat16")
    original.opset_import[0].version = 22
    rewritten = decompose(original, name)
    assert {t.data_type for t in rewritten.model.graph.initializer} == {onnx.TensorProto.BFLOAT16}
    onnx.checker.check_model(rewritten.model, full_check=True)
    eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    kernel = stored(original, "w").astype(np.float64)
    assert_close([composed(rewritten, "conv")], [kernel], HALF_STEPS * eps)
    with pytest.raises(AssertionError, match="off by"):
        assert_close([composed(decompose(original, name, ones), "conv")], [kernel], HALF_STEPS * eps)


# --- ungrouping, which the comparisons above rest on -----------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_ungrouping_a_kernel_is_undone_by_regrouping(transposed: bool) -> None:
    kernel = normal(6, 2, 3, 3)
    np.testing.assert_array_equal(
        regrouped(ungrouped(kernel, 2, transposed=transposed), 2, transposed=transposed), kernel
    )
    with pytest.raises(AssertionError):
        regrouped(np.ones((4, 4, 1, 1)), 2, transposed=transposed)

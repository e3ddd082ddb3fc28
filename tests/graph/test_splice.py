"""Decomposing a layer changes that layer and nothing else: the rest of the model is the same, byte for byte."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_lowrank.candidates import group_layers, price
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.graph.model import load, tensor_names
from onnx_lowrank.graph.splice import Replacement, splice
from onnx_lowrank.types import LowRankError
from tests.helpers import Rewritten, assert_same_function, decompose, feeds_of, find, half, normal, parse, stored
from tests.rich import rich, untouched


@pytest.fixture(scope="module")
def original() -> onnx.ModelProto:
    return rich()


@pytest.fixture(scope="module")
def rewritten(original: onnx.ModelProto) -> Rewritten:
    return decompose(original, "tucker2", only=["conv"], x=(1, 4, 6, 6))


def test_everything_but_the_layer_is_the_same_byte_for_byte(original: onnx.ModelProto, rewritten: Rewritten) -> None:
    assert rewritten.nodes == {"conv": ("conv_lowrank_0", "conv_lowrank_1", "conv")}
    assert untouched(rewritten.model, "conv") == untouched(original, "conv")


@pytest.mark.parametrize(
    "field",
    ["doc_string", "metadata_props", "functions", "opset_import", "producer_name", "model_version", "training_info"],
)
def test_the_comparison_of_bytes_fails_where_a_field_of_the_model_is_lost(
    original: onnx.ModelProto, rewritten: Rewritten, field: str
) -> None:
    poorer = onnx.ModelProto()
    poorer.CopyFrom(rewritten.model)
    poorer.ClearField(field)
    assert untouched(poorer, "conv") != untouched(original, "conv")


def test_the_comparison_of_bytes_fails_where_order_or_a_description_is_lost(
    original: onnx.ModelProto, rewritten: Rewritten
) -> None:
    for change in (
        lambda graph: graph.node[0].ClearField("doc_string"),
        lambda graph: graph.node[-2].attribute[0].ClearField("doc_string"),
        lambda graph: graph.input[0].type.ClearField("denotation"),
        lambda graph: graph.initializer.reverse(),
        lambda graph: graph.node.reverse(),
        lambda graph: graph.value_info.pop(),
        lambda graph: graph.quantization_annotation.pop(),
        lambda graph: graph.sparse_initializer.pop(),
    ):
        poorer = onnx.ModelProto()
        poorer.CopyFrom(rewritten.model)
        change(poorer.graph)
        assert untouched(poorer, "conv") != untouched(original, "conv")


def test_the_original_is_not_changed_and_a_plan_of_nothing_changes_nothing() -> None:
    model, before = rich(), rich().SerializeToString()
    decompose(model, "tucker2", x=(1, 4, 6, 6))
    assert model.SerializeToString() == before
    assert decompose(model, "tucker2", only=[], x=(1, 4, 6, 6)).model.SerializeToString() == before


def test_the_rich_model_still_runs_and_agrees(original: onnx.ModelProto, rewritten: Rewritten) -> None:
    for choice in (True, False):
        feeds = feeds_of(original, x=(2, 4, 6, 6)) | {"c": np.array(choice)}
        assert_same_function(rewritten.model, original, feeds)


# --- the new nodes ---------------------------------------------------------------------------------------------------


def test_new_nodes_stand_together_where_the_old_one_stood(rewritten: Rewritten) -> None:
    names = [node.name for node in rewritten.model.graph.node]
    expected = ["before", "conv_lowrank_0", "conv_lowrank_1", "conv", "after", "other", "choice", "wrap", "unwrap"]
    expected += ["pair", "pick", "again", "called", "end", "from_bfloat16", "from_float8"]
    assert names == expected


def test_the_last_new_node_keeps_the_name_the_output_and_the_bias(rewritten: Rewritten) -> None:
    first, core, last = (rewritten.node(name) for name in rewritten.nodes["conv"])
    assert list(last.output) == ["b"]
    assert last.input[2] == "bias"
    assert [len(first.input), len(core.input)] == [2, 2]
    assert first.input[0] == "a"
    assert [list(first.output), list(core.output)] == [[core.input[0]], [last.input[0]]]


def test_new_nodes_carry_the_description_of_the_old_one_and_where_they_come_from(
    original: onnx.ModelProto, rewritten: Rewritten
) -> None:
    old = original.graph.node[1]
    for name in rewritten.nodes["conv"]:
        node = rewritten.node(name)
        assert node.doc_string == "node conv"
        assert node.metadata_props[0] == old.metadata_props[0]
        assert {entry.key: entry.value for entry in node.metadata_props[1:]} == {
            "onnx_lowrank.source": "conv",
            "onnx_lowrank.decomposition": "tucker2",
            "onnx_lowrank.rank": "6,4",
        }


def test_what_is_decomposed_twice_says_so_once() -> None:
    twice = decompose(decompose(rich(), "tucker2", x=(1, 4, 6, 6)).model, "svd", half, x=(1, 4, 6, 6))
    for name in twice.nodes["conv"]:
        keys = [entry.key for entry in twice.node(name).metadata_props]
        assert len(set(keys)) == len(keys)
        values = {entry.key: entry.value for entry in twice.node(name).metadata_props}
        assert values["onnx_lowrank.decomposition"] == "svd"


def test_what_was_said_about_the_kernel_goes_with_it(rewritten: Rewritten) -> None:
    graph = rewritten.model.graph
    assert "w" not in {t.name for t in graph.initializer}
    assert "w" not in {v.name for v in graph.value_info}
    assert "w" not in {note.tensor_name for note in graph.quantization_annotation}


def test_a_kernel_that_a_subgraph_reads_stays_with_all_that_is_said_about_it(original: onnx.ModelProto) -> None:
    graph = decompose(original, "tucker2", only=["other"], x=(1, 4, 6, 6)).model.graph
    assert "v" in {t.name for t in graph.initializer}
    assert "v" in {v.name for v in graph.value_info}
    assert "v" in {note.tensor_name for note in graph.quantization_annotation}


def test_a_kernel_that_training_updates_stays() -> None:
    model = rich()
    model.training_info[0].update_binding.add(key="w", value="new_bias")
    result = decompose(model, "tucker2", only=["conv"], x=(1, 4, 6, 6)).model
    assert "w" in {t.name for t in result.graph.initializer}


@pytest.mark.parametrize("name", ["", "conv"])
def test_unnamed_nodes_stay_unnamed_and_are_told_by_their_output(name: str) -> None:
    model = parse("g (float[1,4,6,6] x) => (float[] y) { y = Conv (x, w) }", w=normal(6, 4, 3, 3))
    model.graph.node[0].name = name
    rewritten = decompose(model, "channel_svd")
    assert rewritten.nodes[name or "y"][-1] == (name or "y")
    assert rewritten.model.graph.node[0].name == rewritten.nodes[name or "y"][0]
    assert rewritten.model.graph.node[-1].name == name


def test_nodes_of_one_name_are_told_apart() -> None:
    model = parse(
        """g (float[1,4,6,6] x) => (float[] z) {
            ["same"] a = Conv <pads=[1,1,1,1]> (x, w)
            ["same"] y = Conv <pads=[1,1,1,1]> (a, v)
            ["y"] b = Conv <pads=[1,1,1,1]> (y, u)
            b_1 = Relu (b)
            ["b_1"] z = Conv (b_1, t)
        }""",
        **{name: normal(4, 4, 3, 3, seed=seed) for seed, name in enumerate("wvut")},
    )
    model.graph.node[3].name = "b"
    rewritten = decompose(model, "channel_svd")
    names = [layer.name for layer in rewritten.found.layers]
    assert len(set(names)) == 4
    assert names[:2] == ["same", "y"]
    assert len(rewritten.model.graph.node) == 9
    for node in [*model.graph.node, *rewritten.model.graph.node]:
        node.name = ""  # ONNX Runtime refuses names that occur twice, and takes none
    assert_same_function(rewritten.model, model, feeds_of(model))


# --- biases ----------------------------------------------------------------------------------------------------------


def with_biases(model: onnx.ModelProto, name: str, **biases: np.ndarray) -> onnx.ModelProto:
    """The model with its layers decomposed exactly, and other biases for those named."""
    found = find(model)
    replacements = []
    for group in group_layers(found.layers):
        specs = [layer.spec for layer in group.layers]
        choice = price(group, name, lift.max_rank(find_decomposition(name), specs), 0.0)
        weights = [group.layers[0].read_weight()]
        made = lift.factorize(find_decomposition(name), specs[:1], weights, choice.rank, rng=np.random.default_rng(0))
        for layer, chain in zip(group.layers, choice.chains, strict=True):
            replacements.append(
                Replacement(layer.name, name, choice.rank, chain, made.kernels[0], biases.get(layer.name))
            )
    return splice(load(model), found, replacements)[0].proto


@pytest.mark.parametrize("inputs", ["x, w", "x, w, b"])
def test_a_convolution_takes_a_bias_in_the_place_of_its_own(inputs: str) -> None:
    model = parse(f"g (float[1,4,6,6] x) => (float[] y) {{ y = Conv ({inputs}) }}", w=normal(6, 4, 3, 3), b=normal(6))
    new = normal(6, seed=9)
    result = with_biases(model, "tucker2", y=new)
    assert len(result.graph.node[-1].input) == 3
    expected = parse("g (float[1,4,6,6] x) => (float[] y) { y = Conv (x, w, b) }", w=normal(6, 4, 3, 3), b=new)
    assert_same_function(result, expected, feeds_of(model))
    assert ("b" in {t.name for t in result.graph.initializer}) == ("b" not in inputs), "it was never read"


def test_a_gemm_takes_a_bias_as_it_is_whatever_its_beta() -> None:
    text = "g (float[3,5] x) => (float[] y) { y = Gemm <alpha=2.0, beta=0.5, transB=1> (x, w, b) }"
    model = parse(text, w=normal(4, 5), b=normal(4))
    new = normal(4, seed=9)
    expected = parse(text, w=normal(4, 5), b=2 * new)
    assert_same_function(with_biases(model, "svd", y=new), expected, feeds_of(model))


def test_layers_that_share_a_kernel_take_biases_of_their_own() -> None:
    text = "g (float[1,4,6,6] x) => (float[] y, float[] z) { y = Conv (x, w, b) z = Conv (x, w, c) }"
    arrays = {"w": normal(6, 4, 3, 3)}
    model = parse(text, **arrays, b=normal(6), c=normal(6))
    first, second = normal(6, seed=8), normal(6, seed=9)
    result = with_biases(model, "channel_svd", y=first, z=second)
    assert len(result.graph.initializer) == 4, "two kernels for both, and a bias for each"
    assert_same_function(result, parse(text, **arrays, b=first, c=second), feeds_of(model))


def test_a_bias_that_something_else_reads_stays() -> None:
    model = parse(
        "g (float[1,4,6,6] x) => (float[] y, float[] z) { y = Conv (x, w, b) z = Neg (b) }",
        w=normal(6, 4, 3, 3),
        b=normal(6),
    )
    result = with_biases(model, "channel_svd", y=normal(6, seed=9))
    assert "b" in {t.name for t in result.graph.initializer}


# --- names -----------------------------------------------------------------------------------------------------------


def test_new_names_differ_from_every_name_in_every_scope() -> None:
    planted = ["w_lowrank_0", "w_lowrank_1", "y_lowrank_0", "conv_lowrank_0"]
    model = parse(
        """g (float[1,4,6,6] x, bool c) => (float[] y, float[] z) {
            ["conv"] y = Conv (x, w)
            ["w_lowrank_0_1"] z = If (c) <
                then_branch = t () => (float[] p) <float[1] w_lowrank_0 = {2}> { ["conv_lowrank_0"] p = Neg (w_lowrank_0) },
                else_branch = e () => (float[] y_lowrank_0) { ["w_lowrank_2"] y_lowrank_0 = Neg (x) }
            >
        }""",
        w=normal(6, 4, 3, 3),
    )
    body = [helper.make_node("Relu", ["w_lowrank_1"], ["conv_lowrank_1"])]
    model.functions.append(
        helper.make_function("f", "f", ["w_lowrank_1"], ["conv_lowrank_1"], body, model.opset_import)
    )
    before = tensor_names(model)
    assert set(planted) <= before
    rewritten = decompose(model, "channel_svd").model
    new = [t.name for t in rewritten.graph.initializer]
    new += [n for node in rewritten.graph.node[:1] for n in (node.name, *node.output)]
    assert len(set(new)) == 4
    assert not before & set(new)
    assert_same_function(rewritten, model, {"x": feeds_of(model)["x"], "c": np.array(False)})


def test_the_zero_that_an_old_gemm_adds_has_a_name_of_its_own() -> None:
    model = parse(
        "g (float[5,3] x) => (float[m,n] y) { y = Gemm <transA=1> (x, w, w_lowrank_0_zero) }",
        opset=9,
        w=normal(5, 4),
        w_lowrank_0_zero=normal(4),
    )
    rewritten = decompose(model, "svd").model
    names = [t.name for t in rewritten.graph.initializer]
    assert len(names) == len(set(names)) == 4
    assert_same_function(rewritten, model, feeds_of(model))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_kernels_that_overflow_their_type_are_an_error_that_names_layer_method_and_rank() -> None:
    # a constant kernel is one component, and Tucker's core carries all of its norm: 4 * 30000 at each position
    model = parse(
        "g (float16[1,4,6,6] x) => (float16[] y) { y = Conv (x, w) }", w=np.full((4, 4, 3, 3), 3e4, np.float16)
    )
    with pytest.raises(LowRankError, match=r"layer 'y', tucker2 of rank \(4, 4\): .* overflows float16"):
        decompose(model, "tucker2")
    balanced = decompose(model, "channel_svd", lambda rank: (1,))
    assert all(np.isfinite(stored(balanced.model, t.name)).all() for t in balanced.model.graph.initializer)


def test_every_layer_is_found_again_after_the_rewrite(rewritten: Rewritten) -> None:
    assert [layer.name for layer in find(rewritten.model, x=(1, 4, 6, 6)).layers] == [*rewritten.nodes["conv"], "other"]

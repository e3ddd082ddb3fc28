"""Loading gives a model or one clear error, copies are faithful, and readers and names are those of every scope."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank.graph.find import model_cost
from onnx_lowrank.graph.model import all_graphs, load, readers, serialize, stored_tensors, tensor_names
from onnx_lowrank.graph.shapes import infer, model_inputs, sample_shapes
from onnx_lowrank.types import LowRankError
from tests.helpers import find, normal, parse

SMALL = """g (float[1,4,8,8] x, float[2,5] q) => (float[1,6,4,4] y, float[2,4] z) {
    ["conv"] a = Conv <strides=[2,2], pads=[1,1,1,1]> (x, w, b)
    y = Relu (a)
    t = Transpose <perm=[1,0]> (v)
    s = Constant <value = int64[2] {5, 4}> ()
    u = Reshape (t, s)
    ["gemm"] z = Gemm <alpha=0.5> (q, u)
}"""


def small() -> onnx.ModelProto:
    return parse(SMALL, w=normal(6, 4, 3, 3), b=normal(6), v=normal(4, 5))


def layers_found(path: Path) -> int:
    """Everything that is done with a model before anything is decided."""
    model = load(path)
    sizes, _ = sample_shapes(model_inputs(model), {})
    model_cost(model, infer(model, sizes))
    return len(find(model.proto).layers)


# --- what is not a model ---------------------------------------------------------------------------------------------


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"nowhere\.onnx cannot be read \(No such file or directory\)"):
        load(tmp_path / "nowhere.onnx")


def test_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"is a folder: the path of an \.onnx file was expected"):
        load(tmp_path)


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(LowRankError, match="is empty: an ONNX model was expected"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "content", [b"import torch\n" * 50, b"<html><body>Not found</body></html>", b"version https://"]
)
def test_a_text_file_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(LowRankError, match=r"m\.onnx is not (an|a whole) ONNX model"):
        load(tmp_path / "m.onnx")


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small().SerializeToString()
    for length in range(1, len(whole), 5):
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        with pytest.raises(LowRankError, match=r"cut short or damaged|is not a whole ONNX model"):
            load(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(whole)
    assert layers_found(tmp_path / "m.onnx") == 2


def test_a_file_cut_off_after_the_graph_lacks_its_operator_sets(tmp_path: Path) -> None:
    model = small()
    del model.opset_import[:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(LowRankError, match="no version, operator set, graph or outputs"):
        load(tmp_path / "m.onnx")


def test_damaged_bytes_give_a_clear_error_or_a_model_and_nothing_else(tmp_path: Path) -> None:
    whole, rng = small().SerializeToString(), np.random.default_rng(0)
    outcomes = []
    for _ in range(200):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        (tmp_path / "m.onnx").write_bytes(bytes(damaged))
        try:
            outcomes.append(layers_found(tmp_path / "m.onnx"))
        except LowRankError:
            outcomes.append(-1)
    assert {-1, 2} <= set(outcomes)


def test_random_bytes_are_no_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 10, 100, 1000):
        for _ in range(20):
            (tmp_path / "m.onnx").write_bytes(rng.bytes(length))
            with pytest.raises(LowRankError, match=r"m\.onnx is not (an|a whole) ONNX model"):
                load(tmp_path / "m.onnx")


def test_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(small().SerializeToString().replace(b"conv", b"c\xffnv"))
    with pytest.raises(LowRankError, match="a name in it is not UTF-8 text"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("missing", ["ir_version", "graph", "opset_import"])
def test_a_proto_that_is_not_whole_is_refused(missing: str) -> None:
    model = small()
    model.ClearField(missing)
    with pytest.raises(LowRankError, match="the model given is not a whole ONNX model"):
        load(model)


def test_versions_before_operator_sets_need_none() -> None:
    model = small()
    model.ClearField("opset_import")
    model.ir_version = 2
    assert load(model).opset == 1


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_proto_is_taken_as_it_is() -> None:
    model = small()
    assert load(model).proto is model


def test_the_folder_of_a_link_is_where_the_link_is(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "use").mkdir()
    onnx.save(small(), tmp_path / "store" / "m.onnx")
    (tmp_path / "use" / "m.onnx").symlink_to(tmp_path / "store" / "m.onnx")
    assert load(tmp_path / "use" / "m.onnx").folder == tmp_path / "use"


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_the_operator_set_is_that_of_the_standard_domain(domain: str) -> None:
    model = small()
    model.opset_import.insert(0, onnx.helper.make_opsetid("some.where", 3))
    model.opset_import[1].domain = domain
    assert load(model).opset == 17


def test_a_copy_without_a_kernel_lacks_that_alone(tmp_path: Path) -> None:
    model = load(small())
    before = serialize(model)
    copy = model.copy(without={"w"})
    assert [t.name for t in copy.graph.initializer] == ["b", "v"]
    copy.graph.initializer.insert(0, model.graph.initializer[0])
    assert serialize(copy) == before
    copy.graph.node[0].name = "changed"
    assert serialize(model) == before


def test_a_copy_without_a_kernel_keeps_fields_that_this_version_does_not_know() -> None:
    future = b"\xfa\x3f\x03new"  # field 1023, three bytes
    model = onnx.ModelProto.FromString(small().SerializeToString() + future)
    assert load(model).copy(without={"w"}).proto.SerializeToString().endswith(future)
    graph = onnx.GraphProto.FromString(model.graph.SerializeToString() + future)
    model.graph.CopyFrom(graph)
    assert future in load(model).copy(without={"w"}).graph.SerializeToString()


# --- scopes ----------------------------------------------------------------------------------------------------------

SCOPES = """g (float[2,2] x, bool c) => (float[2,2] y, float[2,2] w) {
    a = MatMul (x, w)
    y = If (c) <
        then_branch = then () => (float[2,2] p) { ["planted"] p = Add (a, w) },
        else_branch = else () => (float[2,2] q) <float[1] inner = {1}> {
            q = If (c) <
                then_branch = deep () => (float[2,2] r) { r = Mul (w, inner) },
                else_branch = deeper () => (float[2,2] s) { s = Identity (w) }
            >
        }
    >
}"""


def scoped() -> onnx.ModelProto:
    return parse(SCOPES, w=normal(2, 2))


def test_readers_are_counted_in_every_scope_and_among_the_outputs() -> None:
    count = readers(scoped())
    assert count["w"] == 5  # a, p, r, s and the output
    assert count["a"] == 1
    assert count["x"] == 1
    assert count["nothing"] == 0


def test_training_reads_what_it_computes_with_and_what_it_updates() -> None:
    model = scoped()
    training = model.training_info.add()
    training.algorithm.node.append(onnx.helper.make_node("Identity", ["w"], ["w_new"], name="step"))
    training.update_binding.add(key="w", value="w_new")
    training.initialization_binding.add(key="w", value="w_start")
    assert readers(model)["w"] == 5 + 3
    assert {"w_new", "step"} <= tensor_names(model)


def test_names_are_those_of_every_scope_and_of_functions() -> None:
    model = scoped()
    body = onnx.helper.make_node("Relu", ["in_function"], ["out_function"], name="node_in_function")
    model.functions.append(
        onnx.helper.make_function("local", "f", ["in_function"], ["out_function"], [body], model.opset_import)
    )
    inner = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["n"], ["deep_in_function"])], "i", [], [])
    model.functions[0].node.append(onnx.helper.make_node("If", ["n"], ["m"], then_branch=inner, else_branch=inner))
    expected = {"x", "c", "w", "y", "a", "planted", "p", "q", "r", "s", "inner"}
    expected |= {"in_function", "out_function", "node_in_function", "deep_in_function", "n", "m"}
    assert tensor_names(model) - {""} == expected


def test_graphs_are_listed_with_those_inside_them() -> None:
    assert [graph.name for graph in all_graphs(scoped().graph)] == ["g", "then", "else", "deep", "deeper"]


def test_stored_tensors_are_those_of_initializers_and_attributes_in_every_scope() -> None:
    model = small()
    sparse = onnx.helper.make_sparse_tensor(
        onnx.helper.make_tensor("values", onnx.TensorProto.FLOAT, [1], [1.0]),
        onnx.helper.make_tensor("indices", onnx.TensorProto.INT64, [1], [0]),
        [4],
    )
    model.graph.sparse_initializer.append(sparse)
    constant = onnx.helper.make_node("Constant", [], ["k"], value=onnx.helper.make_tensor("in_function", 1, [1], [2.0]))
    model.functions.append(onnx.helper.make_function("local", "f", [], ["k"], [constant], model.opset_import))
    names = [tensor.name for tensor in stored_tensors(model)]
    assert sorted(names) == sorted(["w", "b", "v", "", "in_function", "values", "indices"])
    assert [t.name for t in stored_tensors(scoped())] == ["w", "inner"]

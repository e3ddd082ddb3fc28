"""onnx-ir models at the public boundary, and the pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.interop import from_proto, to_proto
from tests import tiny
from tests.helpers import arrays, parse, run

ir = pytest.importorskip("onnx_ir")
LowRankPass = pytest.importorskip("onnx_lowrank.integrations.onnx_ir").LowRankPass

QUICK: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}
X = {"input": arrays(models.DIGITS_TEST)["input"][:8]}


def digits() -> onnx.ModelProto:
    return onnx.load(models.DIGITS)


def written(model: Any) -> bytes:
    """All of a model that a file would hold."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def external(folder: Path) -> Path:
    """The digits with their weights in a file beside them."""
    path = folder / "external.onnx"
    onnx.save(digits(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_only_a_model_is_taken_for_one() -> None:
    model = ir.from_proto(tiny.classifier())
    for other in (tiny.classifier(), "model.onnx", None, model.graph):
        assert to_proto(other) is other
    assert isinstance(to_proto(model), onnx.ModelProto)
    assert isinstance(from_proto(tiny.classifier(), model), ir.Model)


def test_a_model_comes_back_as_one_that_computes_what_the_proto_would() -> None:
    model = ir.from_proto(digits())
    before = written(model)
    result = lr.compress(model, budget={"macs": 0.5}, **QUICK)
    assert written(model) == before
    assert isinstance(result.model, ir.Model)
    expected = lr.compress(digits(), budget={"macs": 0.5}, **QUICK)
    sizes = result.report.compressed, expected.report.compressed
    assert [(size.macs, size.params) for size in sizes] == [(sizes[0].macs, sizes[0].params)] * 2
    np.testing.assert_array_equal(run(ir.to_proto(result.model), X)[0], run(expected.model, X)[0])


def test_every_function_takes_a_model() -> None:
    model = ir.from_proto(tiny.classifier())
    plan = lr.analyze(model, budget={"macs": 0.5}, **QUICK)
    result = lr.apply(model, plan, **QUICK)
    check = lr.verify(model, result.model, evaluate=[{"x": tiny.inputs(20)}])
    assert check.compressed.macs == result.report.compressed.macs < check.original.macs
    assert [layer.name for layer in lr.inspect(model, **QUICK).layers] == ["first", "second"]


def test_weights_in_a_file_are_found_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)
    model = ir.load(path)
    monkeypatch.chdir(tmp_path.parent)
    result = lr.compress(model, budget={"macs": 0.5}, **QUICK)
    expected = lr.compress(digits(), budget={"macs": 0.5}, **QUICK)
    np.testing.assert_array_equal(run(ir.to_proto(result.model), X)[0], run(expected.model, X)[0])
    assert isinstance(model.graph.initializers["conv2.weight"].const_value, ir.ExternalTensor)
    gone = ir.load(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(lr.LowRankError, match="initializers of the onnx-ir Model given cannot be read"):
        lr.compress(gone, budget={"macs": 0.5}, **QUICK)


def test_the_pass_works_in_place_and_does_what_compress_does() -> None:
    proto = digits()
    onnx.helper.set_model_props(proto, {"trained_on": "digits"})
    proto.graph.node[0].metadata_props.add(key="namespace", value="stem")
    model = ir.from_proto(proto)
    shrink = LowRankPass(budget={"macs": 0.5}, **QUICK)
    result = ir.passes.PassManager([shrink])(model)
    assert result.modified
    assert result.model is model
    expected = lr.compress(proto, budget={"macs": 0.5}, **QUICK)
    np.testing.assert_array_equal(run(ir.to_proto(model), X)[0], run(expected.model, X)[0])
    assert [node.name for node in model.graph] == [node.name for node in expected.model.graph.node]
    assert shrink.report.compressed.macs == expected.report.compressed.macs
    assert model.metadata_props["trained_on"] == "digits"
    assert (model.opset_imports, model.ir_version, model.producer_name) == (
        {"": 17},
        proto.ir_version,
        proto.producer_name,
    )
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["input", "output"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_the_pass_leaves_tensors_that_it_does_not_change_in_their_file(tmp_path: Path) -> None:
    model = ir.load(external(tmp_path))
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    shrink = LowRankPass(budget={"macs": 0.9}, include="conv2", **QUICK)
    shrink(model)
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert {layer.name for layer in shrink.report.layers} == {"conv2"}
    assert "conv2.weight" not in after
    kept = before.keys() & after.keys()
    assert len(kept) == len(before) - 1
    assert all(after[name] is before[name] for name in kept)
    ir.save(model, tmp_path / "small.onnx", external_data="small.bin")
    np.testing.assert_array_equal(run(str(tmp_path / "small.onnx"), X)[0], run(to_proto(model), X)[0])


def test_the_pass_says_where_it_changed_nothing() -> None:
    model = ir.from_proto(tiny.classifier())
    graph, before = model.graph, written(model)
    assert not LowRankPass(budget={"macs": 1.0}, **QUICK)(model).modified
    assert model.graph is graph
    assert written(model) == before


def test_the_pass_composes_with_those_of_onnx_ir() -> None:
    common = pytest.importorskip("onnx_ir.passes.common")
    model = ir.from_proto(digits())
    expected = run(lr.compress(digits(), budget={"macs": 0.5}, **QUICK).model, X)[0]
    steps = [
        common.LiftConstantsToInitializersPass(),
        LowRankPass(budget={"macs": 0.5}, **QUICK),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    ]
    result = ir.passes.Sequential(*steps)(model)
    np.testing.assert_array_equal(run(ir.to_proto(result.model), X)[0], expected)
    untouched = ir.from_proto(digits())
    functional = ir.passes.functionalize(LowRankPass(budget={"macs": 0.5}, **QUICK))(untouched)
    assert written(untouched) == written(ir.from_proto(digits()))
    np.testing.assert_array_equal(run(ir.to_proto(functional.model), X)[0], expected)


def test_a_model_with_branches_and_functions_goes_through() -> None:
    text = """g (float[N, 16] x, bool c) => (float[N, 4] y) {
      [only] h = MatMul (x, w)
      y = If (c) <
        then_branch = g1 () => (float[N, 4] t) { t = Relu (h) },
        else_branch = g2 () => (float[N, 4] e) { e = local.double (h) }
      >
    }
    <opset_import: ["" : 17], domain: "local"> double (a) => (b) { b = Add (a, a) }"""
    model = parse(text.partition("<opset_import")[0], w=tiny.planted(16, 4, 1))
    function = onnx.helper.make_function(
        "local", "double", ["a"], ["b"], [onnx.helper.make_node("Add", ["a", "a"], ["b"])], model.opset_import
    )
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    shrunk = ir.from_proto(model)
    assert LowRankPass(budget={"params": 0.5}, **QUICK)(shrunk).modified
    expected = lr.compress(model, budget={"params": 0.5}, **QUICK).model
    for choice in (True, False):
        feeds = {"x": tiny.inputs(3), "c": np.array(choice)}
        np.testing.assert_array_equal(run(ir.to_proto(shrunk), feeds)[0], run(expected, feeds)[0])


def test_what_cannot_be_done_leaves_the_model_as_it_was() -> None:
    with pytest.raises(lr.LowRankError, match="option 'budgets' was given"):
        LowRankPass(budgets={"macs": 0.5})
    with pytest.raises(lr.LowRankError, match="config and budget were given"):
        LowRankPass(config=lr.make_config(budget={"macs": 0.5}), budget={"macs": 0.5})
    model = ir.from_proto(tiny.classifier())
    before = written(model)
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(LowRankPass(**QUICK))(model)
    assert "nothing was asked for: give a budget" in str(caught.value.__cause__)
    # the file of so small a model is mostly names: more nodes make it larger
    with pytest.raises(lr.LowRankError, match=r"size \S+ was reached, 0\.3 asked for.*: the model is left as it was"):
        LowRankPass(budget={"size": 0.3}, **QUICK)(model)
    assert written(model) == before


def test_the_package_works_where_onnx_ir_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['onnx_ir'] = None\n"
        "import onnx_lowrank as lr, models\n"
        "print(lr.analyze(models.DIGITS, budget={'macs': 0.5}, jobs=1).ratio('macs') <= 0.5)"
    )
    root = Path(lr.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"

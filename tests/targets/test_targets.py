"""What targets refuse, how their parts are counted, and what becomes of a plan that would cut a model further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.tools.mobile_helpers import usability_checker

import models
import onnx_lowrank as lr
from onnx_lowrank.cli import main
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.model import Model, load
from onnx_lowrank.planning.placement import Placement
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.quantize import as_quantized
from onnx_lowrank.runtime import Partitions, block_size, known_providers
from onnx_lowrank.subject import open_subject
from onnx_lowrank.targets import TARGETS, count_partitions, find_target
from onnx_lowrank.types import LowRankError, no_progress
from tests import tiny
from tests.helpers import normal, parse

QUICK = {"methods": "svd,spatial_svd,channel_svd,tucker2", "align": 1, "jobs": 1}
WITH_PARTS = [name for name, target in TARGETS.items() if target.ops]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_called_what_its_table_says_and_stands_for_a_provider(name: str) -> None:
    target = find_target(name)
    assert target.name == name
    assert target.engine or target.provider in known_providers()
    assert target.block is None or target.block >= 1
    assert name == "cpu" or target.without
    if target.ops is not None:  # what a chain may be made of, the target takes
        assert set(target.spatial) <= target.ops.names()
        for op_type, axes in target.ops.spatial.items():
            assert set(target.spatial.get(op_type, axes)) <= set(axes)


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        LowRankError, match="no target is called 'phone': one of cpu, xnnpack, nnapi, coreml, qnn, mnn was"
    ):
        lr.compress(tiny.classifier(), budget={"macs": 0.5}, target="phone")


def convolution(axes: int, op_type: str = "Conv") -> onnx.ModelProto:
    """One convolution over so many axes."""
    size = ", ".join(["6"] * axes)
    outcome = ", ".join(["?"] * axes)
    kernel = normal(16, 16, *(3,) * axes)
    return parse(
        f"g (float[1, 16, {size}] x) => (float[1, 16, {outcome}] y) {{ [conv] y = {op_type} (x, w) }}", w=kernel
    )


def view(model: onnx.ModelProto, target: str) -> tuple[set[str], list[str]]:
    """Decompositions that a layer could take for a target, and why it is left alone."""
    config = make_config(target=target, **QUICK)
    planner = Planner(open_subject(model, config), config, no_progress)
    (group,) = planner.sets.all()
    return {c.decomposition for c in group} - {"dense"}, [skip.reason for skip in planner.skips()]


@pytest.mark.parametrize(
    ("target", "axes", "op_type", "reason"),
    [
        ("nnapi", 3, "Conv", "nnapi takes Conv in 2-D only: this one is 3-D"),
        ("nnapi", 1, "Conv", "nnapi takes Conv in 2-D only: this one is 1-D"),
        ("nnapi", 2, "ConvTranspose", "nnapi has no ConvTranspose"),
        ("coreml", 3, "Conv", "coreml takes Conv in 1-D and 2-D only: this one is 3-D"),
        ("xnnpack", 1, "Conv", "xnnpack takes Conv in 2-D only: this one is 1-D"),
        ("qnn", 3, "Conv", "qnn takes Conv in 1-D and 2-D only: this one is 3-D"),
        ("cpu", 3, "Conv", None),
        ("nnapi", 2, "Conv", None),
        ("coreml", 1, "Conv", None),
        ("coreml", 2, "ConvTranspose", None),
    ],
)
def test_what_leaves_the_target_is_never_a_candidate(target: str, axes: int, op_type: str, reason: str | None) -> None:
    could, why = view(convolution(axes, op_type), target)
    assert bool(could) is (reason is None)
    assert why == ([reason] if reason else [])


def test_an_estimated_rank_does_not_leave_the_target_either() -> None:
    plan = lr.analyze(convolution(3), rank="ratio=0.25", target="nnapi", **QUICK)
    assert all(choice.dense for choice in plan.choices)
    assert "nnapi takes Conv in 2-D only: this one is 3-D" in [skip.reason for skip in plan.skips]


def test_an_edited_plan_is_held_to_the_target(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"choices": [{"layers": ["conv"], "decomposition": "spatial_svd", "rank": 4}]}')
    assert lr.apply(convolution(3), plan, jobs=1).report.layers
    report = lr.apply(convolution(3), plan, target="nnapi", jobs=1).report
    assert report.layers == ()
    assert "nnapi takes Conv in 2-D only: this one is 3-D" in [skip.reason for skip in report.skips]
    assert any("1 layer(s) are left dense for target nnapi" in note for note in report.notes)


def test_ranks_are_aligned_to_the_target_unless_the_user_says_otherwise() -> None:
    def block(**options: Any) -> int:
        config = make_config(**options)
        return Planner(open_subject(tiny.classifier(), config), config, no_progress).block

    assert (block(), block(target="qnn"), block(target="qnn", align=4)) == (block_size(), 32, 4)


@pytest.mark.parametrize("options", [{"budget": {"latency": 0.5}}, {"max_drop": 0.1, "evaluate": "data.npz"}])
def test_times_of_this_machine_are_not_taken_for_those_of_a_phone(options: dict[str, Any], tmp_path: Path) -> None:
    if "evaluate" in options:
        options = options | {"evaluate": tiny.save_data(tmp_path / "data.npz", **tiny.labelled(tiny.classifier()))}
    with pytest.raises(
        LowRankError, match="latency on target nnapi cannot be told by CPUExecutionProvider: give a budget"
    ):
        lr.compress(tiny.classifier(), target="nnapi", **options, **QUICK)


# Parts

EIGHT = normal(8, 8, 3, 3)


def parts(text: str, target: str, *, sizes: tuple[int, ...] = (1, 8, 6, 6), **stored: np.ndarray) -> Partitions:
    ops = find_target(target).ops
    assert ops is not None
    return count_partitions(load(parse(f"g {text}", **stored)), {"x": sizes}, ops)


def counted(found: Partitions) -> tuple[int, int, int]:
    return found.num_nodes, found.num_supported, found.num_partitions


CUT = "(float[N, 8, 6, 6] x) => (float[N, 8, ?, ?] y) { a = Conv (x, w) [cut] b = Asin (a) y = Conv (b, v) }"


@pytest.mark.parametrize("target", WITH_PARTS)
def test_an_operator_that_is_not_taken_cuts_a_model_in_two(target: str) -> None:
    found = parts(CUT, target, w=EIGHT, v=EIGHT)
    assert counted(found) == (3, 2, 2)
    assert found.unsupported == ("cut",)
    assert counted(parts(CUT.replace("Asin", "Relu"), target, w=EIGHT, v=EIGHT)) == (3, 3, 1)


def test_normalisations_and_constants_are_folded_before_the_count() -> None:
    text = """(float[N, 8, 6, 6] x) => (float[N, 8, ?, ?] y) {
      k = Concat <axis = 0> (w1, w2)
      a = Conv (x, k)
      y = BatchNormalization (a, s, s, s, s)
    }"""
    assert counted(parts(text, "coreml", w1=EIGHT[:4], w2=EIGHT[4:], s=np.ones(8, "float32"))) == (1, 1, 1)


@pytest.mark.parametrize(
    ("target", "text", "sizes", "taken"),
    [
        ("nnapi", "(float[1, 8, 9] x) => (float[1, 8, ?] y) { y = Conv (x, w1) }", (1, 8, 9), 0),
        ("coreml", "(float[1, 8, 9] x) => (float[1, 8, ?] y) { y = Conv (x, w1) }", (1, 8, 9), 1),
        ("coreml", "(float[1, 8, 5, 5, 5] x) => (float[1, 8, ?, ?, ?] y) { y = Conv (x, w3) }", (1, 8, 5, 5, 5), 0),
        ("nnapi", "(float[8, 8, 3, 3] x) => (float[8, 8, ?, ?] y) { k = Relu (x) y = Conv (x, k) }", (8, 8, 3, 3), 1),
        ("coreml", "(float[4, 4] x) => (float[4, 4] y) { k = Relu (x) y = Gemm (x, k) }", (4, 4), 1),
        ("coreml", "(float[4, 8] x) => (float[4, 4] y) { y = Gemm (x, g) }", (4, 8), 1),
        ("nnapi", "(float[1, 8, 9] x) => (float[1, 8, ?] y) { y = GlobalAveragePool (x) }", (1, 8, 9), 0),
    ],
)
def test_what_the_notes_of_the_lists_say_is_looked_at(
    target: str, text: str, sizes: tuple[int, ...], taken: int
) -> None:
    stored = {"w1": normal(8, 8, 3), "w3": normal(8, 8, 3, 3, 3), "g": normal(8, 4)}
    found = parts(text, target, sizes=sizes, **{k: v for k, v in stored.items() if f", {k})" in text})
    assert found.num_supported == taken


def test_where_the_notes_hold_the_count_is_that_of_onnx_runtime(tmp_path: Path) -> None:
    ops = find_target("nnapi").ops
    assert ops is not None
    ours = count_partitions(load(models.DIGITS), {"input": (1, 1, 28, 28)}, ops)
    fixed = onnx.load(str(models.DIGITS))
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    theirs = usability_checker.check_nnapi_partitions(onnx.shape_inference.infer_shapes(fixed), True)
    assert (ours.num_partitions, ours.share) == (theirs.num_partitions, 1.0)
    assert theirs.num_supported_nodes == theirs.num_nodes


def test_a_model_in_eight_bits_is_one_part_where_the_target_has_such_operators() -> None:
    sizes = {"input": (1, 1, 28, 28)}
    found = {}
    for name in WITH_PARTS:
        ops = find_target(name).ops
        assert ops is not None
        found[name] = count_partitions(as_quantized(load(models.DIGITS), sizes), sizes, ops)
    assert (found["nnapi"].num_partitions, found["nnapi"].share) == (1, 1.0)
    assert found["coreml"].num_partitions > 1


def test_fewer_parts_and_a_larger_share_are_no_worse() -> None:
    before = Partitions(4, 3, 2)
    assert before.no_worse_than(before)
    assert Partitions(8, 7, 2).no_worse_than(before)
    assert not Partitions(8, 7, 3).no_worse_than(before)
    assert not Partitions(8, 5, 2).no_worse_than(before)


@pytest.mark.parametrize("target", WITH_PARTS)
def test_a_report_holds_the_parts_before_and_after(target: str, tmp_path: Path) -> None:
    model, out, report = tiny.save(tiny.classifier(), tmp_path / "m.onnx"), tmp_path / "s.onnx", tmp_path / "r.json"
    line = (
        f"compress {model} {out} --budget macs=0.5 --methods svd --align 1 --jobs 1 --target {target} --json {report}"
    )
    assert main([*line.split(), "--quiet"]) == 0
    (found,) = json.loads(report.read_text())["targets"]
    assert found["name"] == target
    sides = [
        [found["partitions"][side][f"num_{key}"] for key in ("nodes", "supported", "partitions")]
        for side in ("before", "after")
    ]
    nodes = len(onnx.load(str(out)).graph.node)
    assert sides == [[3, 3, 1], [nodes, nodes, 1]]
    assert lr.verify(model, out, target=target).to_dict()["targets"] == [found]


def test_layers_whose_chains_would_cut_the_model_are_left_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Placement, model: Model) -> Partitions:
        whole = any(tensor.name == "w1" for tensor in model.graph.initializer)
        return Partitions(5, 5, 1 if whole else 2)

    free = lr.compress(tiny.classifier(), budget={"macs": 0.6}, target="nnapi", **QUICK).report
    assert {"first", "second"} == {layer.name for layer in free.layers}
    monkeypatch.setattr(Placement, "of", cut)
    result = lr.compress(tiny.classifier(), budget={"macs": 0.6}, target="nnapi", **QUICK)
    assert [layer.name for layer in result.report.layers] == ["second"]
    assert {s.layer: s.reason for s in result.report.skips} == {
        "first": "decomposed it would cut the model into more parts on nnapi"
    }
    assert any("1 layer(s) are left dense for target nnapi, see their reasons: first" in n for n in result.report.notes)
    assert result.report.targets[0].met
    assert not result.met, "the budget is out of reach without that layer"


def test_a_result_that_is_cut_further_is_not_met(tmp_path: Path) -> None:
    one = parse("g (float[1, 8, 6, 6] x) => (float[1, 8, ?, ?] y) { y = Conv (x, w) }", w=EIGHT)
    cut = "g (float[1, 8, 6, 6] x) => (float[1, 8, ?, ?] y) { a = Sin (x) b = Cos (a) c = Conv (b, w) y = Cos (c) }"
    two = parse(cut, w=EIGHT)
    check = lr.verify(one, two, target="nnapi")
    assert (check.targets[0].met, check.met) == (False, False)
    assert any("target nnapi takes the result worse than the original" in note for note in check.notes)


@pytest.mark.parametrize("target", ["xnnpack", "qnn"])
def test_what_cannot_be_told_without_the_target_is_said(target: str) -> None:
    report = lr.compress(tiny.classifier(), budget={"macs": 0.5}, target=target, **QUICK).report
    assert report.targets == ()
    assert any(f"how {target} cuts the models is not told without it" in note for note in report.notes)
    assert any(f"say nothing of {target}" in note for note in report.notes)

"""Joint decompositions end to end: found in the graph, planned with the rest, written once, and the paper's factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import models
import onnx_lowrank as lr
from onnx_lowrank.config import make_config
from onnx_lowrank.decompositions import is_joint
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.planning.plans import plan_to_dict
from onnx_lowrank.recipes import find_recipe
from onnx_lowrank.recipes.joint_svd import plan_of
from onnx_lowrank.runtime import OPTIMIZED, RunSettings, Session
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import no_progress
from tests.helpers import assert_close, normal, parse, run

JOINT = ("joint_left", "joint_right", "joint_both")
SMALL = "resnet20_cifar10"


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return models.build(SMALL, 0)


def picture(count: int = 1) -> dict[str, np.ndarray]:
    return {"input": normal(count, 3, 32, 32, seed=5)}


def stored_bytes(model: onnx.ModelProto) -> int:
    return sum(len(t.raw_data) for t in model.graph.initializer)


# --- what repeats ---------------------------------------------------------------------------------------------------


def test_layers_that_repeat_are_read_off_the_graph(network: onnx.ModelProto) -> None:
    subject = open_subject(network, make_config())
    found = [[layer.name for layer in section.layers] for section in subject.sections]
    assert found == [[f"layer{s}.{b}.conv{c}" for b in range(3)] for s in (1, 2, 3) for c in (1, 2)]
    assert lr.inspect(network).sections == tuple(map(tuple, found))


def test_shortcuts_of_a_bottleneck_are_told_from_its_own_layers() -> None:
    subject = open_subject(models.build("resnet50", 0), make_config())
    around = [layer.name for section in subject.sections if section.shortcut for layer in section.layers]
    assert not any("downsample" not in name for name in around)
    joined = [layer.name for section in subject.sections if not section.shortcut for layer in section.layers]
    assert {"layer2.1.conv1", "layer2.1.conv3"} <= set(joined)


def test_the_user_may_say_what_belongs_together(network: onnx.ModelProto) -> None:
    subject = open_subject(network, make_config(group=["two=layer2.[12].conv*", "three=layer3.*.conv2"]))
    assert [[layer.name for layer in section.layers] for section in subject.sections] == [
        ["layer2.1.conv1", "layer2.1.conv2", "layer2.2.conv1", "layer2.2.conv2"],
        ["layer3.0.conv2", "layer3.1.conv2", "layer3.2.conv2"],
    ]
    with pytest.raises(lr.LowRankError, match=r"group two=nothing\* names 0 layer\(s\) .* see inspect"):
        open_subject(network, make_config(group={"two": "nothing*"}))
    with pytest.raises(lr.LowRankError, match="NAME=GLOB"):
        make_config(group="layer2*")


# --- planned and written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", JOINT)
def test_a_joint_model_stores_what_is_shared_once_and_runs(
    network: onnx.ModelProto, method: str, tmp_path: Path
) -> None:
    result = lr.compress(network, budget={"params": 0.5}, methods=method, align=4)
    joined = [choice for choice in result.plan.choices if not choice.dense]
    assert joined
    assert all(choice.decomposition == method and len(choice.layers) > 1 for choice in joined)
    assert result.met
    onnx.checker.check_model(result.model, full_check=True)
    readers: dict[str, int] = {}
    for node in result.model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    shared = [t for t in result.model.graph.initializer if readers[t.name] > 1]
    assert len(shared) == len(joined) * (2 if method == "joint_both" else 1)
    assert result.report.compressed.params == sum(int(np.prod(t.dims)) for t in result.model.graph.initializer)
    # through external data and back
    (tmp_path / "out").mkdir()
    wanted = run(result.model, picture())
    onnx.save(result.model, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=1024)
    again = lr.compress(tmp_path / "big.onnx", budget={"params": 1.0}, methods="svd")
    again.save(tmp_path / "out" / "same.onnx")
    assert_close(run(str(tmp_path / "out" / "same.onnx"), picture()), wanted, 1e-6)


def test_no_concatenation_of_kernels_is_left_when_the_model_is_loaded(network: onnx.ModelProto, tmp_path: Path) -> None:
    result = lr.compress(network, budget={"params": 0.5}, methods="joint_both", align=4)
    assert any(node.op_type == "Concat" for node in result.model.graph.node)
    result.save(tmp_path / "small.onnx")
    session = Session(tmp_path / "small.onnx", RunSettings(), profile=tmp_path)
    session.run(picture())
    session.end_profile()
    optimized = onnx.load(tmp_path / OPTIMIZED, load_external_data=False)
    assert not any(node.op_type == "Concat" for node in optimized.graph.node)


def test_every_scheme_and_separate_decompositions_compete_in_one_plan() -> None:
    # two layers in one subspace, and two that have nothing in common
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((4, 48))
    alike = [np.moveaxis((rng.standard_normal((48, 4)) @ basis).reshape(16, 3, 16, 3), 1, -1) for _ in range(2)]
    low = [
        np.moveaxis((rng.standard_normal((48, 3)) @ rng.standard_normal((3, 48))).reshape(16, 3, 16, 3), 1, -1)
        for _ in range(2)
    ]
    text = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
      [a1] a = Conv <pads = [1,1,1,1]> (x, w1)
      [r1] b = Relu (a)
      [a2] c = Conv <pads = [1,1,1,1]> (b, w2)
      [r2] d = Relu (c)
      [s1] e = Conv <pads = [1,1,1,1]> (d, w3)
      [t1] f = Tanh (e)
      [s2] g = Conv <pads = [1,1,1,1]> (f, w4)
      [t2] y = Tanh (g)
    }"""
    kernels = {f"w{i}": (w / 10).astype("float32") for i, w in enumerate([*alike, *low], 1)}
    model = parse(text, **kernels)
    plan = lr.analyze(model, budget={"params": 0.16}, methods="joint_left,spatial_svd", align=1)
    chosen = {choice.layers: choice.decomposition for choice in plan.choices}
    assert chosen[("a1", "a2")] == "joint_left"
    assert chosen[("s1",)] == chosen[("s2",)] == "spatial_svd"
    assert plan.ratio("params") <= 0.16
    result = lr.apply(model, plan)
    x = {"x": normal(2, 16, 8, 8)}
    assert_close(run(result.model, x), run(model, x), 1e-4)
    # and the plan survives the file, with all that was thought of
    data = plan_to_dict(plan)
    assert any(len(entry["layers"]) == 2 for entry in data["sensitivity"])
    assert sum(c["chosen"] for entry in data["sensitivity"] for c in entry["candidates"]) == len(plan.choices)


def test_a_joint_plan_is_read_back_and_a_wrong_one_refused(network: onnx.ModelProto, tmp_path: Path) -> None:
    plan = lr.analyze(network, budget={"params": 0.5}, methods="joint_left,spatial_svd")
    (tmp_path / "plan.json").write_text(json.dumps(plan_to_dict(plan)))
    result = lr.apply(network, tmp_path / "plan.json")
    made, wanted = ({(c.layers, c.decomposition, c.rank) for c in p.choices} for p in (result.plan, plan))
    assert made == wanted
    twice = [{"layers": ["layer1.0.conv1", "layer1.1.conv1"], "decomposition": "joint_left", "rank": [8]}] * 2
    (tmp_path / "twice.json").write_text(json.dumps({"choices": twice}))
    with pytest.raises(lr.LowRankError, match=r"decides layer 'layer1\.0\.conv1' a second time"):
        lr.apply(network, tmp_path / "twice.json")


@pytest.mark.parametrize("method", JOINT)
def test_with_samples_own_kernels_are_fitted_and_the_shared_one_stays_one(
    network: onnx.ModelProto, method: str
) -> None:
    plan = lr.analyze(network, budget={"params": 0.5}, methods=method, align=4)
    blind = lr.apply(network, plan)
    fitted = lr.apply(network, plan, calibrate=[picture(64)])
    wanted = run(network, picture(8))[0]
    errors = [np.linalg.norm(run(result.model, picture(8))[0] - wanted) for result in (blind, fitted)]
    assert errors[1] < errors[0]
    assert fitted.report.compressed.params == pytest.approx(blind.report.compressed.params, rel=0.01)


def test_a_latency_budget_may_be_met_by_joint_layers(network: onnx.ModelProto) -> None:
    plan = lr.analyze(network, budget={"latency": 0.95, "params": 0.6}, methods="joint_left")
    assert plan.ratio("params") <= 0.6
    assert any(choice.decomposition == "joint_left" for choice in plan.choices)


class Pictures(CalibrationDataReader):
    def __init__(self) -> None:
        self._left = [picture()] * 2

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


@pytest.mark.parametrize("method", JOINT)
def test_a_joint_model_can_be_quantised(network: onnx.ModelProto, method: str, tmp_path: Path) -> None:
    result = lr.compress(network, budget={"params": 0.5}, methods=method, align=4)
    result.save(tmp_path / "small.onnx")
    quantize_static(str(tmp_path / "small.onnx"), str(tmp_path / "int8.onnx"), Pictures())
    wanted = run(result.model, picture())[0]
    got = run(str(tmp_path / "int8.onnx"), picture())[0]
    assert np.corrcoef(wanted.ravel(), got.ravel())[0, 1] > 0.8


# --- the recipe -----------------------------------------------------------------------------------------------------


def recipe_plan(name: str, rate: float, scheme: str):
    recipe = find_recipe("joint_svd")
    config = recipe.configure(make_config(recipe="joint_svd", rank=f"ratio={rate}", methods=scheme))
    planner = Planner(open_subject(models.build(name, 0), config), config, no_progress, recipe.policy(config))
    return plan_of(planner)


@pytest.mark.parametrize("scheme", JOINT)
@pytest.mark.parametrize(
    ("name", "rate", "factor"),
    [
        ("resnet34_cifar10", 0.04, "22.03"),
        ("resnet34_cifar10", 0.08, "13.8"),
        ("resnet34_cifar10", 0.125, "9.69"),
        ("resnet34_cifar10", 0.3, "4.51"),
        ("resnet18_cifar10", 0.04, "17.8"),
        ("resnet34_cifar100", 0.04, "21.1"),
        ("resnet34", 0.04, "14.7"),
    ],
)
def test_the_factors_of_the_paper_are_reproduced(name: str, rate: float, factor: str, scheme: str) -> None:
    note = recipe_plan(name, rate, scheme).notes[-1]
    found = float(note.split("a factor of ")[1])
    assert f"{found:.{len(factor.split('.')[1])}f}" == factor


@pytest.mark.parametrize("scheme", JOINT)
def test_the_file_shrinks_by_the_factor_of_the_kernels(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_lowrank.decompositions.joint_svd.ALTERNATIONS", 1)  # no byte depends on the numbers
    given, small = tmp_path / "r34.onnx", tmp_path / "j.onnx"
    onnx.save(models.build("resnet34_cifar10", 0), given)
    result = lr.compress(given, recipe="joint_svd", rank="ratio=0.04", methods=scheme, jobs=1)
    result.save(small)
    assert given.stat().st_size / small.stat().st_size == pytest.approx(22.03, rel=0.03)
    left_alone = {skip.layer for skip in result.report.skips}
    assert {"conv1", "fc", "layer1.0.conv1", "layer2.0.downsample.0"} <= left_alone
    methods = {layer.name: layer.decomposition for layer in result.report.layers}
    assert methods["layer2.1.conv2"] == scheme
    assert methods["layer2.0.conv1"] == "spatial_svd"  # of other width: it has no partner


def test_a_named_group_with_the_first_layer_of_a_stage_is_the_other_variant() -> None:
    recipe = find_recipe("joint_svd")
    options = {"recipe": "joint_svd", "rank": "ratio=0.04", "methods": "joint_right"}
    config = recipe.configure(make_config(**options, group="two=layer2.*.conv1"))
    planner = Planner(
        open_subject(models.build("resnet34_cifar10", 0), config), config, no_progress, recipe.policy(config)
    )
    (choice,) = [c for c in plan_of(planner).choices if c.decomposition == "joint_right"]
    assert choice.layers[0] == "layer2.0.conv1"
    assert choice.rank == (int(128 * (2 * 4 - 0.5) / (4 + 0.5) * 0.04),)  # RJSVD-1, n = 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "the paper's rate was expected"),
        ({"rank": "vbmf"}, "the paper's rate was expected"),
        ({"rank": "ratio=2"}, "the paper's rate was expected"),
        ({"rank": "ratio=0.1", "methods": "svd"}, "one of joint_left, joint_right and joint_both"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(network: onnx.ModelProto, options, complaint: str) -> None:
    with pytest.raises(lr.LowRankError, match=complaint):
        lr.compress(network, recipe="joint_svd", **options)


def test_every_joint_member_is_one() -> None:
    assert [name for name in lr.decompositions.DECOMPOSITIONS if is_joint(name)] == list(JOINT)


@pytest.mark.parametrize("damage", ["accuracy", "combined"])
def test_what_is_measured_of_single_layers_is_not_asked_of_several(network: onnx.ModelProto, damage: str) -> None:
    options = {"budget": {"macs": 0.5}, "methods": "spatial_svd,joint_left", "calibrate": [picture(4)]}
    with pytest.raises(lr.LowRankError, match="leave out joint_left"):
        lr.analyze(network, damage=damage, **options)


def test_analyze_gives_the_plan_of_the_recipe_or_says_that_it_has_none(network: onnx.ModelProto) -> None:
    options = {"recipe": "joint_svd", "rank": "ratio=0.1"}
    plan = lr.analyze(network, **options)
    assert any(choice.decomposition == "joint_left" for choice in plan.choices)
    assert plan.ratio("params") < 0.5
    with pytest.raises(lr.LowRankError, match="recipe vbmf_cp finds its ranks while it trains: use compress"):
        lr.analyze(network, recipe="vbmf_cp", finetune="labels", train=models.DIGITS_TEST)

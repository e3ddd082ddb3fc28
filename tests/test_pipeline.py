"""The Python face: plans, what is done to each kind of model, and errors that say what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.planning.plans import plan_to_dict
from onnx_lowrank.search import bench
from onnx_lowrank.verification.verify import Latency
from onnx_lowrank.work import parallel
from tests import tiny
from tests.helpers import assert_close, normal, parse, run

QUICK: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save(tiny.classifier(), tmp_path / "model.onnx")


def saved(result: lr.Result, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


def ranks(result: lr.Result) -> dict[str, tuple[int, ...]]:
    return {layer.name: layer.rank for layer in result.report.layers}


# Plans


def test_analyze_leaves_the_model_as_it_is_and_writes_nothing(model: Path) -> None:
    before = tiny.contents(model.parent)
    plan = lr.analyze(model, budget={"macs": 0.5}, **QUICK)
    assert tiny.contents(model.parent) == before
    assert plan.original == lr.Cost(tiny.CLASSIFIER_MACS, tiny.CLASSIFIER_PARAMS)
    assert plan.ratio("macs") <= 0.5
    assert any(not choice.dense for choice in plan.choices)


def test_a_plan_keeps_what_it_promises(model: Path) -> None:
    plan = lr.analyze(model, budget={"macs": 0.5}, **QUICK)
    result = lr.apply(model, plan, **QUICK)
    macs, params = tiny.count(result.model, {"x": tiny.inputs(1)})
    assert (plan.cost.macs, plan.cost.params) == (macs, params)
    for choice in plan.choices:
        assert choice.error == pytest.approx(
            next((layer.relative_error**2 for layer in result.report.layers if layer.name in choice.layers), 0.0),
            rel=1e-6,
        )


def test_a_plan_applied_gives_the_bytes_of_compress(model: Path, tmp_path: Path) -> None:
    options = {"budget": {"macs": 0.5}, **QUICK}
    plan = lr.analyze(model, **options)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_to_dict(plan)))
    expected = saved(lr.compress(model, **options), tmp_path / "a.onnx")
    assert saved(lr.apply(model, plan, **QUICK), tmp_path / "b.onnx") == expected
    assert saved(lr.apply(model, file, **QUICK), tmp_path / "c.onnx") == expected
    assert onnx.load_from_string(expected) != tiny.classifier()


def test_a_plan_for_some_layers_leaves_the_others_alone(model: Path) -> None:
    plan = lr.analyze(model, budget={"macs": 0.8}, exclude="second", **QUICK)
    result = lr.apply(model, plan, **QUICK)
    assert list(ranks(result)) == ["first"]
    assert [choice.dense for choice in result.plan.choices] == [False, True]


def test_an_edited_rank_is_carried_out_and_priced_anew(model: Path, tmp_path: Path) -> None:
    data = plan_to_dict(lr.analyze(model, budget={"macs": 0.5}, **QUICK))
    first = next(entry for entry in data["choices"] if entry["layers"] == ["first"])
    second = next(entry for entry in data["choices"] if entry["layers"] == ["second"])
    first |= {"decomposition": "svd", "rank": [3], "macs": 1, "params": 1}
    second |= {"decomposition": "dense", "rank": []}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    result = lr.apply(model, tmp_path / "plan.json", **QUICK)
    assert ranks(result) == {"first": (3,)}
    expected = 3 * (16 + 24) + 24 * 10
    assert result.report.compressed.macs == result.plan.cost.macs == expected
    assert tiny.count(result.model, {"x": tiny.inputs(1)})[0] == expected
    kernel = np.linalg.svd(tiny.planted(24, 16, 4).astype(float), compute_uv=False)
    assert result.report.layers[0].relative_error == pytest.approx(
        np.sqrt(np.square(kernel[3:]).sum() / np.square(kernel).sum()), rel=1e-5
    )


def test_a_plan_for_another_model_is_refused(model: Path) -> None:
    plan = lr.analyze(tiny.two_large(), budget={"macs": 0.5}, methods="svd", jobs=1)
    with pytest.raises(lr.LowRankError, match=r"rank .* of svd for layer 'first': .* from 1 to 16"):
        lr.apply(model, plan)
    plan = lr.analyze(models.DIGITS, budget={"macs": 0.9}, **QUICK)
    with pytest.raises(lr.LowRankError, match="names layer 'conv1', which the model does not have"):
        lr.apply(model, plan)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def made(seed: int) -> bytes:
        result = lr.compress(tiny.pictures(), budget={"macs": 0.3}, methods="cp3", align=1, jobs=1, seed=seed)
        assert [layer.decomposition for layer in result.report.layers] == ["cp3"]
        return saved(result, tmp_path / f"{seed}.onnx")

    assert made(1) == made(1)


def test_the_number_of_processes_does_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(np.prod(t.dims) for t in tiny.two_large().graph.initializer) > parallel.WORTH_A_PROCESS
    started = []
    pool = parallel.joblib.Parallel

    def counted(**options: Any) -> Any:
        started.append(options)
        return pool(**options)

    monkeypatch.setattr(parallel.joblib, "Parallel", counted)
    one, two = (
        saved(
            lr.compress(tiny.two_large(), budget={"macs": 0.3}, methods="svd", jobs=jobs),
            tmp_path / f"{jobs}.onnx",
        )
        for jobs in (1, 2)
    )
    assert started, "no process was started: the comparison could not fail"
    assert one == two


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "first"}, {"first"}),
        ({"include": ["f*"]}, {"first"}),
        ({"exclude": "first"}, {"second"}),
        ({"include": "*", "exclude": "s*"}, {"first"}),
        ({}, {"first", "second"}),
    ],
)
def test_only_layers_that_are_chosen_are_changed(options: dict[str, Any], names: set[str]) -> None:
    result = lr.compress(tiny.classifier(), rank="ratio=0.2", **options, **QUICK)
    assert set(ranks(result)) == names
    left_out = {skip.layer for skip in result.report.skips if "--include or --exclude" in skip.reason}
    assert left_out == {"first", "second"} - names


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(lr.LowRankError, match=rf"{option} firts\* matches no node: names are like first, see inspect"):
        lr.compress(tiny.classifier(), budget={"macs": 0.9}, **{option: "firts*"}, **QUICK)


def test_a_kernel_that_an_excluded_layer_reads_too_stays_and_is_counted(tmp_path: Path) -> None:
    text = """g (float[N, 16] x) => (float[N, 16] y) {
      [first] h = MatMul (x, w)
      [second] y = MatMul (h, w)
    }"""
    model = parse(text, w=normal(16, 16))
    choice = {"layers": ["first"], "decomposition": "svd", "rank": [3]}
    (tmp_path / "plan.json").write_text(json.dumps({"choices": [choice]}))
    result = lr.apply(model, tmp_path / "plan.json", exclude="second", **QUICK)
    macs, params = tiny.count(result.model, {"x": tiny.inputs(1)})
    assert (macs, params) == (256 + 96, 256 + 96)
    assert result.plan.cost == lr.Cost(macs, params)
    together = lr.compress(model, budget={"macs": 0.7}, **QUICK)
    assert set(ranks(together)) == {"first", "second"}
    assert together.report.compressed.params < 256


def test_only_the_methods_that_are_named_are_used() -> None:
    for name in ("spatial_svd", "channel_svd", "tucker2"):
        result = lr.compress(tiny.pictures(), budget={"macs": 0.8}, methods=name, align=1, jobs=1)
        assert {layer.decomposition for layer in result.report.layers} == {name}


def test_a_rank_estimator_takes_the_place_of_an_allocation() -> None:
    kernel = tiny.planted(24, 16, 4).astype(float)
    energy = np.cumsum(np.square(np.linalg.svd(kernel, compute_uv=False)))
    by_hand = int(np.searchsorted(energy / energy[-1], 0.9) + 1)
    options = {"include": "first", **QUICK}
    assert ranks(lr.compress(tiny.classifier(), rank="energy=0.9", **options)) == {"first": (by_hand,)}
    assert ranks(lr.compress(tiny.classifier(), rank="ratio=0.25", **options)) == {"first": (4,)}  # of 16
    assert ranks(lr.compress(tiny.classifier(), rank="vbmf", **options)) == {"first": (4,)}  # as planted


def test_a_rank_estimator_and_a_budget_that_it_misses_is_not_met() -> None:
    result = lr.compress(tiny.classifier(), rank="vbmf", budget={"macs": 0.1}, **QUICK)
    assert not result.met
    assert [budget.met for budget in result.report.budgets] == [False]


@pytest.mark.parametrize("align", [1, 4, 8])
def test_ranks_are_multiples_of_the_alignment(align: int) -> None:
    result = lr.compress(models.DIGITS, budget={"macs": 0.4}, methods="spatial_svd", align=align, jobs=1)
    found = [rank for layer in result.report.layers for rank in layer.rank]
    assert found
    assert all(rank % align == 0 or rank < align for rank in found)
    if align == 1:
        assert any(rank % 4 for rank in found)


def test_batch_normalizations_are_folded_on_request() -> None:
    options: dict[str, Any] = {"budget": {"macs": 0.5}, "methods": "spatial_svd", "jobs": 1}
    folded = lr.compress(models.DIGITS, fold_batchnorm=True, **options)
    assert "BatchNormalization" not in {node.op_type for node in folded.model.graph.node}
    plain = lr.compress(models.DIGITS, **options)
    assert "BatchNormalization" in {node.op_type for node in plain.model.graph.node}
    assert folded.report.original == plain.report.original  # the model as it was given
    assert folded.plan.choices == plain.plan.choices
    digits = {"input": normal(4, 1, 8, 8, seed=5)}
    assert_close(run(folded.model, digits), run(plain.model, digits), 1e-5)


# Budgets


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.4}, {"macs": 0.6, "params": 0.5}])
def test_budgets_are_held_by_an_independent_count(budget: dict[str, float]) -> None:
    result = lr.compress(tiny.classifier(), budget=budget, **QUICK)
    assert result.met
    macs, params = tiny.count(result.model, {"x": tiny.inputs(1)})
    reached = {"macs": macs / tiny.CLASSIFIER_MACS, "params": params / tiny.CLASSIFIER_PARAMS}
    assert {b.metric: b.reached for b in result.report.budgets} == pytest.approx(
        {name: reached[name] for name in budget}
    )
    assert all(reached[name] <= ratio for name, ratio in budget.items())
    # and nothing is given away: the next rank of either layer would be too much
    assert any(reached[name] > 0.8 * ratio for name, ratio in budget.items())


def test_a_size_budget_is_measured_on_the_file(tmp_path: Path) -> None:
    result = lr.compress(models.DIGITS, budget={"size": 0.4}, methods="spatial_svd", jobs=1)
    assert result.met
    size = len(saved(result, tmp_path / "small.onnx"))
    assert size <= 0.4 * os.path.getsize(models.DIGITS)
    assert result.report.budgets[0].reached == size / os.path.getsize(models.DIGITS)
    assert result.report.compressed.size_bytes == size


def test_a_latency_budget_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    speedups = iter([1.5, 2.5, 2.5])

    def made_up(*given: Any, **options: Any) -> Latency:
        speedup = next(speedups)
        return Latency("CPUExecutionProvider", 1, 1, 1.0, 1 / speedup, 1.0, 1.0, speedup, speedup, speedup, {})

    monkeypatch.setattr(bench, "check_latency", made_up)
    monkeypatch.setattr(LatencyTable, "usable", False)
    result = lr.compress(tiny.classifier(), budget={"latency": 0.5}, **QUICK)
    (budget,) = result.report.budgets
    assert (budget.metric, budget.reached, budget.met) == ("latency", 0.4, True)
    # 2/3 of the time at half of the MACs: on the line through that and the original, what half the time takes
    assert result.report.compressed.macs / tiny.CLASSIFIER_MACS == pytest.approx(1 - 0.505 * 0.5 / (1 / 3), abs=0.06)


def test_the_size_of_a_model_is_that_of_all_its_files(tmp_path: Path) -> None:
    big = parse("g (float[N, 64] x) => (float[N, 64] y) { [only] y = MatMul (x, w) }", w=normal(64, 64))
    onnx.save(big, tmp_path / "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "big.onnx.data").write_bytes(b"of something else" * 1000)
    result = lr.compress(tmp_path / "big.onnx", budget={"params": 0.5}, **QUICK)
    files = [tmp_path / "big.onnx", tmp_path / "weights.bin"]
    assert result.report.original.size_bytes == sum(map(os.path.getsize, files))
    (tmp_path / "out").mkdir()
    result.save(tmp_path / "out" / "small.onnx")
    assert result.report.compressed.size_bytes == sum(map(os.path.getsize, (tmp_path / "out").iterdir()))


# Reports


KEYS = {
    "version": str,
    "environment": dict,
    "seconds": dict,
    "original": {"macs": int, "params": int, "size_bytes": int},
    "compressed": {"macs": int, "params": int, "size_bytes": int},
    "layers": [
        {
            "name": str,
            "op_type": str,
            "decomposition": str,
            "rank": [int],
            "macs_before": int,
            "macs_after": int,
            "params_before": int,
            "params_after": int,
            "relative_error": float,
            "nodes": [str],
        }
    ],
    "skips": [{"layer": str, "reason": str}],
    "budgets": [{"metric": str, "asked": float, "reached": float, "met": bool}],
    "accuracy": {
        "metric": str,
        "original": float,
        "compressed": float,
        "drop": float,
        "drop_upper_95": float,
        "samples": int,
    },
    "latency": [
        {
            "provider": str,
            "threads": int,
            "batch": int,
            "original_ms": float,
            "compressed_ms": float,
            "speedup": float,
            "speedup_low_95": float,
            "placement": dict,
        }
    ],
}
"""What users and plug-ins rely on: names and types may be added to, never changed."""


def check_keys(value: Any, expected: Any, where: str = "report") -> None:
    if isinstance(expected, dict):
        assert expected.keys() <= value.keys(), where
        for key, inner in expected.items():
            check_keys(value[key], inner, f"{where}.{key}")
    elif isinstance(expected, list):
        assert value, f"{where} is empty: the comparison could not fail"
        for item in value:
            check_keys(item, expected[0], f"{where}[]")
    else:
        assert type(value) is expected, where


def test_a_report_has_its_keys_and_counts_what_is_in_the_file(model: Path, tmp_path: Path) -> None:
    tiny.save_data(tmp_path / "data.npz", **tiny.labelled(tiny.classifier()))
    result = lr.compress(model, budget={"macs": 0.9}, evaluate=tmp_path / "data.npz", **QUICK)
    report = json.loads(json.dumps(result.report.to_dict(), allow_nan=False))
    check_keys(report, KEYS)
    after = onnx.load_from_string(saved(result, tmp_path / "small.onnx"))
    for side, written, path in (
        ("original", tiny.classifier(), model),
        ("compressed", after, tmp_path / "small.onnx"),
    ):
        macs, params = tiny.count(written, {"x": tiny.inputs(1)})
        assert report[side] == {"macs": macs, "params": params, "size_bytes": os.path.getsize(path)}
    nodes = {node.name for node in after.graph.node}
    (layer,) = report["layers"]
    assert set(layer["nodes"]) <= nodes
    lost = {
        "macs": layer["macs_before"] - layer["macs_after"],
        "params": layer["params_before"] - layer["params_after"],
    }
    assert all(report["original"][key] - report["compressed"][key] == lost[key] for key in lost)
    assert {skip["layer"] for skip in report["skips"]} | {layer["name"]} == {"first", "second"}
    assert all(skip["reason"] for skip in report["skips"])
    (latency,) = report["latency"]
    assert latency["batch"] == 1 and latency["provider"] == "CPUExecutionProvider"
    assert sum(latency["placement"].values()) >= 3
    assert latency["original_ms"] > 0 and latency["speedup_low_95"] <= latency["speedup"]


def test_latency_is_measured_on_the_batch_that_was_asked_for(tmp_path: Path) -> None:
    data = [{"x": tiny.inputs(16)}]
    each: list[dict[str, Any]] = [{}, {"evaluate": data}]
    for options in each:
        result = lr.compress(tiny.classifier(), budget={"macs": 0.5}, batch_size=4, threads=2, **options, **QUICK)
        (latency,) = result.report.latency
        assert (latency.batch, latency.threads) == (4, 2)


def test_without_data_random_inputs_are_used_and_the_report_says_so() -> None:
    result = lr.compress(tiny.classifier(), budget={"macs": 0.5}, **QUICK)
    assert result.report.accuracy is not None
    assert result.report.accuracy.metric == "cosine"
    assert any("random inputs" in note for note in result.report.notes)
    assert any("no calibration data" in note for note in result.report.notes)


def test_an_unknown_input_size_is_assumed_and_the_report_says_how_to_give_it() -> None:
    model = tiny.pictures()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    assumed = lr.compress(model, budget={"macs": 0.5}, methods="spatial_svd", align=1, jobs=1)
    assert any("give --input-shape x:1,3,224,224" in note for note in assumed.report.notes)
    assert assumed.report.original.macs == 224 * 224 * 8 * 27
    given = lr.compress(model, budget={"macs": 0.5}, input_shape={"x": (1, 3, 8, 8)}, methods="spatial_svd", jobs=1)
    assert given.report.original.macs == 8 * 8 * 8 * 27
    assert not any("--input-shape" in note for note in given.report.notes)
    data = [{"x": np.ones((2, 3, 10, 12), "float32")}]
    seen = lr.compress(model, budget={"macs": 0.5}, evaluate=data, methods="spatial_svd", jobs=1)
    assert seen.report.original.macs == 10 * 12 * 8 * 27


def test_progress_is_reported_from_begin_to_end() -> None:
    seen: list[tuple[str, int, int]] = []
    lr.compress(
        tiny.classifier(),
        budget={"macs": 0.5},
        progress=lambda *what: seen.append(what),
        evaluate=[{"x": tiny.inputs(64)}],
        **QUICK,
    )
    for stage in ("analyze", "factorize", "verify"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps[-1][0] == steps[-1][1] > 0
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)


# Kinds of models


def test_a_model_proto_comes_back_as_one_and_the_one_given_is_not_changed() -> None:
    model = tiny.classifier()
    before = model.SerializeToString(deterministic=True)
    result = lr.compress(model, budget={"macs": 0.5}, **QUICK)
    assert isinstance(result.model, onnx.ModelProto)
    onnx.checker.check_model(result.model, full_check=True)
    assert model.SerializeToString(deterministic=True) == before
    assert len(result.model.graph.node) > len(model.graph.node)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_gives_a_model_proto(model: Path, kind: type) -> None:
    result = lr.compress(kind(model), budget={"macs": 0.5}, **QUICK)
    assert isinstance(result.model, onnx.ModelProto)


def test_a_result_is_saved_whole_and_never_over_the_source(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    result = lr.compress(model, budget={"macs": 0.5}, **QUICK)
    with pytest.raises(lr.LowRankError, match="is the model that was given"):
        result.save(model)
    with pytest.raises(lr.LowRankError, match=r"missing does not exist"):
        result.save(tmp_path / "missing" / "small.onnx")
    assert model.read_bytes() == before
    result.save(tmp_path / "small.onnx")
    assert onnx.load(tmp_path / "small.onnx") == result.model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "small.onnx"]


def test_models_may_be_of_different_kinds_in_verify(model: Path) -> None:
    check = lr.verify(model, tiny.classifier(), evaluate=[{"x": tiny.inputs(32)}], threads=1)
    assert (check.accuracy.drop, check.accuracy.metric) == (0, "cosine")
    assert check.original == check.compressed
    assert check.accuracy.others["agreement"] == 1


def test_inspect_shows_the_best_at_half_the_cost() -> None:
    view = lr.inspect(tiny.classifier(), **QUICK)
    assert view.cost == lr.Cost(tiny.CLASSIFIER_MACS, tiny.CLASSIFIER_PARAMS)
    assert [(layer.name, layer.macs, layer.params) for layer in view.layers] == [
        ("first", 384, 384),
        ("second", 240, 240),
    ]
    for layer, highest in zip(view.layers, (4, 3), strict=True):
        assert layer.half is not None
        assert layer.half.rank == (highest,)
        assert 2 * layer.half.cost.macs <= layer.macs


# Errors


def nothing() -> Any:
    raise AssertionError("read before it was checked")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing was asked for"),
        ({"budget": {"macs": 0}}, "budget macs=0: a fraction"),
        ({"budget": {"macs": float("nan")}}, "budget macs=nan: a fraction"),
        ({"budget": {"macs": "half"}}, "budget macs 'half' was given: a number"),
        ({"budget": {"flops": 0.5}}, "budget flops=0.5 was given: one of macs, params, size, latency"),
        ({"budget": 0.5}, "budget 0.5 was given: METRIC=RATIO"),
        ({"budget": [lr.Budget("macs", 0.5), "macs=0.4"]}, "2 budgets on macs were given"),
        ({"max_drop": 0.1}, "max_drop needs samples"),
        ({"max_drop": -1, "evaluate": nothing}, "max_drop -1.0 was given"),
        ({"max_drop": "much", "evaluate": nothing}, "max_drop 'much' was given: a number"),
        ({"rank": "magic"}, "there is no 'magic'"),
        ({"rank": 0.5}, "rank 0.5 was given: text"),
        ({"buget": {"macs": 0.5}}, "option 'buget' was given: one of align"),
        ({"budget": {"macs": 0.5}, "methods": "magic"}, "no decomposition is called 'magic'"),
        ({"budget": {"macs": 0.5}, "methods": []}, "empty list of methods"),
        ({"budget": {"macs": 0.5}, "jobs": 1.5}, "jobs 1.5 was given: a whole number"),
        ({"budget": {"macs": 0.5}, "seed": True}, "seed True was given: a whole number"),
        ({"budget": {"macs": 0.5}, "provider": "Abacus"}, "'Abacus' is not in this build"),
        ({"budget": {"macs": 0.5}, "metric": "beauty"}, "no metric is called 'beauty'"),
        ({"budget": {"macs": 0.5}, "metric": "top1", "evaluate": [{"x": tiny.inputs(4)}]}, "needs labels"),
        ({"budget": {"macs": 0.5}, "evaluate": [{"z": tiny.inputs(4)}]}, "has z, the model wants x"),
        ({"budget": {"macs": 0.5}, "evaluate": 5}, "expected a path, a sequence"),
        ({"budget": {"macs": 0.5}, "evaluate": iter([])}, "can be read only once"),
        ({"budget": {"macs": 0.5}, "input_shape": {"z": (1, 16)}}, "input shape given for 'z'"),
        ({"budget": {"macs": 0.5}, "input_shape": {"x": (1, 0)}}, "sizes of at least 1"),
        ({"budget": {"macs": 0.5}, "config": lr.Config(seed=1)}, "config and budget were given"),
    ],
)
def test_what_cannot_be_used_is_said_by_one_error(options: dict[str, Any], match: str) -> None:
    with pytest.raises(lr.LowRankError, match=match):
        lr.compress(tiny.classifier(), **options)


@pytest.mark.parametrize("model", [None, 5, b"model.onnx", [tiny.classifier()]])
def test_what_is_no_model_is_refused(model: Any) -> None:
    for use in (lr.compress, lr.analyze, lr.inspect):
        with pytest.raises(lr.LowRankError, match=f"a model of type {type(model).__name__} was given: a path"):
            use(model, config=lr.make_config(budget="macs=0.5"))
    with pytest.raises(lr.LowRankError, match="a model of type"):
        lr.verify(tiny.classifier(), model)


def test_analyze_plans_only_what_is_known_before_anything_is_written() -> None:
    with pytest.raises(lr.LowRankError, match="nothing to plan for"):
        lr.analyze(tiny.classifier())
    with pytest.raises(lr.LowRankError, match="a budget on size is measured"):
        lr.analyze(tiny.classifier(), budget={"size": 0.5})
    with pytest.raises(lr.LowRankError, match=r"macs=0.01 cannot be met.* reach 0\.11[89]\d* .*loosen"):
        lr.analyze(tiny.classifier(), budget={"macs": 0.01}, **QUICK)


def test_two_models_with_different_faces_are_not_compared() -> None:
    other = tiny.classifier()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    with pytest.raises(lr.LowRankError, match="different outputs"):
        lr.verify(tiny.classifier(), other)
    with pytest.raises(lr.LowRankError, match="different inputs"):
        lr.verify(tiny.classifier(), models.DIGITS)


def test_a_config_stands_for_its_options(tmp_path: Path) -> None:
    config = lr.make_config(budget={"macs": 0.5}, **QUICK)
    one = saved(lr.compress(tiny.classifier(), config=config), tmp_path / "a.onnx")
    assert one == saved(lr.compress(tiny.classifier(), budget={"macs": 0.5}, **QUICK), tmp_path / "b.onnx")


def test_a_graphsurgeon_graph_comes_back_as_one() -> None:
    graph = gs.import_onnx(tiny.classifier())
    result = lr.compress(graph, budget={"macs": 0.5}, **QUICK)
    assert isinstance(result.model, gs.Graph)
    x = {"x": tiny.inputs(3)}
    expected = lr.compress(tiny.classifier(), budget={"macs": 0.5}, **QUICK)
    exported = gs.export_onnx(result.model)
    exported.ir_version = 8
    np.testing.assert_array_equal(run(exported, x)[0], run(expected.model, x)[0])


def test_calibration_samples_make_a_better_model_and_the_same_bytes_from_the_same_plan(tmp_path: Path) -> None:
    # inputs that lie in 4 of 16 dimensions: what the kernel does to the others does not matter, and only data tell
    low = np.random.default_rng(0).standard_normal((400, 4)) @ np.random.default_rng(1).standard_normal((4, 16))
    data = [{"x": low[:200].astype("float32")}]
    model = parse("g (float[N, 16] x) => (float[N, 16] y) { [only] y = MatMul (x, w) }", w=normal(16, 16))
    options: dict[str, Any] = {"budget": {"macs": 0.5}, "evaluate": [{"x": low[200:].astype("float32")}], **QUICK}
    blind, told = lr.compress(model, **options), lr.compress(model, calibrate=data, **options)
    assert ranks(blind) == ranks(told) == {"only": (4,)}
    assert blind.report.accuracy is not None and told.report.accuracy is not None
    assert blind.report.accuracy.others["sqnr"] < 20
    assert told.report.accuracy.others["sqnr"] > 40  # shrinkage keeps a little of what the samples do not show
    assert any("no calibration data" in note for note in blind.report.notes)
    assert not any("no calibration data" in note for note in told.report.notes)
    plan = lr.analyze(model, calibrate=data, **options)
    again = lr.apply(model, plan, calibrate=data, **QUICK)
    assert saved(again, tmp_path / "b.onnx") == saved(told, tmp_path / "a.onnx")


def test_it_is_said_that_a_plan_was_made_for_kernels_fitted_to_samples(tmp_path: Path) -> None:
    model, samples = (
        tiny.classifier(),
        {"calibrate": [{"x": tiny.inputs(40)}], "evaluate": [{"x": tiny.inputs(20, seed=1)}]},
    )
    fitted = lr.compress(model, budget={"macs": 0.8}, **samples, **QUICK)
    assert fitted.plan.fitted
    blind, told = lr.apply(model, fitted.plan, **QUICK), lr.apply(model, fitted.plan, **samples, **QUICK)
    assert any("made for kernels fitted to samples" in note for note in blind.report.notes)
    assert not any("made for kernels fitted to samples" in note for note in told.report.notes)
    by_weights = lr.analyze(model, budget={"macs": 0.8}, **QUICK)
    assert not by_weights.fitted
    assert not any("made for kernels fitted" in n for n in lr.apply(model, by_weights, **QUICK).report.notes)


def test_it_is_said_that_accuracy_is_that_on_the_calibration_samples() -> None:
    samples = [{"x": tiny.inputs(40)}]
    one = lr.compress(tiny.classifier(), budget={"macs": 0.8}, calibrate=samples, **QUICK)
    two = lr.compress(
        tiny.classifier(), budget={"macs": 0.8}, calibrate=samples, evaluate=[{"x": tiny.inputs(20, seed=1)}], **QUICK
    )
    assert any("on the calibration samples" in note for note in one.report.notes)
    assert not any("on the calibration samples" in note for note in two.report.notes)


def test_a_large_loss_comes_with_what_keeps_more() -> None:
    lost = lr.compress(
        tiny.classifier(), rank="ratio=0.1", evaluate=[{"x": tiny.inputs(60)}], metric="agreement", **QUICK
    )
    kept = lr.compress(
        tiny.classifier(), rank="ratio=1.0", evaluate=[{"x": tiny.inputs(60)}], metric="agreement", **QUICK
    )
    assert lost.report.accuracy.drop > 0.03 >= kept.report.accuracy.drop
    assert any("agreement fell by" in note and "--max-drop" in note for note in lost.report.notes)
    assert not any("fell by" in note for note in kept.report.notes)

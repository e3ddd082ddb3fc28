"""The pass of Olive, run by Olive: needs olive-ai and torch (1.5 GB), see tools/check_olive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from tests import tiny
from tests.helpers import arrays, run

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Olive's own imports
pytest.importorskip("olive", reason="olive-ai is not installed: tools/check_olive runs these tests with it")

QUICK: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}
X = {"input": arrays(models.DIGITS_TEST)["input"][:64]}
CPU = {
    "type": "LocalSystem",
    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
}


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own for Olive's cache and its telemetry off."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")


def execute(folder: Path, options: dict[str, Any], model: Path = models.DIGITS, **workflow: Any) -> Any:
    """A workflow of this pass alone, by Olive's own entry point."""
    import olive

    from onnx_lowrank.integrations.olive import write_package_config

    config = {
        "input_model": {"type": "ONNXModel", "model_path": str(model)},
        "systems": {"here": CPU},
        "passes": {"shrink": {"type": "OnnxLowRank", **QUICK, **options}},
        "host": "here",
        "target": "here",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
        "no_artifacts": True,
        **workflow,
    }
    return olive.run(config, package_config=str(write_package_config(folder / "package.json")))


def summary_of(candidate: Any) -> dict[str, Any]:
    """What the pass keeps beside a model."""
    kept = candidate.model_config["model_attributes"]["onnx_lowrank"]
    assert isinstance(kept, dict)
    return kept


def test_a_package_configuration_holds_olives_passes_and_ours(tmp_path: Path) -> None:
    from olive.package_config import OlivePackageConfig

    from onnx_lowrank.integrations.olive import OnnxLowRank, write_package_config

    path = write_package_config(tmp_path / "package.json")
    theirs = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    ours = json.loads(path.read_text())
    assert ours["passes"].keys() == theirs["passes"].keys() | {"OnnxLowRank"}
    assert {key: value for key, value in ours.items() if key != "passes"} == {
        key: value for key, value in theirs.items() if key != "passes"
    }
    package = OlivePackageConfig.parse_file_or_obj(path)
    assert package.import_pass_module("OnnxLowRank") is OnnxLowRank
    again = write_package_config(tmp_path / "again.json", base=path)
    assert json.loads(again.read_text()) == ours
    (tmp_path / "not.json").write_text("[]")
    for base in (tmp_path / "not.json", tmp_path / "missing.json"):
        with pytest.raises(lr.LowRankError, match="is no package configuration of Olive"):
            write_package_config(tmp_path / "c.json", base=base)
    with pytest.raises(lr.LowRankError, match="cannot be written"):
        write_package_config(tmp_path / "no" / "c.json")


def test_the_budget_is_searchable_and_the_data_typed_as_olive_demands() -> None:
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.search.search_parameter import Categorical

    from onnx_lowrank.integrations.olive import BUDGETS, OnnxLowRank

    described = OnnxLowRank.default_config(DEFAULT_CPU_ACCELERATOR)
    options = set(lr.Config.__dataclass_fields__)
    assert options <= described.keys()
    _, fixed, searched = OnnxLowRank.get_config_params(DEFAULT_CPU_ACCELERATOR)
    assert list(searched) == ["budget"]
    assert isinstance(searched["budget"], Categorical)
    assert searched["budget"].get_support() == list(BUDGETS)
    assert fixed["budget_metric"] == "macs"
    assert OnnxLowRank.generate_config(DEFAULT_CPU_ACCELERATOR, disable_search=True).budget == 0.5


def test_olive_runs_the_pass(tmp_path: Path) -> None:
    output = execute(tmp_path, {"budget": 0.5, "evaluate": str(models.DIGITS_TEST)})
    best = output.get_best_candidate()
    expected = lr.compress(models.DIGITS, budget={"macs": 0.5}, evaluate=models.DIGITS_TEST, **QUICK)
    np.testing.assert_array_equal(run(best.model_path, X)[0], run(expected.model, X)[0])
    made = onnx.load(best.model_path)
    assert {o.domain: o.version for o in made.opset_import} == {"": 17}
    summary = summary_of(best)
    assert summary["compressed"]["macs"] == expected.report.compressed.macs
    assert summary["accuracy"]["metric"] == "top1"


@pytest.fixture
def data_configs(tmp_path: Path) -> list[dict[str, Any]]:
    """The digits as Olive's data sets ``calib``, without labels that mean anything, and ``test``."""
    script = tmp_path / "user.py"
    script.write_text(
        "import numpy as np\n"
        "from olive.data.registry import Registry\n"
        "class Rows:\n"
        "    def __init__(self, path):\n"
        "        self.data = dict(np.load(path))\n"
        "    def __len__(self):\n"
        "        return 200\n"
        "    def __getitem__(self, i):\n"
        "        label = self.data['labels'][i] if 'labels' in self.data else -1\n"
        "        return {'input': self.data['input'][i], 'unused': 0}, label\n"
        "@Registry.register_dataset()\n"
        "def digits(path, **kwargs):\n"
        "    return Rows(path)\n"
    )
    return [
        {
            "name": name,
            "user_script": str(script),
            "load_dataset_config": {"type": "digits", "params": {"path": str(path)}},
            "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 50}},
            "post_process_data_config": {"type": "text_classification_post_process"},
        }
        for name, path in {"calib": models.DIGITS_CALIBRATE, "test": models.DIGITS_TEST}.items()
    ]


def test_olives_own_data_calibrate_and_evaluate(tmp_path: Path, data_configs: list[dict[str, Any]]) -> None:
    options = {"budget": 0.95, "include": "conv2", "align": 16, "data_config": "calib", "evaluate_data_config": "test"}
    best = execute(tmp_path, options, data_configs=data_configs).get_best_candidate()
    with np.load(models.DIGITS_CALIBRATE) as calibrate, np.load(models.DIGITS_TEST) as test:
        expected = lr.compress(
            models.DIGITS,
            budget={"macs": 0.95},
            include="conv2",
            calibrate=[{"input": calibrate["input"][:200]}],
            evaluate=[({"input": test["input"][:200]}, test["labels"][:200])],
            **{**QUICK, "align": 16},
        )
    np.testing.assert_array_equal(run(best.model_path, X)[0], run(expected.model, X)[0])
    assert summary_of(best)["accuracy"] == expected.report.to_dict()["accuracy"]
    with pytest.raises(lr.LowRankError, match="calibrate and data_config were given: one of them was expected"):
        execute(tmp_path, {**options, "calibrate": str(models.DIGITS_CALIBRATE)}, data_configs=data_configs)


def test_olive_searches_over_the_budget_and_leaves_out_what_is_not_met(
    tmp_path: Path, data_configs: list[dict[str, Any]]
) -> None:
    accuracy = {
        "name": "top1",
        "type": "accuracy",
        "data_config": "test",
        "sub_types": [
            {"name": "accuracy_score", "priority": 1, "metric_config": {"task": "multiclass", "num_classes": 10}}
        ],
    }
    output = execute(
        tmp_path,
        {"budget": [0.0001, 0.1, 0.8]},
        data_configs=data_configs,
        evaluators={"judge": {"type": "ONNX", "metrics": [accuracy]}},
        evaluator="judge",
        search_strategy={"execution_order": "joint", "sampler": "sequential"},
    )
    tried = [node for node in output.footprint.nodes.values() if node.from_pass]
    measured = {node.pass_run_config["budget"]: node.metrics is not None for node in tried}
    assert measured == {0.0001: False, 0.1: True, 0.8: True}
    best = output.get_best_candidate()
    assert summary_of(best)["budgets"][0]["asked"] == 0.8
    assert best.metrics_value["top1-accuracy_score"]["value"] > 0.9


def test_weights_in_a_file_are_read_from_it_and_written_to_one(tmp_path: Path) -> None:
    model = tmp_path / "external" / "digits.onnx"
    model.parent.mkdir()
    onnx.save(onnx.load(models.DIGITS), model, save_as_external_data=True, location="w.bin", size_threshold=0)
    options = {"budget": 0.5, "save_as_external_data": True, "external_data_name": "small.data"}
    best = execute(tmp_path, options, model).get_best_candidate()
    path = Path(best.model_path) / best.model_config["onnx_file_name"]
    assert (path.parent / "small.data").stat().st_size > 50_000
    expected = lr.compress(models.DIGITS, budget={"macs": 0.5}, **QUICK).model
    np.testing.assert_array_equal(run(str(path), X)[0], run(expected, X)[0])


def test_a_rank_estimator_or_a_bound_on_the_loss_takes_the_place_of_the_budget(tmp_path: Path) -> None:
    kept = summary_of(execute(tmp_path, {"budget": None, "rank": "ratio=0.3"}).get_best_candidate())
    assert kept["layers"] > 3
    assert kept["budgets"] == []
    bounded = {"budget": None, "max_drop": 0.05, "objective": "macs", "evaluate": str(models.DIGITS_TEST)}
    (drop,) = summary_of(execute(tmp_path, bounded).get_best_candidate())["budgets"]
    assert (drop["metric"], drop["asked"], drop["met"]) == ("drop", 0.05, True)


def test_bad_options_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(lr.LowRankError, match=r"budget flops=0\.5 was given: one of macs, params, size, latency"):
        execute(tmp_path, {"budget_metric": "flops"})
    with pytest.raises(
        ValueError, match="OnnxLowRank: option budgets was given: one of align, all_tensors_to_one_file"
    ):
        execute(tmp_path, {"budgets": 0.5})
    with pytest.raises(lr.LowRankError, match="methods 3 was given: a list of names was expected"):
        execute(tmp_path, {"methods": 3})
    with pytest.raises(lr.LowRankError, match="the model has no layer to decompose"):
        execute(tmp_path, {}, tiny.save(tiny.without_layers(), tmp_path / "none.onnx"))

"""Bundles: what is in them, the script on its own, runs that are broken off, and plans by what comes back."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_lowrank as lr
from onnx_lowrank.cli import main
from onnx_lowrank.latency import probes
from onnx_lowrank.report.text import render_report
from onnx_lowrank.targets import read_results
from onnx_lowrank.types import LowRankError
from tests import tiny
from tests.helpers import normal
from tests.latency.test_latency import residual
from tests.latency.test_whole_times import net

QUICK = {"methods": "channel_svd,svd", "align": 4, "jobs": 1}
OPTIONS = ["--rounds", "10", "--seconds", "0"]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of a small network with a normalisation, unpacked."""
    monkeypatch.setattr(probes, "MIXES", 1)
    (tmp_path / "model.onnx").write_bytes(residual().SerializeToString())
    made = lr.bundle(tmp_path / "model.onnx", tmp_path / "out.zip", **QUICK)
    assert made.size_bytes == (tmp_path / "out.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        archive.extractall(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert made.models == len(manifest["timed"]) > 1
    return tmp_path / "bundle"


def script(folder: Path) -> ModuleType:
    """The script of a bundle as a device imports it."""
    spec = importlib.util.spec_from_file_location("bench", folder / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(module: ModuleType, ratio: Callable[[int], float]) -> list[int]:
    """Let a script find the ratios that are given by number."""
    asked: list[int] = []

    def compared(first: Any, second: Any, feeds: Any, args: Any) -> dict[str, Any]:
        asked.append(len(asked))
        value = ratio(asked[-1])
        return {"ratio": value, "low_95": value, "high_95": value, "original_ms": 2.0}

    module.compared = compared  # type: ignore[attr-defined]
    return asked


def measured(folder: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """What a bundle writes where all of its models take half of the time, and where."""
    module = script(folder)
    made_up(module, lambda number: 0.5)
    assert module.main(["--out", str(out)]) == 0
    return out, json.loads(out.read_text())


def test_the_script_needs_onnxruntime_and_numpy_alone(bundle: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse((bundle / "bench.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_a_bundle_holds_no_weights_and_its_models_run_like_the_original(bundle: Path) -> None:
    module = script(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    module.fill_weights(bundle / "weights.bin", manifest["weights"])
    assert (bundle / "weights.bin").stat().st_size == sum(section["bytes"] for section in manifest["weights"])
    stored = {t.name: t for t in onnx.load(str(bundle / "original.onnx"), load_external_data=False).graph.initializer}
    assert all(stored[name].data_location == onnx.TensorProto.EXTERNAL for name in ("w1", "w2", "w3"))
    assert all(stored[name].data_location != onnx.TensorProto.EXTERNAL for name in ("variance", "c"))
    assert b"w1" in (bundle / "original.onnx").read_bytes()
    assert normal(16, 16, 3, 3).tobytes()[:64] not in (bundle / "original.onnx").read_bytes()
    feeds = module.made_up(manifest["inputs"])
    model = residual()
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    for name in ("original.onnx", *(entry["file"] for entry in manifest["timed"])):
        (value,) = ort.InferenceSession(str(bundle / name)).run(None, feeds)
        assert value.shape == expected.shape
        assert 0.1 < np.abs(value).mean() / np.abs(expected).mean() < 10, "activations are as large as they were"


def test_the_same_bundle_is_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    lr.bundle(tmp_path / "model.onnx", tmp_path / "again.zip", **QUICK)
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


def test_what_a_device_measures_makes_the_plan_and_is_called_predicted(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "phone.json"
    assert script(bundle).main([*OPTIONS, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    data = json.loads(out.read_text())
    assert len(said) == len(data["timed"]) + 1 == data["models"] + 1
    assert all(entry["low_95"] <= entry["ratio"] <= entry["high_95"] for entry in data["timed"])
    assert all(entry["placement"].get("CPUExecutionProvider", 1) > 0 for entry in data["timed"])
    for entry in data["timed"]:  # as if half of what is changed were saved
        layers = sum(part["groups"] for part in entry["parts"])
        entry |= dict.fromkeys(("ratio", "low_95", "high_95"), 1 - 0.2 * layers)
    out.write_text(json.dumps(data))
    result = lr.compress(tmp_path / "model.onnx", budget={"latency": 0.7}, target=str(out), **QUICK)
    (budget,) = result.report.budgets
    assert (budget.measured, budget.met, budget.reached) == (False, True, budget.predicted)
    assert 0.5 < budget.reached <= 0.7
    text = "\n".join(part for part in render_report(result.report) if isinstance(part, str))
    assert f"latency: asked 0.7, predicted {budget.reached:.4g}, not measured - [green]met[/]" in text
    assert "it was not measured there" in text
    assert "--pair" in text
    assert result.report.to_dict()["budgets"][0]["measured"] is False
    data_of = tiny.save_data(tmp_path / "samples.npz", x=normal(4, 16, 12, 12))
    with pytest.raises(LowRankError, match=r"is timed in floating point, and quantize int8 was given"):
        quantized = {"quantize": "int8", "calibrate": data_of}
        lr.compress(tmp_path / "model.onnx", budget={"latency": 0.7}, target=str(out), **quantized, **QUICK)


def test_mixes_go_along_and_are_heard(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(net().SerializeToString())
    lr.bundle(tmp_path / "model.onnx", tmp_path / "out.zip", **QUICK)
    zipfile.ZipFile(tmp_path / "out.zip").extractall(tmp_path / "bundle")
    module, out, reached = script(tmp_path / "bundle"), tmp_path / "phone.json", []
    made_up(module, lambda number: 0.8)
    assert module.main(["--out", str(out)]) == 0
    data = json.loads(out.read_text())
    several = [entry for entry in data["timed"] if len(entry["parts"]) > 1]
    assert len(several) == probes.MIXES
    for ratio in (0.4, 0.6):  # three kinds save a fifth each alone: 0.6 in all, and together this
        for entry in several:
            entry |= dict.fromkeys(("ratio", "low_95", "high_95"), ratio)
        out.write_text(json.dumps(data))
        plan = lr.analyze(tmp_path / "model.onnx", budget={"latency": 0.8}, target=str(out), **QUICK)
        reached.append(plan.error)
    assert reached[0] < reached[1], "where savings do not add up, the same share costs more"


def test_a_run_that_was_interrupted_goes_on(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, out = script(bundle), tmp_path / "phone.json"

    def ratio(number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return 0.5

    made_up(module, ratio)
    assert module.main(["--out", str(out)]) == 130
    assert "start it again to go on" in capsys.readouterr().err
    before = json.loads(out.read_text())["timed"]
    assert len(before) == 2
    asked = made_up(module, lambda number: 0.75)
    assert module.main(["--out", str(out)]) == 0
    after = json.loads(out.read_text())
    assert after["timed"][:2] == before
    assert len(asked) == after["models"] - 2
    assert [entry["ratio"] for entry in after["timed"]][2:] == [0.75] * len(asked)
    assert list(tmp_path.glob("*.part")) == []
    # and what is of other options is left alone
    assert module.main(["--out", str(out), "--threads", "2"]) == 2
    assert "of another bundle, device or options" in capsys.readouterr().err
    assert json.loads(out.read_text()) == after


def test_a_model_that_the_device_refuses_is_told_and_left_out(bundle: Path, tmp_path: Path) -> None:
    module, out = script(bundle), tmp_path / "phone.json"

    def ratio(number: int) -> float:
        if number == 0:
            raise RuntimeError("no such kernel\nand more")
        return 0.5

    made_up(module, ratio)
    assert module.main(["--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["timed"][0]["error"] == "no such kernel"
    plan = lr.analyze(tmp_path / "model.onnx", budget={"latency": 0.9}, target=str(out), **QUICK)
    assert any("1 models were not timed" in note for note in plan.notes)


def test_a_provider_that_is_absent_or_runs_nothing_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(bundle)
    assert module.main(["--provider", "nnapi", "--out", str(tmp_path / "o.json")]) == 2
    assert "provider 'nnapi' is not in this build of ONNX Runtime" in capsys.readouterr().err
    assert module.main(["--provider-option", "x", "--out", str(tmp_path / "o.json")]) == 2
    assert "KEY=VALUE was expected" in capsys.readouterr().err
    module.provider_of = lambda name: "AzureExecutionProvider"  # runs no ordinary nodes
    if "AzureExecutionProvider" in ort.get_available_providers():
        assert module.main([*OPTIONS, "--provider", "azure", "--out", str(tmp_path / "o.json")]) == 2
        assert "runs nothing of the original" in capsys.readouterr().err


def test_threads_are_those_that_the_bundle_was_made_for(tmp_path: Path) -> None:
    model = tiny.save(tiny.classifier(), tmp_path / "model.onnx")
    lr.bundle(model, tmp_path / "out.zip", methods="svd", align=1, jobs=1, threads=2)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        archive.extractall(tmp_path / "bundle")
    module = script(tmp_path / "bundle")
    made_up(module, lambda number: 0.5)
    for options, threads in (([], 2), (["--threads", "3"], 3)):
        out = tmp_path / f"{threads}.json"
        assert module.main([*options, "--out", str(out)]) == 0
        assert json.loads(out.read_text())["environment"]["threads"] == threads


def test_a_provider_of_a_library_runs_on_its_most_special_device(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, registered, used = script(bundle), {}, []
    kinds = [SimpleNamespace(ep_name="Odd", device=SimpleNamespace(type=f"T.{kind}")) for kind in ("CPU", "NPU", "GPU")]
    monkeypatch.setattr(ort, "register_execution_provider_library", registered.__setitem__)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["Odd", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "get_ep_devices", lambda: kinds)
    monkeypatch.setattr(ort, "SessionOptions", lambda: SimpleNamespace(
        add_session_config_entry=lambda *pair: None,
        add_provider_for_devices=lambda devices, options: used.append((devices, options)),
    ))  # fmt: skip
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **chosen: SimpleNamespace(chosen=chosen, run=print)
    )
    made_up(module, lambda number: 0.5)
    words = ["--provider", "odd", "--provider-option", "a=b", "--out", str(tmp_path / "o.json")]
    assert module.main([*words, "--provider-library", f"Odd={tmp_path}/lib.so"]) == 0
    assert registered == {"Odd": f"{tmp_path}/lib.so"} and used[0] == ([kinds[1]], {"a": "b"})
    kinds.clear()
    assert module.main([*words[:-1], str(tmp_path / "p.json"), "--provider-library", f"Odd={tmp_path}/lib.so"]) == 2
    assert "Odd finds no device here" in capsys.readouterr().err


def test_a_library_that_is_none_is_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--provider", "odd", "--out", str(tmp_path / "o.json"), "--provider-library"]
    assert script(bundle).main([*words, "odd"]) == 2
    assert "NAME=PATH was expected" in capsys.readouterr().err
    (tmp_path / "lib.so").write_bytes(b"none")
    assert script(bundle).main([*words, f"odd={tmp_path}/lib.so"]) == 2
    said = capsys.readouterr().err
    assert "lib.so cannot be loaded as the library of odd" in said and said.count("\n") == 1


def test_a_pair_of_models_is_timed_on_its_own(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "model.onnx")
    assert script(bundle).main([*OPTIONS, "--pair", model, model]) == 0
    assert "latency of the result over the original's: " in capsys.readouterr().out
    assert script(bundle).main(["--pair", model, str(tmp_path / "none.onnx")]) == 2


def test_times_of_another_model_are_refused(bundle: Path, tmp_path: Path) -> None:
    out, _ = measured(bundle, tmp_path / "phone.json")
    with pytest.raises(LowRankError, match=r"phone.json was measured of another model.*make a bundle of this one"):
        lr.compress(tiny.classifier(), budget={"latency": 0.9}, target=str(out))
    with pytest.raises(LowRankError, match=r"was measured of another model"):
        shape = "x:1,16,14,14"
        lr.compress(residual_of_any_size(), budget={"latency": 0.9}, target=str(out), input_shape=shape)


def residual_of_any_size() -> onnx.ModelProto:
    model = residual()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "size"
    return model


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "holds no times"),
        ('{"bundle": "onnx-lowrank"}', "holds no times"),
        ('{"results": "onnx-lowrank", "format": 9}', "is of format 9: 1 was expected"),
        ('{"results": "onnx-lowrank", "format": 1}', "is damaged"),
    ],
)
def test_a_file_that_holds_no_results_is_one_line(
    tmp_path: Path, content: str | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "phone.json", tiny.save(tiny.classifier(), tmp_path / "model.onnx")
    if content is not None:
        path.write_text(content)
    line = ["compress", str(model), str(tmp_path / "o.onnx"), "--budget", "latency=0.5", "--target", str(path)]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("change", [{"ratio": 0}, {"ratio": "x"}, {"parts": []}, {"high_95": -1}])
def test_damaged_results_are_one_line(bundle: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out, data = measured(bundle, tmp_path / "phone.json")
    data["timed"][0] |= change
    out.write_text(json.dumps(data))
    with pytest.raises(LowRankError, match="is damaged"):
        lr.analyze(tmp_path / "model.onnx", budget={"latency": 0.5}, target=str(out))


def test_times_of_what_the_provider_did_not_run_are_none_of_it(bundle: Path, tmp_path: Path) -> None:
    out, data = measured(bundle, tmp_path / "phone.json")
    data["environment"]["provider"] = "NnapiExecutionProvider"
    data["placement"] = {"NnapiExecutionProvider": 3}
    for entry in data["timed"]:
        entry["placement"] = {"CPUExecutionProvider": 3}
    data["timed"][0]["placement"] = {"NnapiExecutionProvider": 3}
    out.write_text(json.dumps(data))
    found = read_results(out)
    assert (len(found.models), found.missing) == (1, len(data["timed"]) - 1)
    for change in ({"placement": {"CPUExecutionProvider": 3}}, {"timed": data["timed"][1:]}):
        out.write_text(json.dumps(data | change))
        with pytest.raises(LowRankError, match="NnapiExecutionProvider ran nothing of the models there"):
            read_results(out)


def test_times_of_a_simulator_are_refused(bundle: Path, tmp_path: Path) -> None:
    out, data = measured(bundle, tmp_path / "phone.json")
    data["environment"] |= {
        "provider": "QNNExecutionProvider",
        "system": "Linux-6.1-aarch64-with-glibc2.36",
        "machine": "aarch64",
    }
    data["placement"] = {"QNNExecutionProvider": 3}
    for entry in data["timed"]:
        entry["placement"] = data["placement"]
    out.write_text(json.dumps(data))
    assert read_results(out).models
    data["environment"]["system"] = "Linux-6.1-x86_64-with-glibc2.36"
    out.write_text(json.dumps(data))
    with pytest.raises(LowRankError, match="QNNExecutionProvider is a simulator on that machine"):
        read_results(out)
    data["environment"] |= {"system": "Windows-11-10.0.22631-SP0", "machine": "AMD64"}
    out.write_text(json.dumps(data))
    with pytest.raises(LowRankError, match="QNNExecutionProvider is a simulator on that machine"):
        read_results(out)


def test_results_of_other_batches_are_refused(bundle: Path, tmp_path: Path) -> None:
    out, _ = measured(bundle, tmp_path / "phone.json")
    with pytest.raises(LowRankError, match="measured on batches of 1, and batch_size 8 was given"):
        lr.analyze(tmp_path / "model.onnx", budget={"latency": 0.5}, target=str(out), batch_size=8)


def test_a_bundle_is_written_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny.save(tiny.classifier(), tmp_path / "model.onnx"), tmp_path / "o.zip"
    assert main(["bundle", str(model), str(out), "--methods", "svd", "--align", "1", "--jobs", "1"]) == 0
    assert "models and the original" in capsys.readouterr().out
    assert zipfile.ZipFile(out).namelist()[:3] == ["bench.py", "manifest.json", "original.onnx"]
    small = tiny.save(tiny.too_small(), tmp_path / "small.onnx")
    assert main(["bundle", str(small), str(tmp_path / "s.zip")]) == 2
    assert "there is nothing to time" in capsys.readouterr().err
    assert main(["bundle", str(model), str(model)]) == 2
    assert main(["bundle", str(model), str(tmp_path / "s.zip"), "--target", "mnn"]) == 2
    assert "a bundle runs ONNX Runtime on the device" in capsys.readouterr().err
    assert not (tmp_path / "s.zip").exists()

"""MNN: the same numbers as ONNX Runtime, times of it where it is asked for, and one line where it is not there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import onnx_lowrank as lr
from onnx_lowrank.cache import FOLDER
from onnx_lowrank.cli import main
from onnx_lowrank.latency import engines, probes
from onnx_lowrank.runtime import MNN, MNNSession, Session, disagreement, mnn
from onnx_lowrank.types import LowRankError
from tests import tiny
from tests.helpers import normal
from tests.latency.test_latency import residual


def test_without_mnn_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mnn, "find_spec", lambda name: None)
    mnn._mnn.cache_clear()
    model = tiny.save(tiny.classifier(), tmp_path / "model.onnx")
    line = ["compress", str(model), str(tmp_path / "o.onnx"), "--budget", "macs=0.5", "--target", "mnn"]
    assert main(line) == 2
    assert capsys.readouterr().err.strip() == (
        "onnx-lowrank: target mnn needs MNN, which is not installed: pip install 'onnx-lowrank[mnn]'"
    )
    assert not (tmp_path / "o.onnx").exists()


def test_outputs_are_compared_with_a_tolerance() -> None:
    one = np.array([1.0, -10.0])
    assert disagreement([one], [one + 0.5 * mnn.TOLERANCE]) == ""
    assert "output 1 differs on MNN from ONNX Runtime by 0.5" in disagreement([one, one], [one, one * 2])
    assert "has 2 elements on MNN and 3" in disagreement([one], [np.zeros(3)])
    assert disagreement([np.array([math.nan])], [np.ones(1)])
    assert disagreement([np.zeros(0)], [np.zeros(0)]) == ""


@pytest.fixture
def residual_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("MNN")
    monkeypatch.setenv(FOLDER, "")
    mnn._mnn.cache_clear()
    return tiny.save(residual(), tmp_path / "model.onnx")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_on_mnn_computes_what_onnx_runtime_does(
    residual_path: Path, tmp_path: Path, batch: int, capfd: pytest.CaptureFixture[str]
) -> None:
    feeds = {"x": normal(batch, 16, 12, 12)}
    session = MNNSession(residual_path, {"x": feeds["x"].shape}, ("y",), tmp_path)
    assert disagreement(session.run(feeds), Session(residual_path).run(feeds)) == ""
    other = {"x": normal(batch, 16, 12, 12, seed=5)}
    assert disagreement(session.run(other), Session(residual_path).run(other)) == ""
    assert session.run(feeds)[0].shape == (batch, 10)
    assert capfd.readouterr().out == "", "MNN prints, and what it prints is kept from the output"
    assert list(tmp_path.glob("*.mnn")) == []


def test_a_model_that_mnn_does_not_take_is_one_line(residual_path: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(LowRankError, match=r"MNN cannot convert the model: .*read onnx model failed"):
        MNNSession(tmp_path / "junk.onnx", {"x": (1, 16, 12, 12)}, ("y",), tmp_path)
    with pytest.raises(LowRankError, match="MNN cannot load the model"):
        MNNSession(residual_path, {"x": (1, 16, 12, 12)}, ("nothing",), tmp_path)


def test_the_latency_that_is_reported_is_that_of_mnn(residual_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MODELS", 2)
    monkeypatch.setattr(probes, "MIXES", 1)
    monkeypatch.setattr(engines, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(engines.OnMNN, "ratio", lambda self, model, **options: (0.6, 0.0))
    result = lr.compress(residual_path, budget={"latency": 0.9}, target="mnn", methods="channel_svd", align=4, jobs=1)
    (latency,) = result.report.latency
    assert latency.provider == MNN
    assert latency.original_ms > 0
    (budget,) = result.report.budgets
    assert budget.measured
    assert budget.reached == pytest.approx(1 / latency.speedup)
    assert result.plan.original.latency_ms > 0
    assert not any("say nothing of mnn" in note for note in result.report.notes)


def test_no_figure_is_given_where_mnn_computes_otherwise(residual_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "disagreement", lambda actual, expected: "output 0 is wrong")
    with pytest.raises(LowRankError, match="target mnn computes the model otherwise: output 0 is wrong"):
        lr.verify(residual_path, residual_path, target="mnn")
    told = iter(["", "output 0 is wrong"])
    monkeypatch.setattr(engines, "disagreement", lambda actual, expected: next(told))
    check = lr.verify(residual_path, residual_path, target="mnn")
    assert not check.met
    assert math.isnan(check.latency[0].speedup)
    assert any("no time is given for MNN: output 0 is wrong" in note for note in check.notes)

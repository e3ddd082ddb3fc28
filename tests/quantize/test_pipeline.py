"""--quantize int8 as users run it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lowrank as lr
from models import DIGITS, DIGITS_CALIBRATE, DIGITS_TEST
from onnx_lowrank.cli import main
from onnx_lowrank.types import LowRankError

DATA = {"calibrate": str(DIGITS_CALIBRATE), "evaluate": str(DIGITS_TEST)}


@pytest.fixture(scope="module")
def small() -> lr.Result:
    return lr.compress(
        str(DIGITS), budget={"macs": 0.6}, methods="channel_svd", quantize="int8", include=("conv4", "block*"), **DATA
    )


def test_a_decomposition_comes_out_in_eight_bits(small: lr.Result) -> None:
    report = small.report
    assert report.met and report.layers
    assert report.accuracy.drop <= 0.01
    kinds = {tensor.data_type for tensor in small.model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    assert report.compressed.size_bytes < 0.3 * report.original.size_bytes
    assert report.compressed.macs == pytest.approx(0.6 * report.original.macs, rel=0.05)
    assert any(note.startswith("INT8 (QDQ") for note in small.plan.notes)


def test_the_figures_are_those_of_the_quantised_model(small: lr.Result, tmp_path: Path) -> None:
    small.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size == small.report.compressed.size_bytes
    seen = lr.verify(str(DIGITS), str(tmp_path / "small.onnx"), evaluate=str(DIGITS_TEST))
    assert seen.accuracy.compressed == small.report.accuracy.compressed


def test_int8_alone_needs_no_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "int8.onnx"
    data = ["--calibrate", DATA["calibrate"], "--evaluate", DATA["evaluate"]]
    assert main(["compress", str(DIGITS), str(out), "--quantize", "int8", *data]) == 0
    assert "INT8 (QDQ" in " ".join(capsys.readouterr().out.split())
    assert out.stat().st_size < 0.35 * DIGITS.stat().st_size


def test_a_quantised_model_is_refused(small: lr.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.save(tmp_path / "small.onnx")
    given = [str(tmp_path / "small.onnx"), str(tmp_path / "again.onnx"), "--quantize", "int8"]
    assert main(["compress", *given, "--calibrate", DATA["calibrate"]]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize(
    ("options", "said"), [({"quantize": "int8"}, "needs samples"), ({"quantize": "int4"}, "one of none, int8")]
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(LowRankError, match=said):
        lr.compress(str(DIGITS), budget={"macs": 0.5}, **options)


def test_the_promise_is_held_by_the_quantised_model() -> None:
    result = lr.compress(
        str(DIGITS), max_drop=0.02, objective="macs", methods="channel_svd", include=("conv4",), quantize="int8", **DATA
    )
    assert result.report.met
    assert result.report.accuracy.drop_upper_95 <= 0.02
    assert any(node.op_type == "QuantizeLinear" for node in result.model.graph.node)


def test_latency_is_planned_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lowrank.latency.table.TABLE_SECONDS", 3.0)
    options = {"methods": "channel_svd", "include": ("conv4", "block*"), "quantize": "int8", **DATA}
    plan = lr.analyze(str(DIGITS), budget={"latency": 0.9}, **options)
    dense = [c for c in plan.choices if c.dense]
    assert plan.ratio("latency") <= 0.9
    assert all(np.isfinite(c.cost.latency_ms) for c in dense)


def test_a_budget_on_size_counts_the_bytes_of_the_quantised_model() -> None:
    options = {"methods": "channel_svd", "include": ("conv4", "block*"), "align": 8, "quantize": "int8", **DATA}
    result = lr.compress(str(DIGITS), budget={"size": 0.2}, **options)
    assert result.report.met
    size = result.report.compressed.size_bytes / result.report.original.size_bytes
    assert 0.12 < size <= 0.2  # a quarter of the bytes came without any decomposition


def test_what_int8_alone_loses_is_said_and_held_against_it() -> None:
    result = lr.compress(
        str(DIGITS), max_drop=1e-9, objective="macs", metric="cosine", quantize="int8", exclude=("*",), **DATA
    )
    assert not result.met and not result.report.unchanged
    assert any(note.startswith("INT8 alone loses") for note in result.plan.notes)
    assert any(note.startswith("INT8 (QDQ") for note in result.plan.notes)


def test_verify_compares_models_as_they_are() -> None:
    with pytest.raises(LowRankError, match="leave out quantize"):
        lr.verify(str(DIGITS), str(DIGITS), quantize="int8", **DATA)

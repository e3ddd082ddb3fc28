"""Results in the format of mobile builds: the same function, checked before anything has its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_lowrank as lr
from onnx_lowrank.cli import main
from onnx_lowrank.runtime import Session, convert_to_ort, ort_format
from onnx_lowrank.types import LowRankError
from tests import tiny
from tests.helpers import assert_close, run

QUICK = {"methods": "svd", "align": 1, "jobs": 1}


@pytest.mark.parametrize("target", ["cpu", "nnapi"])
def test_a_name_that_ends_in_ort_is_that_format_and_gives_the_same(target: str, tmp_path: Path) -> None:
    out, x = tmp_path / "small.ort", {"x": tiny.inputs(5)}
    result = lr.compress(tiny.classifier(), budget={"macs": 0.5}, target=target, **QUICK)
    result.save(out)
    assert out.read_bytes()[4:8] == b"ORTM"
    assert_close(Session(out).run(x), run(result.model, x), 1e-5)
    assert os.listdir(tmp_path) == ["small.ort"]


def test_a_file_that_computes_something_else_is_never_written(tmp_path: Path, monkeypatch: Any) -> None:
    result = lr.compress(tiny.classifier(), budget={"macs": 0.5}, **QUICK)
    weight = next(t for t in result.model.graph.initializer if len(t.dims) == 2)

    def damaged(model: Path, out: Path, *, compiled: bool) -> None:
        proto = onnx.load(str(model))
        (tensor,) = (t for t in proto.graph.initializer if t.name == weight.name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(tensor), weight.name))
        onnx.save(proto, model.with_name("damaged.onnx"))
        convert_to_ort(model.with_name("damaged.onnx"), out, compiled=compiled)

    monkeypatch.setattr(ort_format, "convert_to_ort", damaged)
    with pytest.raises(
        LowRankError, match=r"output 0 of the model changes in the .ort format: save small.onnx instead"
    ):
        result.save(tmp_path / "small.ort")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.array([1.0, np.nan, 2.0], "float32"), np.array([1, 2, 3])])
def test_the_comparison_takes_equal_outputs_and_no_others(value: np.ndarray) -> None:
    ort_format._compare([value], [value.copy()], Path("a.ort"))
    changed = value.copy()
    changed[2] += 1
    with pytest.raises(LowRankError, match="output 0"):
        ort_format._compare([value], [changed], Path("a.ort"))


def test_what_is_not_met_is_kept_as_onnx(tmp_path: Path) -> None:
    model = tiny.save(tiny.classifier(), tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    line = f"compress {model} {tmp_path}/out/small.ort --budget macs=0.01 --methods svd --align 1 --jobs 1 --quiet"
    assert main(line.split()) == 1
    assert os.listdir(tmp_path / "out") == ["small.unmet.onnx"]


def test_a_folder_that_is_not_there_is_told_as_for_onnx(tmp_path: Path) -> None:
    result = lr.compress(tiny.classifier(), budget={"macs": 0.5}, **QUICK)
    with pytest.raises(LowRankError, match="does not exist: make it first"):
        result.save(tmp_path / "nowhere" / "small.ort")

"""The ONNX checker, by path."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnx_lowrank.graph.check import check_model
from tests.helpers import normal, parse


def test_a_valid_model_has_no_objection(tmp_path: Path) -> None:
    onnx.save(parse("g (float[3,5] x) => (float[m,n] y) { y = MatMul (x, w) }", w=normal(5, 4)), tmp_path / "m.onnx")
    assert check_model(tmp_path / "m.onnx") is None


def test_an_objection_is_one_line_that_says_what_is_wrong(tmp_path: Path) -> None:
    onnx.save(parse("g (float[3,5] x) => (float[m,n] y) { y = MatMul (x, nothing) }"), tmp_path / "m.onnx")
    objection = check_model(tmp_path / "m.onnx")
    assert objection is not None
    assert "nothing" in objection
    assert "\n" not in objection

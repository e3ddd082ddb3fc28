"""A whole compression, from file to file, keeps every field of a model that it does not replace, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.external_data_helper import uses_external_data

import onnx_lowrank as lr
from onnx_lowrank.graph import datafile
from tests.rich import LAYERS, rich, untouched


def compressed(source: Path, **options: Any) -> onnx.ModelProto:
    """What is written for the model of a file, its weights read in."""
    chosen: dict[str, Any] = {"budget": {"params": 0.9}, "methods": ["tucker2"], "include": ["conv"], "align": 1}
    shape = {"x": (2, 4, 6, 6)}
    result = lr.compress(source, **{**chosen, "jobs": 1, "input_shape": shape, **options})
    result.save(source.with_name("out.onnx"))
    return onnx.load(source.with_name("out.onnx"))


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    onnx.save(rich(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Every tensor that may be is in a file of its own."""
    path = tmp_path / "m.onnx"
    onnx.save(rich(), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    stored = onnx.load(path, load_external_data=False).graph.initializer
    assert {"v", "eight", "sixteen", "unread_int4"} <= {t.name for t in stored if uses_external_data(t)}
    return path


def test_a_model_in_one_file(inside: Path) -> None:
    after = compressed(inside)
    assert [node.name for node in after.graph.node][1:4] == ["conv_lowrank_0", "conv_lowrank_1", "conv"]
    assert untouched(after, "conv") == untouched(rich(), "conv")


def test_a_model_whose_tensors_are_in_files_of_their_own(outside: Path) -> None:
    before = onnx.load(outside)
    assert untouched(compressed(outside), "conv") == untouched(before, "conv")


def test_a_model_larger_than_memory_is_to_hold(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = onnx.load(outside)
    monkeypatch.setattr(datafile, "LARGE_BYTES", 0)
    assert untouched(compressed(outside), "conv") == untouched(before, "conv")


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_where_nothing_is_replaced_the_whole_model_is_the_same(place: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(place)
    before = onnx.load(path)
    after = compressed(path, exclude=LAYERS, include=[])
    assert after.SerializeToString() == before.SerializeToString()

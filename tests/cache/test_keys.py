"""Names of results: the same for the same, another for anything that a result depends on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.cache import environment, fingerprint, keys
from onnx_lowrank.cache.keys import member_key
from onnx_lowrank.candidates import Group
from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.layer_tasks import InMemory
from onnx_lowrank.types import ConvSpec, Layer, LayerStatistics

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def layer(weight: np.ndarray = WEIGHT, **changes: Any) -> Layer:
    made = Layer("a", "Gemm", ConvSpec(weight.shape), InMemory(weight), weight.dtype, (), 1, "w")
    return replace(made, **changes)


def test_no_two_values_have_one_name() -> None:
    values = [
        None, True, 1, 1.0, "1", b"1", "", (), ((),), (1,), (1, 2), ((1, 2),), ((1,), 2), "12", ("1", "2"), {"1": 2},
        0.1, 0.1 + 1e-17, -0.0, 0.0, np.arange(4), np.arange(4.0), np.arange(4).reshape(2, 2),
        np.arange(4).reshape(2, 2).T, np.arange(4).reshape(2, 2).T.copy(), np.dtype("float32"), Path("1"),
        ConvSpec((4, 3)), ConvSpec((4, 3), group=2), Group((layer(),)), Group((layer(),), joint=True),
        layer(), layer(name="b"), layer(WEIGHT + 1), layer(WEIGHT.astype(np.float64)), layer(batch=2),
        LayerStatistics(np.zeros(2), np.eye(2), 3), LayerStatistics(np.zeros(2), np.eye(2), 4),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in values}) == len(values)


def test_a_name_does_not_depend_on_where_a_value_comes_from() -> None:
    assert fingerprint([1, 2]) == fingerprint((np.int64(1), 2))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(layer()) == fingerprint(layer(WEIGHT.copy()))


def test_what_cannot_be_told_apart_has_no_name() -> None:
    for value in (object(), lambda: WEIGHT, {1, 2}, int, layer(read_weight=lambda: WEIGHT)):
        with pytest.raises(TypeError, match="cannot be told from another"):
            fingerprint(value)


def test_names_are_those_of_another_process_too() -> None:
    code = (
        "from tests.cache.test_keys import layer; from onnx_lowrank.cache import environment, fingerprint; "
        "print(fingerprint(layer(), environment()))"
    )
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    seen = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True, capture_output=True, text=True
    )
    assert seen.stdout.strip() == fingerprint(layer(), environment())


def test_a_changed_source_makes_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.code.__wrapped__()
    (tmp_path / "linalg.py").write_text("x = 1\n")
    monkeypatch.setattr(keys, "PACKAGE", tmp_path)
    one = keys.code.__wrapped__()
    (tmp_path / "linalg.py").write_text("x = 2\n")
    two = keys.code.__wrapped__()
    (tmp_path / "linalg.py").rename(tmp_path / "algebra.py")
    assert len({before, one, two, keys.code.__wrapped__()}) == 4


def test_the_environment_names_the_libraries_that_decide_about_the_last_bits() -> None:
    assert set(environment()) == {"onnx-lowrank", "numpy", "scipy", "linear algebra", "instructions"}
    assert all(environment()[name] for name in ("onnx-lowrank", "numpy", "scipy"))


def test_a_decomposition_of_ones_own_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fingerprint(member_key(DECOMPOSITIONS["cp3"])) != fingerprint(member_key(DECOMPOSITIONS["cp4"]))
    settings = replace(DECOMPOSITIONS["cp3"], algorithm="tpm")  # type: ignore[type-var]
    assert fingerprint(member_key(DECOMPOSITIONS["cp3"])) != fingerprint(member_key(settings))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_mine.py").write_text("class Mine:\n    rank = 1\n")
    import of_mine  # type: ignore[import-not-found]

    one = fingerprint(member_key(of_mine.Mine()))
    (tmp_path / "of_mine.py").write_text("class Mine:\n    rank = 2\n")
    assert fingerprint(member_key(of_mine.Mine())) != one
    (tmp_path / "of_mine.py").unlink()
    with pytest.raises(TypeError):
        fingerprint(member_key(of_mine.Mine()))

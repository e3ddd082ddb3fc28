"""The report as data."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_lowrank.report import data
from onnx_lowrank.report.data import BudgetResult, Report, Size, environment, package_version, plain
from onnx_lowrank.types import Skip
from onnx_lowrank.verification.verify import Accuracy


def report(*budgets: BudgetResult, **more: Any) -> Report:
    accuracy = Accuracy("mine.py:f", 1.0, 0.5, 0.5, math.nan, 3, {"cosine": 0.5})
    size = Size(1, 2, 3)
    return Report(size, size, (), (Skip("a", "Relu", "why"),), budgets, accuracy, (), {}, {}, ("note",), **more)


def test_what_is_no_number_is_null_at_any_depth() -> None:
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], 3: {"b": np.float64("nan")}, "c": True, "d": None, "e": "nan"}
    expected = {"a": [1.5, None, [None, None]], "3": {"b": None}, "c": True, "d": None, "e": "nan"}
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)


def test_a_report_as_json_is_valid_and_whole() -> None:
    made = report(BudgetResult("drop", 0.1, math.nan, False), config={"seed": 1})
    read = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert read["accuracy"]["drop_upper_95"] is None
    budget = {"metric": "drop", "asked": 0.1, "reached": None, "met": False, "predicted": None, "measured": True}
    assert read["budgets"] == [budget]
    assert read["skips"] == [{"layer": "a", "op_type": "Relu", "reason": "why"}]
    assert read["met"] is False
    assert read["notes"] == ["note"]
    assert read["version"] == package_version()


@pytest.mark.parametrize(("each", "met"), [((), True), ((True, True), True), ((True, False), False)])
def test_a_report_is_met_where_every_budget_is(each: tuple[bool, ...], met: bool) -> None:
    assert report(*(BudgetResult("macs", 0.5, 0.5, one) for one in each)).met is met


def test_what_was_not_met_is_said_in_words() -> None:
    budgets = BudgetResult("macs", 0.5, 0.49, True), BudgetResult("latency", 0.5, 0.61234, False)
    assert report(*budgets).unmet == ("latency 0.6123 was reached, 0.5 asked for",)
    accuracy = Accuracy("cosine", 1.0, 0.9, 0.1, float("inf"), 4, {}, broken=2)
    assert replace(report(), accuracy=accuracy).unmet == ("2 sample(s) give NaN or infinity",)


def test_the_environment_names_what_computes() -> None:
    found = environment()
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["numpy"] == np.__version__
    assert {"python", "machine", "processor", "onnx", "scipy", "onnx-graphsurgeon"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


def test_a_package_under_another_name_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(data, "version", missing)
    assert package_version() == "unknown"
    found = environment()
    assert found["onnx"] == "unknown"
    assert re.match(r"\d+\.\d+", found["onnxruntime"])

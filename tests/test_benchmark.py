"""The comparison with other tools: which shares it tries, what it calls good enough, and what it counts by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lowrank as lr
from tests.helpers import arrays
from tools.benchmark import measure
from tools.benchmark.shares import Result, holds, least, scan
from tools.benchmark.table import row
from tools.benchmark.ways import WAYS

DIGITS = Path(lr.__file__).parents[1] / "models" / "digits.onnx"
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def result(share: float, loss: float = 0.0, agreement: float = 0.9) -> Result:
    return {"macs": int(1000 * share), "loss": loss, "agreement": agreement}


@pytest.mark.parametrize(
    ("given", "fine"),
    [
        (result(1, loss=0.01, agreement=0.5), True),
        (result(1, loss=0.012, agreement=0.988), False),
        (result(1, loss=0.012, agreement=0.99), True),
        (result(1, loss=-0.2, agreement=0.0), True),
        ({"failed": "no"}, False),
    ],
)
def test_a_result_holds_by_its_loss_or_by_its_agreement(given, fine):
    assert holds(given) is fine


@pytest.mark.parametrize("known", [0.7, 0.65])
@pytest.mark.parametrize("last", [0.95, *GRID])
def test_bisection_finds_the_least_share_and_tries_few(last, known):
    tried: dict[str, Result] = {}

    def at(share: float) -> Result:
        return tried.setdefault(f"{share:g}", result(share, loss=0.0 if share >= last else 0.5))

    scan(True, at, GRID, known)
    assert len(tried) <= 3  # that known among them
    expected = "none" if last > GRID[0] else f"{min(share for share in {*GRID, known} if share >= last):g}"
    assert (least(tried, 1000) or ("none",))[0] == expected


def test_a_scan_from_above_goes_past_two_misses_and_ends_at_three():
    tried = []

    def at(share: float) -> Result:
        tried.append(share)
        return result(share, loss=0.0 if share == 0.7 else 0.5)

    scan(False, at, (*GRID, 0.3, 0.2), 0.5)
    assert tried == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


def test_what_has_no_fewer_macs_than_the_original_saves_nothing():
    assert least({"0.95": result(1.0)}, 1000) is None


def test_macs_are_counted_as_the_package_counts_them():
    model = onnx.load(DIGITS)
    dims = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    known = lr.analyze(DIGITS, budget={"macs": 0.9})
    counted = measure.macs(model, np.zeros(dims, np.float32))
    assert counted == known.original.macs


def test_a_way_that_fails_is_a_row_that_says_so():
    assert "failed: no wheel for this Python" in row("peer", {"failed": "no wheel for this Python"}, {}, None)


def test_every_way_names_a_module_that_is_there():
    folder = Path(measure.__file__).parent
    assert all((folder / f"{way.place.split(':')[0]}.py").exists() for way in WAYS.values())


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way.peer and way.shares and not way.dear])
def test_a_way_written_after_its_paper_makes_a_model_of_the_share(name, tmp_path):
    samples = DIGITS.with_name("digits_calibrate.npz")
    WAYS[name].load()(DIGITS, samples)(0.6, tmp_path / "small.onnx")
    picture = arrays(samples)["input"][:1]
    before, after = (measure.macs(onnx.load(path), picture) for path in (DIGITS, tmp_path / "small.onnx"))
    assert 0.4 < after / before <= 0.6

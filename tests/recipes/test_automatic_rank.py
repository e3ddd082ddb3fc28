"""The recipe of Kim & Kyung: what it lays down, the line it fits, and the cost that it ends at."""

from __future__ import annotations

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.recipes import find_recipe
from onnx_lowrank.recipes.automatic_rank import line

EVALUATE = str(models.DIGITS).replace("digits.onnx", "digits_test.npz")
CALIBRATE = str(models.DIGITS).replace("digits.onnx", "digits_calibrate.npz")
RECIPE = {"recipe": "automatic_rank"}


def test_the_first_layer_goes_by_channels_the_others_by_space_and_products_by_rows() -> None:
    plan = lr.analyze(models.DIGITS, budget={"macs": 0.4}, **RECIPE)
    methods = [choice.decomposition for choice in plan.choices if not choice.dense]
    assert set(methods) <= {"channel_svd", "spatial_svd", "svd"}
    assert "spatial_svd" in methods
    assert "channel_svd" not in methods[1:]
    assert plan.ratio("macs") <= 0.4
    assert any(rank % 8 for choice in plan.choices for rank in choice.rank)  # every rank is tried, not only blocks


@pytest.mark.parametrize("solver", ["enc_map", "enc_model", "enc_inf"])
def test_a_budget_is_met_by_every_solver(solver: str) -> None:
    result = lr.compress(
        models.DIGITS, budget={"macs": 0.5}, solver=solver, calibrate=CALIBRATE, evaluate=EVALUATE, **RECIPE
    )
    assert result.met
    # within the band of the space, which every rank is there for
    assert result.report.compressed.macs / result.report.original.macs > 0.45


def test_the_measured_metric_and_the_combined_one_need_samples() -> None:
    for damage in ("accuracy", "combined"):
        with pytest.raises(lr.LowRankError, match=f"damage {damage} .* needs samples: give calibrate "):
            lr.compress(models.DIGITS, budget={"macs": 0.5}, damage=damage, **RECIPE)
        result = lr.compress(
            models.DIGITS, budget={"macs": 0.5}, damage=damage, calibrate=CALIBRATE, evaluate=EVALUATE, **RECIPE
        )
        assert result.met


def test_the_cost_is_stepped_down_until_the_accuracy_does_not_hold() -> None:
    result = lr.compress(models.DIGITS, max_drop=0.03, objective="macs", evaluate=EVALUATE, **RECIPE)
    assert result.met
    steps = [note for note in result.report.notes if note.startswith("macs 0.")]
    assert len(steps) > 3
    assert "predicted" not in steps[0]
    assert all("predicted" in step and "measured" in step for step in steps[1:])
    share = result.report.compressed.macs / result.report.original.macs
    costs = [float(step.split()[1].rstrip(":")) for step in steps]
    assert share <= max(costs)
    # no cost that was tried and is lower held
    assert share == pytest.approx(min(c for c in costs if c >= share - 0.01), abs=0.02)


def test_the_line_goes_through_the_last_measurements_and_never_falls() -> None:
    assert line([(1.0, 0.5), (0.9, 0.9), (0.8, 0.8), (0.7, 0.7)])(0.6) == pytest.approx(0.6)
    falling = line([(0.9, 0.8), (0.8, 0.9)])
    assert falling(0.0) == falling(1.0) == pytest.approx(0.85)
    same = line([(0.5, 0.8), (0.5, 0.9)])
    assert same(0.1) == pytest.approx(0.85)
    assert np.isfinite(line([(1.0, 0.9)])(0.3))


def test_what_the_recipe_lays_down_cannot_be_asked_for_otherwise() -> None:
    for options in ({"methods": "cp3"}, {"rank": "vbmf"}):
        with pytest.raises(lr.LowRankError, match=r"recipe automatic_rank .*leave out"):
            lr.compress(models.DIGITS, budget={"macs": 0.5}, **options, **RECIPE)
    with pytest.raises(
        lr.LowRankError, match="no recipe is called 'best': one of default, joint_svd, vbmf_cp, orthogonal, "
    ):
        find_recipe("best")

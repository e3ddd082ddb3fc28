"""Searches for what can only be measured, on a bench whose measurements are made up and so known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.config import make_config
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.report.data import BudgetResult, Size
from onnx_lowrank.search.bench import Attempt
from onnx_lowrank.search.search import CORRECTIONS, SEARCH_STEPS, budget_results, within_budgets, within_drop
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Factorization, Plan, no_progress
from onnx_lowrank.verification.verify import Accuracy, Latency, drop_upper
from tests import tiny

Share = Callable[[float], float]
"""Something as a function of the share of MACs (or parameters) that a plan leaves."""


def latency(share: float, spread: float = 0.01) -> Latency:
    """As measured where the new model takes `share` of the old one's time."""
    speedup = 1 / share
    return Latency(
        "CPUExecutionProvider", 1, 1, 1.0, share, 1.0, share, speedup, speedup - spread, speedup + spread, {}
    )


def accuracy(drop: float, upper: float | None = None, samples: int = 400) -> Accuracy:
    return Accuracy("top1", 1.0, 1.0 - drop, drop, drop + 0.001 if upper is None else upper, samples, {})


@dataclass
class FakeBench:
    """In the place of a bench: nothing is carried out, and what it measures follows from the plan's own costs."""

    planner: Planner
    time: Share = lambda share: share
    drop: Share = lambda share: 0.0
    size: Share = lambda share: share
    upper: Callable[[float], float | None] = lambda drop: None
    trained: Share = lambda drop: drop
    plans: list[Plan] = field(default_factory=list)

    @property
    def original(self) -> Size:
        return Size(tiny.CLASSIFIER_MACS, tiny.CLASSIFIER_PARAMS, 1_000_000)

    def attempt(self, plan: Plan, *others: Plan) -> Attempt:
        self.plans.append(plan)
        size = Size(plan.cost.macs, plan.cost.params, round(1e6 * self.size(plan.ratio("params"))))
        drop = self.drop(plan.ratio("macs"))
        layers: Any = tuple(choice for choice in plan.choices if not choice.dense)
        return Attempt(plan, self.planner.subject.model, Path(), layers, size, accuracy(drop, self.upper(drop)))

    def tuned(self, attempt: Attempt) -> Attempt:
        drop = self.trained(attempt.accuracy.drop)
        return replace(attempt, accuracy=accuracy(drop, self.upper(drop)))

    def latency(self, attempt: Attempt) -> Latency:
        self.timed = latency(self.time(attempt.plan.ratio("macs")))
        return self.timed

    def latency_again(self, attempt: Attempt) -> Latency:
        return self.timed


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a provider that does not tell the time of single layers: MACs stand for it."""
    monkeypatch.setattr(LatencyTable, "usable", False)


def planner(model: Any = None, **options: Any) -> Planner:
    config = make_config(**{"methods": "svd", "align": 1, "jobs": 1, **options})
    return Planner(open_subject(tiny.classifier() if model is None else model, config), config, no_progress)


def results(bench: FakeBench, attempt: Attempt) -> dict[str, BudgetResult]:
    found = budget_results(bench.planner.config, bench.original, attempt, bench.latency(attempt))
    return {result.metric: result for result in found}


# Budgets


def test_planned_budgets_take_one_plan() -> None:
    bench = FakeBench(planner(budget={"macs": 0.5, "params": 0.6}))
    best = within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert len(bench.plans) == 1
    assert all(result.met for result in results(bench, best).values())


@pytest.mark.parametrize("overhead", [0.1, 0.2, 0.3])
def test_a_latency_budget_is_corrected_until_it_is_met(overhead: float) -> None:
    bench = FakeBench(planner(budget={"latency": 0.5}), time=lambda share: overhead + (1 - overhead) * share)
    best = within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert 1 < len(bench.plans) <= CORRECTIONS
    assert results(bench, best)["latency"].met
    shares = [plan.ratio("macs") for plan in bench.plans]
    assert shares == sorted(shares, reverse=True)
    # no more is given up than one correction too many: the plan before the last was still too slow
    assert bench.time(shares[-2]) > 0.5


def test_a_budget_is_missed_only_if_a_second_measurement_says_so_too() -> None:
    bench = FakeBench(planner(budget={"latency": 0.5}), time=lambda share: 2 * share)
    bench.latency_again = lambda attempt: latency(attempt.plan.ratio("macs"))  # type: ignore[method-assign]
    within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert len(bench.plans) == 1


def test_a_correction_out_of_reach_tries_what_lies_before_the_smallest_plan() -> None:
    """Where a time was mismeasured once, the model is not ruined for it."""
    lowest = planner().smallest("macs").ratio("macs")
    times = iter([9.0, 0.4])
    bench = FakeBench(planner(budget={"latency": 0.5}), time=lambda share: share * next(times, 1.0))
    best = within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert len(bench.plans) == 2
    assert lowest < best.plan.ratio("macs") < 0.5
    assert best.plan.ratio("macs") == pytest.approx((lowest + 0.5) / 2, abs=0.05)


def test_a_size_budget_is_corrected_until_it_is_met() -> None:
    bench = FakeBench(planner(budget={"size": 0.5}), size=lambda share: 0.15 + share)
    best = within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert results(bench, best)["size"].met
    assert best.plan.ratio("params") <= 0.35


def test_a_latency_budget_out_of_reach_ends_and_is_reported() -> None:
    bench = FakeBench(planner(budget={"latency": 0.5}), time=lambda share: 0.9 + 0.1 * share)
    best = within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert len(bench.plans) <= CORRECTIONS
    result = results(bench, best)["latency"]
    assert (result.met, result.asked) == (False, 0.5)
    assert result.reached == pytest.approx(bench.time(best.plan.ratio("macs")))
    assert best.plan.ratio("macs") == min(plan.ratio("macs") for plan in bench.plans)


def test_a_budget_out_of_reach_gives_the_smallest_plan_and_says_so() -> None:
    bench = FakeBench(planner(budget={"macs": 0.01}))
    best = within_budgets(bench.planner, bench)  # type: ignore[arg-type]
    assert len(bench.plans) == 1
    assert {choice.rank for choice in best.plan.choices} == {(1,)}
    assert re.search("macs=0.01 cannot be met", " ".join(best.plan.notes))


def test_where_nothing_is_worth_decomposing_the_model_is_left_as_it_is() -> None:
    for goal in ({"budget": {"latency": 0.5}}, {"max_drop": 0.4, "evaluate": []}):
        data = {"evaluate": [{"x": np.ones((2, 2), "float32")}]} if "max_drop" in goal else {}
        bench = FakeBench(planner(tiny.too_small(), **(goal | data)))
        search = within_budgets if "budget" in goal else within_drop
        best = search(bench.planner, bench)  # type: ignore[arg-type]
        assert not best.layers
        assert "nothing here is worth decomposing: its layers are left as they are" in best.plan.notes


# The largest drop


def drop_bench(max_drop: float, objective: str = "macs", **measured: Any) -> FakeBench:
    data = [{"x": tiny.inputs(2)}]
    return FakeBench(planner(max_drop=max_drop, objective=objective, evaluate=data), **measured)


@pytest.mark.parametrize("edge", [0.2, 0.5, 0.8])
def test_the_smallest_plan_that_holds_the_accuracy_is_found(edge: float) -> None:
    bench = drop_bench(0.01, drop=lambda share: 0.0 if share >= edge else 0.5)
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    # a rank more or less of either layer is 34 or 40 of 624 MACs, and the search halves the range seven times
    assert edge <= best.plan.ratio("macs") <= edge + 40 / 624 + 2.0**-SEARCH_STEPS
    assert results(bench, best)["drop"].met
    assert len(bench.plans) <= SEARCH_STEPS + 1


def test_what_training_mends_is_held_too() -> None:
    shares = []
    for trained in (lambda drop: drop, lambda drop: drop / 3):
        bench = drop_bench(0.3, drop=lambda share: 1 - share)
        bench.trained = trained
        best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
        assert best.accuracy.drop <= 0.3
        shares.append(best.plan.ratio("macs"))
    assert shares[1] < 0.6 * shares[0]


def test_the_promise_is_held_on_the_bound_and_not_on_the_drop() -> None:
    bench = drop_bench(0.01, drop=lambda share: 0.005, upper=lambda drop: 0.02)
    bench.drop = lambda share: 0.0 if share == 1 else 0.005
    bench.upper = lambda drop: 0.001 if drop == 0 else 0.02
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    assert not best.layers
    assert "no plan lost as little as 0.01: its layers are left as they are" in best.plan.notes


def test_where_no_plan_holds_the_accuracy_the_model_is_left_as_it_is() -> None:
    bench = drop_bench(0.01, drop=lambda share: 0.0 if share == 1 else 0.5)
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    assert not best.layers
    assert results(bench, best)["drop"].met


def test_a_plan_that_is_slower_is_not_taken_for_latency_but_is_for_macs() -> None:
    slower = {"time": lambda share: 1.2}
    bench = drop_bench(0.01, "latency", **slower)
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    assert not best.layers
    assert any("slower than the original" in note for note in best.plan.notes)
    bench = drop_bench(0.01, "macs", **slower)
    assert within_drop(bench.planner, bench).layers  # type: ignore[arg-type]


def test_one_figure_without_a_bound_is_held_by_itself() -> None:
    bench = drop_bench(0.01, drop=lambda share: 0.0 if share >= 0.5 else 0.5, upper=lambda drop: math.nan)
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    assert best.layers
    assert results(bench, best)["drop"] == BudgetResult("drop", 0.01, 0.0, True)


@pytest.mark.parametrize("objective", ["params", "size"])
def test_the_objective_says_what_is_made_small(objective: str) -> None:
    bench = drop_bench(0.01, objective)
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    least = bench.planner.smallest("params").ratio("params")
    assert least <= best.plan.ratio("params") <= least + 2.0**-SEARCH_STEPS + 40 / 648


def needed_by(note: str) -> int:
    found = re.search("about ([0-9]+) would be needed", note)
    assert found, note
    return int(found[1])


def test_too_few_samples_say_how_many_would_be_enough() -> None:
    limit = 0.02

    def compress(samples: int) -> lr.Result:
        data = tiny.one_hot(samples)
        return lr.compress(
            tiny.fragile(), evaluate=[({"x": data["x"]}, data["labels"])], max_drop=limit, objective="macs", methods="svd", jobs=1
        )  # fmt: skip

    result = compress(20)
    assert not result.met
    assert result.report.unchanged
    (note,) = (note for note in result.report.notes if "too few" in note)
    assert note.startswith("20 samples are too few to promise a drop of 0.02 with 95% confidence: about ")
    needed = needed_by(note)
    same = np.ones(needed)
    assert drop_upper(same, same) <= limit < drop_upper(same[: needed // 2], same[: needed // 2])
    assert compress(needed).met


def test_no_number_of_samples_promises_a_drop_of_nothing() -> None:
    data = tiny.one_hot(32)
    result = lr.compress(
        tiny.fragile(), evaluate=[({"x": data["x"]}, data["labels"])], max_drop=0, methods="svd", jobs=1
    )
    assert any("no number would be enough for a drop of 0" in note for note in result.report.notes)


# What was asked and what was reached


def test_every_goal_is_reported_with_what_was_reached() -> None:
    bench = FakeBench(planner(budget={"macs": 0.5, "params": 0.5, "size": 0.5, "latency": 0.5}))
    dense = bench.attempt(bench.planner.dense())
    found = results(bench, dense)
    assert list(found) == ["macs", "params", "size", "latency"]
    assert all(result.reached == 1 and not result.met for result in found.values())
    smallest = bench.attempt(bench.planner.smallest("macs"))
    reached = results(bench, smallest)
    assert all(result.met for result in reached.values())
    assert reached["macs"].reached == (16 + 24 + 24 + 10) / tiny.CLASSIFIER_MACS
    assert reached["latency"].reached == pytest.approx(reached["macs"].reached)


def test_a_budget_met_exactly_is_met() -> None:
    bench = FakeBench(planner(budget={"macs": 1.0}))
    assert results(bench, bench.attempt(bench.planner.dense()))["macs"].met


def test_a_metric_that_is_no_number_is_not_met() -> None:
    bench = drop_bench(0.01, drop=lambda share: math.nan)
    assert not results(bench, bench.attempt(bench.planner.dense()))["drop"].met


def test_a_damaged_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong on the way: what breaks the promise is not given back."""
    stored = Factorization.stored

    def damaged(self: Factorization, dtype: np.dtype) -> Factorization:
        return stored(replace(self, kernels=tuple(tuple(k[::-1] for k in kernels) for kernels in self.kernels)), dtype)

    options: dict[str, Any] = {"calibrate": models.DIGITS_CALIBRATE, "evaluate": models.DIGITS_TEST, "jobs": 1}
    options |= {"include": ("conv4", "fc")}
    whole = lr.compress(models.DIGITS, max_drop=0.02, objective="macs", methods="channel_svd,svd", **options)
    assert whole.met and not whole.report.unchanged
    monkeypatch.setattr(Factorization, "stored", damaged)
    broken = lr.compress(models.DIGITS, max_drop=0.02, objective="macs", methods="channel_svd,svd", **options)
    assert broken.report.unchanged and broken.met
    assert any("no plan lost as little as 0.02" in note for note in broken.report.notes)
    forced = lr.compress(models.DIGITS, budget={"macs": 0.8}, max_drop=0.02, methods="channel_svd,svd", **options)
    assert not forced.met  # asked for a size as well, so it is there to be looked at: but not as met
    assert forced.report.accuracy.drop > 0.1


def test_a_promise_in_decibels_bounds_the_share_of_noise() -> None:
    options: dict[str, Any] = {"calibrate": models.DIGITS_CALIBRATE, "evaluate": models.DIGITS_TEST, "jobs": 1}
    result = lr.compress(
        models.DIGITS, max_drop=0.01, metric="sqnr", objective="macs", include=("conv4", "fc"), **options
    )
    accuracy = result.report.accuracy
    assert result.met and not result.report.unchanged
    assert 0 < accuracy.drop < accuracy.drop_upper_95 <= 0.01
    assert accuracy.compressed > 20


def test_why_the_search_stopped_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = drop_bench(0.01, drop=lambda share: 0.0 if share >= 0.5 else 0.005)
    bench.upper = lambda drop: 0.001 if drop == 0 else 0.015
    best = within_drop(bench.planner, bench)  # type: ignore[arg-type]
    (note,) = (note for note in best.plan.notes if "next smaller plan" in note)
    # 400 samples give 0.010 above the drop, and 0.005 is allowed: four times as many halve it
    assert note.endswith("about 1600 samples would tell whether it holds 0.01")
    bench = drop_bench(0.01, drop=lambda share: 0.0 if share >= 0.5 else 0.2)
    (note,) = (n for n in within_drop(bench.planner, bench).plan.notes if "next smaller plan" in n)  # type: ignore[arg-type]
    assert re.search(r"at 0\.\d+ of the MACs, lost 0\.2000", note) and "would tell" not in note
    bench = drop_bench(0.01, drop=lambda share: 0.0 if share >= 0.5 else -0.004)
    bench.upper = lambda drop: 0.001 if drop == 0 else 0.015
    (note,) = (n for n in within_drop(bench.planner, bench).plan.notes if "next smaller plan" in n)  # type: ignore[arg-type]
    assert "gained 0.0040 (at most 0.0150 with" in note

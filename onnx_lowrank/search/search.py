"""Plans made in turn until what can only be measured is within what was asked."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from onnx_lowrank.budgets.knapsack import OutOfReach
from onnx_lowrank.config import MEASURED, Config
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.report.data import BudgetResult, Size
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.types import Budget, Metric, Plan
from onnx_lowrank.verification.verify import CONFIDENCE, Accuracy, Latency

logger = logging.getLogger(__name__)

SEARCH_STEPS = 7
"""Most plans tried in a search for the smallest acceptable share."""

FINE = 1.05
"""A search ends where the smallest share that holds is within this factor of one that does not."""

CORRECTIONS = 4
"""Plans made in turn for budgets that only the finished model can be measured on."""

NOTHING_TO_GAIN = "nothing here is worth decomposing: its layers are left as they are"

BYTES_OF_INT8 = 0.25
"""What a parameter takes in eight bits, as a share of what it takes in floating point."""

WORDS = {"macs": "MACs", "params": "parameters", "latency": "time"}
"""What a plan is a share of, in words."""

SLACK = 0.99
"""Taken off a corrected budget, so that the next plan does not miss by a rounding."""


def budget_results(
    config: Config, original: Size, attempt: Attempt, latency: Latency | None
) -> tuple[BudgetResult, ...]:
    """Everything asked for, and what `attempt` reached; nothing is held against a model that has nothing to give."""
    if NOTHING_TO_GAIN in attempt.plan.notes and config.quantize == "none":
        return ()
    results = []
    for budget in config.budget:
        if budget.metric == "latency" and config.foretold:
            share = attempt.plan.ratio("latency")
            results.append(BudgetResult("latency", budget.ratio, share, share <= budget.ratio, share, measured=False))
            continue
        reached = _reached(budget.metric, original, attempt, latency)
        if reached is not None:
            timed = budget.metric == "latency" and attempt.plan.original.latency_ms
            predicted = attempt.plan.ratio("latency") if timed else None
            results.append(BudgetResult(budget.metric, budget.ratio, reached, reached <= budget.ratio, predicted))
    if config.max_drop is not None:
        drop = loss(attempt.accuracy)
        results.append(BudgetResult("drop", config.max_drop, drop, drop <= config.max_drop))
    return tuple(results)


def _reached(metric: str, original: Size, attempt: Attempt, latency: Latency | None) -> float | None:
    if metric == "latency":
        return None if latency is None else 1 / latency.speedup
    name = {"size": "size_bytes"}.get(metric, metric)
    before = getattr(original, name)
    return getattr(attempt.size, name) / before if before else 1.0


def loss(accuracy: Accuracy) -> float:
    """What a promise is held on: the upper bound, or the drop itself where one figure leaves no bound."""
    return accuracy.drop if math.isnan(accuracy.drop_upper_95) else accuracy.drop_upper_95


def within_budgets(planner: Planner, bench: Bench) -> Attempt:
    """The most accurate plan within all budgets, or the nearest to them that was found."""
    budgets = planner.config.budget
    if planner.hopeless:
        return bench.attempt(planner.dense(NOTHING_TO_GAIN))
    ratios = {
        budget.metric: min(1.0, budget.ratio / _undecomposed(planner.config, budget.metric)) for budget in budgets
    }
    measured = [metric for metric in ratios if metric in MEASURED]
    best: Attempt | None = None
    for left in reversed(range(CORRECTIONS if measured else 1)):
        attempt = bench.attempt(*_plans(planner, ratios))
        latency = bench.latency(attempt) if "latency" in ratios and not planner.config.foretold else None
        missed = _missed(planner, bench, attempt, latency)
        if any(result.metric == "latency" for result in missed):  # before the work is done again, another look
            missed = _missed(planner, bench, attempt, bench.latency_again(attempt))
        best = attempt
        unknown = any(math.isnan(result.reached) for result in missed)  # no time is known of a provider that fell back
        if not missed or unknown or any("cannot be met" in note for note in attempt.plan.notes):
            break
        for result in missed:
            logger.info("%s: asked %.4g, reached %.4g, planned again", result.metric, result.asked, result.reached)
            counted, tried = planner.counts(result.metric), ratios[result.metric]
            if counted == result.metric:  # the plan was timed whole, and yet came out otherwise: ask for that much less
                wanted = tried * SLACK * result.asked / result.reached
            else:
                whole = _undecomposed(planner.config, result.metric)
                wanted = _corrected(attempt.plan.ratio(counted), result, whole)
            # the smallest plan is ruin: before it, what lies between it and the one that missed
            least = planner.smallest(counted).ratio(counted) if left > 1 else 0.0
            ratios[result.metric] = (least + tried) / 2 if wanted < least < tried else wanted
    assert best is not None
    return best


def _missed(planner: Planner, bench: Bench, attempt: Attempt, latency: Latency | None) -> list[BudgetResult]:
    """The budgets that only the finished model can be measured on, and that it is not within."""
    results = budget_results(planner.config, bench.original, attempt, latency)
    return [result for result in results if not result.met and result.metric in MEASURED]


def _undecomposed(config: Config, metric: str) -> float:
    """What a model without a chain is of the original, about: smaller where it is quantised."""
    return BYTES_OF_INT8 if metric == "size" and config.quantize != "none" else 1.0


def _corrected(share: float, result: BudgetResult, whole: float) -> float:
    """The share to plan for next: on the line through what `share` reached and `whole`, which the share 1 does.

    The line meets the axis at the overhead that no plan takes away; where that alone is too much, in proportion.
    """
    asked = SLACK * result.asked
    line = 1 - (whole - asked) * (1 - share) / (whole - result.reached) if result.reached < whole else 0.0
    return line if line > 0 else share * asked / result.reached


def _plans(planner: Planner, ratios: dict[str, float]) -> list[Plan]:
    """Plans within `ratios`, each measured metric by the planned one that stands for it; the smallest if there is none."""
    planned: dict[str, float] = {}
    for metric, ratio in ratios.items():
        name = planner.counts(metric)
        planned[name] = min(ratio, planned.get(name, 1.0))
    budgets = [Budget(metric, ratio) for metric, ratio in planned.items()]
    try:
        return planner.alternatives(budgets)
    except OutOfReach as error:
        return [planner.smallest(budgets[0].metric, str(error))]


def within_drop(planner: Planner, bench: Bench) -> Attempt:
    """The plan with the smallest share of the objective whose loss is within ``max_drop``."""
    config = planner.config
    assert config.max_drop is not None
    metric = planner.counts(config.objective)
    dense = bench.attempt(planner.dense())
    if loss(dense.accuracy) > config.max_drop:
        lost = config.quantize != "none" and dense.accuracy.drop > config.max_drop
        why = f"INT8 alone loses {dense.accuracy.drop:.4f}: leave out --quantize"
        return _left(dense, planner, why if lost else _too_few(dense.accuracy, config.max_drop))
    if planner.hopeless:
        return _left(dense, planner, NOTHING_TO_GAIN)
    best, missed = dense, None
    low, high = planner.smallest(metric).ratio(metric), 1.0
    for step in range(SEARCH_STEPS):
        planner.progress("search", step, SEARCH_STEPS)
        middle = math.sqrt(low * high)
        if high / low < FINE:
            break
        attempt = bench.attempt(planner.solve([Budget(metric, middle)]))
        if loss(attempt.accuracy) > config.max_drop:
            attempt = bench.tuned(attempt)
        logger.info("%s=%.3f: drop at most %.4f", metric, middle, loss(attempt.accuracy))
        if loss(attempt.accuracy) <= config.max_drop:
            best, high = attempt, min(middle, attempt.plan.ratio(metric))
        else:
            missed, low = attempt, middle
    planner.progress("search", SEARCH_STEPS, SEARCH_STEPS)
    if not best.layers:
        return _left(dense, planner, f"no plan lost as little as {config.max_drop:g}: its layers are left as they are")
    if config.objective == "latency" and not config.foretold and bench.latency(best).speedup_high_95 < 1:
        return _left(
            dense,
            planner,
            "every plan that holds the accuracy is slower than the original: its layers are left as they are",
        )
    return replace(best, plan=best.plan.with_notes(*_why_not_more(missed, metric, config.max_drop)))


def _left(dense: Attempt, planner: Planner, why: str) -> Attempt:
    """The original, and why it was left alone."""
    quantized = (dense.choice.note,) if dense.choice else ()
    return replace(dense, plan=planner.dense(why, *quantized))


def _why_not_more(missed: Attempt | None, metric: Metric, limit: float) -> tuple[str, ...]:
    """What kept the search from the next smaller plan: its drop, or too few samples to tell."""
    if missed is None:
        return ()
    accuracy, share = missed.accuracy, missed.plan.ratio(metric)
    lost = f"lost {accuracy.drop:.4f}" if accuracy.drop >= 0 else f"gained {-accuracy.drop:.4f}"
    note = f"the next smaller plan, at {share:.3f} of the {WORDS.get(metric, metric)}, {lost}"
    if math.isnan(accuracy.drop_upper_95) or not math.isfinite(accuracy.drop_upper_95):
        return (note,)
    note += f" (at most {accuracy.drop_upper_95:.4f} with {CONFIDENCE:.0%} confidence on {accuracy.samples} samples)"
    if accuracy.drop >= limit:
        return (note,)
    # the width of the interval goes with one over the root of the number of samples
    needed = accuracy.samples * ((accuracy.drop_upper_95 - accuracy.drop) / (limit - accuracy.drop)) ** 2
    return (f"{note}: about {math.ceil(needed)} samples would tell whether it holds {limit:g}",)


def _too_few(accuracy: Accuracy, limit: float) -> str:
    """Why even an unchanged model cannot be promised, and what it would take."""
    # n samples that are all alike miss a loss of a share p of them all with the probability (1 - p)^n
    needed = math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-limit)) if limit > 0 else None
    enough = f"about {needed} would be needed" if needed else "no number would be enough for a drop of 0"
    return f"{accuracy.samples} samples are too few to promise a drop of {limit:g} with {CONFIDENCE:.0%} confidence: {enough}"

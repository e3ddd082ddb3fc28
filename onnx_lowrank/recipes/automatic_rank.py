"""``automatic_rank``: all ranks together, under a constraint on accuracy or on cost.

The paper in one paragraph. Layers become truncated spatial SVDs, the first by channels. A layer's metric is its
PCA energy, the network's metric A_p the product over the layers. Sets of ranks come from a space around those of equal
level. The accuracy of the (fine-tuned) network is taken as linear in the metric, A_f = a A_p + b, with a and b fitted to what was
measured so far while the cost is stepped down; the cost is as low as the constraint A_f >= A_target allows.

What the abstract leaves open, and our reading: pointwise layers and products become plain SVDs; the step is a tenth of the
original's cost; the line goes through the last three measurements, and the first is the original (A_p = 1); accuracies are
those of the truncated network where nothing is trained.

References
----------
Kim & Kyung (2018), "Automatic rank selection for high-speed convolutional neural network", arXiv 1806.10821. The space
is that of Kim, Khan & Kyung (2019), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.budgets.knapsack import OutOfReach
from onnx_lowrank.candidates import Group
from onnx_lowrank.config import METHODS, Config
from onnx_lowrank.decompositions.matrix import is_pointwise
from onnx_lowrank.planning.candidate_sets import Policy
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.search.search import NOTHING_TO_GAIN, loss, within_budgets
from onnx_lowrank.types import Budget, LowRankError

STEP = 0.1
"""Share of the original's cost that is taken off at a time."""

LAST = 3
"""Measurements that the line goes through."""

REFINEMENTS = 3
"""Costs tried between the last that held and the first that did not."""


def configure(config: Config) -> Config:
    """The options that the paper lays down.

    Raises
    ------
    LowRankError
        Where others were asked for.
    """
    if config.rank:
        raise LowRankError("recipe automatic_rank chooses the ranks itself: leave out --rank")
    if config.methods != METHODS:
        raise LowRankError(
            "recipe automatic_rank lays down the methods: leave out --methods, or use --solver enc_model"
        )
    solver = "enc_model" if config.solver == "knapsack" else config.solver
    damage = "energy" if config.damage == "output" else config.damage
    return replace(config, solver=solver, damage=damage, align=config.align or 1)


def policy(config: Config) -> Policy:
    """Spatial SVD, the first layer by channels; every rank; nothing fitted."""
    return Policy(_methods, every_rank=True, plain=True)


def _methods(index: int, group: Group) -> tuple[str, ...]:
    spec = group.layers[0].spec
    if is_pointwise(spec):
        return ("svd",)
    along_one_axis = sum(1 for size in spec.kernel if size > 1) < 2
    return ("channel_svd",) if index == 0 or along_one_axis else ("spatial_svd",)


def search(planner: Planner, bench: Bench) -> Attempt:
    """Within the budgets; under ``max_drop``, the lowest cost whose accuracy holds."""
    config = planner.config
    if config.budget:
        return bench.tuned(within_budgets(planner, bench))
    if config.max_drop is None:  # nothing but eight bits, or less of what is dead
        return bench.tuned(bench.attempt(planner.dense()))
    if planner.hopeless:
        return bench.attempt(planner.dense(NOTHING_TO_GAIN))
    metric = planner.counts(config.objective)
    best = bench.attempt(planner.dense())
    target = best.accuracy.original - config.max_drop
    seen = [(1.0, best.accuracy.original)]
    notes: list[str] = []

    def tried(cost: float) -> Attempt | None:
        try:
            plan = planner.solve([Budget(metric, cost)])
        except OutOfReach:
            return None
        level = math.exp(-plan.error)
        predicted = line(seen)(level) if len(seen) > 1 else math.nan
        attempt = bench.tuned(bench.attempt(plan))
        seen.append((level, attempt.accuracy.compressed))
        foretold = "" if math.isnan(predicted) else f", {attempt.accuracy.metric} predicted {predicted:.4f}"
        notes.append(f"{metric} {cost:.3f}: A_p {level:.3g}{foretold}, measured {attempt.accuracy.compressed:.4f}")
        return attempt

    low, cost, high = 0.0, 1.0 - STEP, 1.0
    while cost > STEP / 2:
        attempt = tried(cost)
        if attempt is None or loss(attempt.accuracy) > config.max_drop:
            low = cost
            break
        best, high = attempt, cost
        cost -= STEP
    for _ in range(REFINEMENTS):
        cost = _between(planner, metric, seen, target, low, high)
        attempt = tried(cost)
        if attempt is not None and loss(attempt.accuracy) <= config.max_drop:
            best, high = attempt, cost
        else:
            low = cost
    return replace(best, plan=best.plan.with_notes(*notes))


def line(seen: Sequence[tuple[float, float]]) -> np.poly1d:
    """A_f = a A_p + b through the last measurements, by least squares; a is not negative.

    Examples
    --------
    >>> round(float(line([(1.0, 0.9), (0.5, 0.8)])(0.75)), 3)
    0.85
    """
    levels, accuracies = np.array(seen[-LAST:]).T
    if np.ptp(levels) < 1e-12:
        return np.poly1d([0.0, accuracies.mean()])
    slope, offset = np.polyfit(levels, accuracies, 1)
    return np.poly1d([slope, offset] if slope > 0 else [0.0, accuracies.mean()])


def _between(
    planner: Planner, metric: str, seen: Sequence[tuple[float, float]], target: float, low: float, high: float
) -> float:
    """The lowest cost between `low` and `high` whose plan is predicted to hold the target; the middle at worst."""
    predict, middle = line(seen), (low + high) / 2
    for cost in np.linspace(low, high, 9)[1:-1]:
        try:
            plan = planner.solve([Budget(metric, float(cost))])
        except OutOfReach:
            continue
        if predict(math.exp(-plan.error)) >= target:
            return float(cost)
    return middle

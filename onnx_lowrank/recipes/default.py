"""``default``: what was asked for, by candidates of every method, fitted to samples where there are any."""

from __future__ import annotations

from onnx_lowrank.config import PLANNED, Config
from onnx_lowrank.planning.candidate_sets import Policy
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.search.search import within_budgets, within_drop
from onnx_lowrank.types import LowRankError, Plan


def configure(config: Config) -> Config:
    """Nothing is laid down."""
    return config


def policy(config: Config) -> Policy:
    """Nothing is laid down."""
    return Policy()


def search(planner: Planner, bench: Bench) -> Attempt:
    """A plan by the rank estimator, within the budgets, or as small as the accuracy allows."""
    config = planner.config
    if config.rank:
        return bench.tuned(bench.attempt(planner.estimated()))
    if not config.budget and config.max_drop is None:  # nothing but eight bits, or less of what is dead
        return bench.tuned(bench.attempt(planner.dense()))
    return bench.tuned(within_budgets(planner, bench)) if config.budget else within_drop(planner, bench)


def plan_of(planner: Planner) -> Plan:
    """The plan by the rank estimator, or within the budgets.

    Raises
    ------
    LowRankError
        For a budget on what only a model tells, or one out of reach; where there is none, and no estimator.
    """
    config = planner.config
    if config.rank:
        return planner.estimated()
    for budget in config.budget:
        if planner.counts(budget.metric) != budget.metric:
            raise LowRankError(
                f"a budget on {budget.metric} is measured: use compress, or a budget on {', '.join(PLANNED)} or latency"
            )
    if not config.budget:
        raise LowRankError("nothing to plan for: give a budget, for example macs=0.5, or a rank estimator")
    return planner.solve(config.budget)

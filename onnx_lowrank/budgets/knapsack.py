"""Exact choice of one candidate for each group: a multiple-choice knapsack as a mixed-integer linear program."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnx_lowrank.types import Budget, Candidate, Cost, LowRankError

GAP = 1e-6
"""Relative optimality gap at which the solver may stop; predicted errors are not known better than that."""

MISS = 2e-6
"""Share of a limit by which the solver may miss it (1e-6, as HiGHS is set), and that again."""

ROUNDING = 1e-6
"""Of a sum of times, in thousandths of a share: no more than that is not rounded up."""

NODES = 1000
"""Of the solver's search tree, at most: many equal layers make it endless, where one choice is as good as another. The best
plan found by then is within some 1e-4 of the optimum; and it is the same on every machine, which a limit on time is not."""

SECONDS = 600.0
"""Longest search for any plan at all, where that many nodes hold none."""


class OutOfReach(LowRankError):
    """No choice meets the budgets."""


def knapsack(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> tuple[Candidate, ...]:
    """The choice with the least total error within every budget.

    Parameters
    ----------
    candidates
        For each group, what it could become; every layer is in one of the chosen candidates.
    budgets
        On ``macs``, ``params`` or ``latency``; all hold together.
    rest, original
        Cost of what no group covers, and of the whole model before.

    Returns
    -------
    tuple of Candidate
        One for each group.

    Raises
    ------
    OutOfReach
        Where no choice meets the budgets; the message says how far each can go.
    LowRankError
        Where the solver found nothing in time.

    References
    ----------
    Kellerer, Pferschy & Pisinger (2004), "Knapsack Problems", chapter 11; solved by HiGHS through scipy.

    Examples
    --------
    >>> a = Candidate(("a",), "dense", (), (), Cost(10, 10), 0.0)
    >>> b = Candidate(("a",), "svd", (2,), (), Cost(4, 4), 0.3)
    >>> knapsack([[a, b]], [Budget("macs", 0.5)], Cost(0, 0), Cost(10, 10)) == (b,)
    True
    """
    return several(candidates, budgets, rest, original, 1)[0]


def several(
    candidates: Sequence[Sequence[Candidate]],
    budgets: Sequence[Budget],
    rest: Cost,
    original: Cost,
    count: int,
    band: float | None = None,
) -> list[tuple[Candidate, ...]]:
    """The `count` choices with the least total error within every budget, the best first; fewer where there are no more.

    Parameters
    ----------
    band
        Share of the first budget that a choice may leave unused; None for any.

    Raises
    ------
    OutOfReach, LowRankError
        As :func:`knapsack`.
    """
    limits = [most_of(budget, rest, original) for budget in budgets]
    _check_reach(candidates, budgets, limits, rest, original)
    if not candidates:
        return [()]
    least = (
        -math.inf
        if band is None
        else (1 - band) * (limits[0] + rest.of(budgets[0].metric)) - rest.of(budgets[0].metric)
    )
    found: list[list[int]] = []
    flat = [c for group in candidates for c in group]
    while len(found) < count:
        try:
            picked = _solve(candidates, budgets, limits, least, found)
            if any(
                _used([flat[i] for i in picked], b.metric) > limit for b, limit in zip(budgets, limits, strict=True)
            ):
                # within the solver's tolerance, and yet beyond the budget: ask for that much less
                picked = _solve(candidates, budgets, [_tighter(limit) for limit in limits], least, found)
        except OutOfReach:
            if not found:
                raise
            break
        found.append(picked)
    return [tuple(flat[i] for i in picked) for picked in found]


def _solve(
    candidates: Sequence[Sequence[Candidate]],
    budgets: Sequence[Budget],
    limits: Sequence[float],
    least: float,
    without: Sequence[Sequence[int]],
) -> list[int]:
    """The choice with the least total error that uses at most `limits`, and of the first at least `least`.

    Choices are given and returned by their places in the list of all candidates; those in `without` are left out.
    """
    flat = [c for group in candidates for c in group]
    constraints = [LinearConstraint(_each_layer_once(flat), 1, 1)]
    for number, (budget, limit) in enumerate(zip(budgets, limits, strict=True)):
        used = np.array([c.cost.of(budget.metric) for c in flat], dtype=float)
        # in units of the limit, so that the solver's absolute tolerances mean the same for every budget
        unit = limit if limit > 0 else 1.0
        constraints.append(LinearConstraint(used[None] / unit, -np.inf if number else least / unit, limit / unit))
    if without:
        counts = np.array([len(picked) for picked in without])
        places = np.concatenate([np.asarray(picked) for picked in without])
        rows = np.repeat(np.arange(len(without)), counts)
        taken = csr_array((np.ones(len(places)), (rows, places)), shape=(len(without), len(flat)))
        constraints.append(LinearConstraint(taken, -np.inf, counts - 1))
    errors = np.array([c.error for c in flat])
    ends: list[dict[str, Any]] = [{"node_limit": NODES}, {"time_limit": SECONDS}]
    for end in ends:
        with _silent():
            result = milp(
                errors / max(errors.max(), np.finfo(float).tiny),
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": GAP, **end},
            )
        if result.x is not None or result.status == 2:
            break
    if result.status == 2:
        asked = ", ".join(f"{b.metric}={b.ratio:g}" for b in budgets)
        raise OutOfReach(f"{asked} cannot be met together: loosen one, or allow more layers and methods")
    if result.x is None:
        raise LowRankError(f"no plan was found within {SECONDS:.0f} s ({result.message}): loosen a budget")
    return [int(i) for i in np.flatnonzero(result.x > 0.5)]


def _each_layer_once(flat: Sequence[Candidate]) -> csr_array:
    """For each layer, which candidates decide it: (layers, candidates)."""
    rows: dict[str, int] = {}
    places = [(rows.setdefault(name, len(rows)), column) for column, c in enumerate(flat) for name in c.layers]
    row, column = np.array(places).T
    return csr_array((np.ones(len(places)), (row, column)), shape=(len(rows), len(flat)))


def _tighter(limit: float) -> float:
    return limit - (math.ceil(MISS * limit) if isinstance(limit, int) else MISS * limit)


def _used(choices: Sequence[Candidate], metric: str) -> float:
    return math.fsum(c.cost.of(metric) for c in choices)


def most_of(budget: Budget, rest: Cost, original: Cost) -> float:
    """Largest cost of all groups together whose plan is within `budget`, as its ratio is reported."""
    total = original.of(budget.metric)
    most = budget.ratio * total
    if isinstance(total, int):
        most = math.floor(most) + 1  # 0.29 * 100 is below 29, and yet 29 / 100 is within 0.29
        while total and most / total > budget.ratio:
            most -= 1
    return most - rest.of(budget.metric)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on the process's standard output: HiGHS leaves a line of its debugging there that no option turns off."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed: nothing can be printed there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def cheapest(candidates: Sequence[Sequence[Candidate]], metric: str) -> tuple[Candidate, ...]:
    """The choice that goes as far down in `metric` as the candidates allow."""
    if len({name for group in candidates for c in group for name in c.layers}) == sum(
        len(group[0].layers) for group in candidates
    ):
        return tuple(min(group, key=lambda c: c.cost.of(metric)) for group in candidates)
    # some are over several groups: the least of them all is an allocation of its own, by cost in the place of damage
    view = [[replace(c, error=float(c.cost.of(metric))) for c in group] for group in candidates]
    flat = [c for group in candidates for c in group]
    return tuple(flat[i] for i in _solve(view, [], [], -math.inf, []))


def _check_reach(
    candidates: Sequence[Sequence[Candidate]],
    budgets: Sequence[Budget],
    limits: Sequence[float],
    rest: Cost,
    original: Cost,
) -> None:
    """See that each budget can be met, by itself."""
    for budget, limit in zip(budgets, limits, strict=True):
        metric = budget.metric
        least = _used(cheapest(candidates, metric), metric)
        if least > limit:
            share = (least + rest.of(metric)) / (original.of(metric) or 1)
            raise OutOfReach(
                f"{metric}={budget.ratio:g} cannot be met: the layers that may be decomposed reach "
                # rounded up, so that the figure can be asked for
                f"{math.ceil(1e3 * share - ROUNDING) / 1e3:.3f} at the lowest rank; loosen the budget or allow more layers and methods"
            )

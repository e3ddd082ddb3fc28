"""Exact choice of one candidate for each group: a multiple-choice knapsack as a mixed-integer linear program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnx_lowrank.types import Budget, Candidate, Cost, LowRankError

GAP = 1e-6
"""Relative optimality gap at which the solver may stop; predicted errors are not known better than that."""

SECONDS = 60.0
"""Longest search. The best plan found by then is feasible, and nearly always optimal."""


class OutOfReach(LowRankError):
    """No choice meets the budgets."""


def knapsack(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> tuple[Candidate, ...]:
    """The choice with the least total error within every budget.

    Parameters
    ----------
    candidates
        For each group, what it could become.
    budgets
        On ``macs`` or ``params``; all hold together.
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
    if not candidates:
        _check_reach(candidates, budgets, rest, original)
        return ()
    flat = [c for group in candidates for c in group]
    owner = np.repeat(np.arange(len(candidates)), [len(group) for group in candidates])
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(candidates), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    _check_reach(candidates, budgets, rest, original)
    for budget in budgets:
        used = np.array([getattr(c.cost, budget.metric) for c in flat], dtype=float)
        limit = budget.ratio * getattr(original, budget.metric) - getattr(rest, budget.metric)
        # in units of the limit, so that the solver's absolute tolerances mean the same for every budget
        constraints.append(LinearConstraint(used[None] / max(limit, 1.0), -np.inf, limit / max(limit, 1.0)))
    errors = np.array([c.error for c in flat])
    result = milp(
        errors / max(errors.max(), np.finfo(float).tiny),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.status == 2:
        asked = ", ".join(f"{b.metric}={b.ratio:g}" for b in budgets)
        raise OutOfReach(f"{asked} cannot be met together: loosen one, or allow more layers and methods")
    if result.x is None:
        raise LowRankError(f"no plan was found within {SECONDS:.0f} s ({result.message}): loosen a budget")
    picked = np.flatnonzero(result.x > 0.5)
    return tuple(flat[i] for i in picked)


def _check_reach(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> None:
    """See that each budget can be met, by itself."""
    for budget in budgets:
        metric = budget.metric
        least = getattr(rest, metric) + sum(min(getattr(c.cost, metric) for c in group) for group in candidates)
        total = getattr(original, metric)
        if least > budget.ratio * total:
            raise OutOfReach(
                f"{metric}={budget.ratio:g} cannot be met: the layers that may be decomposed reach {least / max(total, 1):.3f} "
                f"at the lowest rank; loosen the budget or allow more layers and methods"
            )

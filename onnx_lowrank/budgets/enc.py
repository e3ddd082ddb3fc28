"""Rank sets of ENC: the same level of every layer, and the best of the space around it.

The three of the paper differ in how far they trust a metric. *Map* wants none: every layer is left with the same level
of what it had. *Model* looks in a box around that for the set of ranks of the highest metric. *Inf* lets the network itself
choose among the best of *Model*. A level y in (0, 1] of a layer is here the damage -log y, so that the paper's product of
levels is the sum that solvers work on, and what they make of levels they make of any damage.

References
----------
Kim, Khan & Kyung (2019), "Efficient Neural Network Compression", CVPR: sections 3.2 (Map), 3.3 (the space), 3.4 (Model)
and 3.5 (Inf). That the margins are shares of the budget is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onnx_lowrank.budgets.knapsack import OutOfReach, knapsack, most_of, several
from onnx_lowrank.types import Budget, Candidate, Cost

MARGIN = 0.10
"""Share of the budget by which the ends of the space are made for more and for less."""

BAND = 0.005
"""Share of the budget that a set of ranks may leave unused."""

TOP = 20
"""Sets of ranks that *Inf* has the network choose among."""


def enc_map(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> tuple[Candidate, ...]:
    """The same level in every layer: the highest at which the cheapest candidates that have it are within every budget.

    Parameters and errors are those of :func:`~onnx_lowrank.budgets.knapsack.knapsack`.
    """
    levels = sorted({c.error for group in candidates for c in group})
    limits = [most_of(budget, rest, original) for budget in budgets]
    low, high = 0, len(levels) - 1
    if not levels or not _within(_at(candidates, budgets, levels[high]), budgets, limits):
        # out of reach even so; what can be reached is said by the solver that looks at everything
        return knapsack(candidates, budgets, rest, original)
    while low < high:
        middle = (low + high) // 2
        if _within(_at(candidates, budgets, levels[middle]), budgets, limits):
            high = middle
        else:
            low = middle + 1
    return _at(candidates, budgets, levels[high])


def space(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> list[list[Candidate]]:
    """The candidates between those that *Map* takes for ``MARGIN`` more and for ``MARGIN`` less of the budgets."""
    upper, lower = (
        _map_or_end(candidates, [_scaled(budget, 1 + sign * MARGIN) for budget in budgets], rest, original)
        for sign in (1, -1)
    )
    return [
        [c for c in group if high.error <= c.error <= low.error]
        for group, high, low in zip(candidates, upper, lower, strict=True)
    ]


def enc_model(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> tuple[Candidate, ...]:
    """The set of ranks in the space with the highest product of levels (the least sum of damages), exactly."""
    return enc_best(candidates, budgets, rest, original, 1)[0]


def enc_best(
    candidates: Sequence[Sequence[Candidate]],
    budgets: Sequence[Budget],
    rest: Cost,
    original: Cost,
    count: int = TOP,
) -> list[tuple[Candidate, ...]]:
    """The `count` best sets of ranks in the space, the best first: an exact knapsack, and again without what it found.

    The paper enumerates the space in steps instead; no enumeration of it holds a better set than the first of these.
    """
    inside = space(candidates, budgets, rest, original)
    for band in (BAND, None):
        try:
            return several(inside, budgets, rest, original, count, band)
        except OutOfReach:  # a space of few candidates may have none so near to the budget
            continue
    return [knapsack(candidates, budgets, rest, original)]


def combined(
    by_energy: Sequence[Sequence[Candidate]],
    by_accuracy: Sequence[Sequence[Candidate]],
    budgets: Sequence[Budget],
    rest: Cost,
    original: Cost,
    count: int = TOP,
) -> list[tuple[Candidate, ...]]:
    """The `count` best sets of ranks by ``A_c = A_m + A_p C(R) / C``, which is no sum over layers.

    The ``TOP`` best by either metric are generated and scored by both.

    Parameters
    ----------
    by_energy, by_accuracy
        The same candidates with -log of their levels by either metric.

    References
    ----------
    Kim, Khan & Kyung (2019), eq. 9.
    """
    known = [{(c.decomposition, c.rank): c.error for c in group} for group in by_accuracy]
    energy = [{(c.decomposition, c.rank): c.error for c in group} for group in by_energy]
    found: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[Candidate, ...]] = {}
    for view in (by_energy, by_accuracy):
        for choice in enc_best(view, budgets, rest, original):
            found.setdefault(tuple((c.decomposition, c.rank) for c in choice), choice)

    def score(keys: tuple[tuple[str, tuple[int, ...]], ...]) -> float:
        a_m, a_p = (
            math.exp(-math.fsum(errors[key] for errors, key in zip(view, keys, strict=True)))
            for view in (known, energy)
        )
        share = sum((c.cost for c in found[keys]), rest).of(budgets[0].metric) / original.of(budgets[0].metric)
        return a_m + a_p * share

    return [found[keys] for keys in sorted(found, key=score, reverse=True)[:count]]


def _at(candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], level: float) -> tuple[Candidate, ...]:
    """In each group the cheapest candidate whose damage is at most `level`."""
    metric = budgets[0].metric
    return tuple(min((c for c in group if c.error <= level), key=lambda c: c.cost.of(metric)) for group in candidates)


def _within(choices: Sequence[Candidate], budgets: Sequence[Budget], limits: Sequence[float]) -> bool:
    return all(
        math.fsum(c.cost.of(budget.metric) for c in choices) <= limit
        for budget, limit in zip(budgets, limits, strict=True)
    )


def _scaled(budget: Budget, by: float) -> Budget:
    return replace(budget, ratio=min(budget.ratio * by, 1.0))


def _map_or_end(
    candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget], rest: Cost, original: Cost
) -> tuple[Candidate, ...]:
    """As *Map*; where the budgets are out of reach, the end of every layer."""
    try:
        return enc_map(candidates, budgets, rest, original)
    except OutOfReach:
        return tuple(max(group, key=lambda c: c.error) for group in candidates)

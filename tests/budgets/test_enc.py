"""The solvers of ENC against every set of ranks there is, on instances small enough to list them all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from onnx_lowrank.budgets import BUDGET_SOLVERS, enc, find_solver
from onnx_lowrank.budgets.enc import BAND, MARGIN, combined, enc_best, enc_map, enc_model, space
from onnx_lowrank.budgets.knapsack import OutOfReach, several
from onnx_lowrank.types import DENSE, Budget, Candidate, Cost, LowRankError

NOTHING = Cost(0, 0)


def layers(rng: np.random.Generator, count: int, ranks: int = 6) -> list[list[Candidate]]:
    """Layers whose candidates cost more the higher their rank, and whose damage falls with it."""
    groups = []
    for g in range(count):
        costs = np.sort(rng.choice(np.arange(20, 400), ranks, replace=False))
        errors = np.sort(rng.random(ranks) * 3)[::-1]
        dense = Candidate((f"l{g}",), DENSE, (), (), Cost(500, 500), 0.0)
        groups.append(
            [dense]
            + [
                Candidate((f"l{g}",), "svd", (r + 1,), (), Cost(int(c), int(c)), float(e))
                for r, (c, e) in enumerate(zip(costs, errors, strict=True))
            ]
        )
    return groups


def whole(groups: list[list[Candidate]]) -> Cost:
    return sum((group[0].cost for group in groups), NOTHING)


def macs(choice) -> int:
    return sum(c.cost.macs for c in choice)


def damage(choice) -> float:
    return math.fsum(c.error for c in choice)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.25, 0.4, 0.7])
def test_map_is_the_least_common_damage_within_the_budget(seed: int, share: float) -> None:
    groups = layers(np.random.default_rng(seed), 4)
    limit = share * whole(groups).macs
    reachable = []
    for level in sorted({c.error for group in groups for c in group}):
        choice = tuple(min((c for c in group if c.error <= level), key=lambda c: c.cost.macs) for group in groups)
        if macs(choice) <= limit:
            reachable.append(choice)
    assert enc_map(groups, [Budget("macs", share)], NOTHING, whole(groups)) == reachable[0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_model_is_never_worse_than_every_set_in_the_box(seed: int, share: float) -> None:
    groups = layers(np.random.default_rng(seed), 4)
    total = whole(groups)
    budgets = [Budget("macs", share)]
    ends = [enc_map(groups, [Budget("macs", share * (1 + sign * MARGIN))], NOTHING, total) for sign in (1, -1)]
    inside = [
        [c for c in group if high.error <= c.error <= low.error] for group, high, low in zip(groups, *ends, strict=True)
    ]
    assert space(groups, budgets, NOTHING, total) == inside
    every = [choice for choice in itertools.product(*inside) if macs(choice) <= share * total.macs]
    best = enc_model(groups, budgets, NOTHING, total)
    assert macs(best) <= share * total.macs
    in_band = [choice for choice in every if macs(choice) >= (1 - BAND) * share * total.macs]
    assert damage(best) == pytest.approx(min(map(damage, in_band or every)))
    if in_band:
        assert best in in_band


def test_the_edges_of_the_band_are_in_it() -> None:
    def at(cost: int, error: float, rank: int) -> Candidate:
        return Candidate(("l",), "svd", (rank,), (), Cost(cost, cost), error)

    dense = Candidate(("l",), DENSE, (), (), Cost(2000, 2000), 0.0)
    budget, total = [Budget("macs", 0.5)], Cost(2000, 2000)
    edge, below = at(995, 0.1, 2), at(994, 0.05, 1)
    assert several([[dense, edge, below]], budget, NOTHING, total, 2, BAND) == [(edge,)]
    assert several([[dense, at(1000, 0.2, 3), edge]], budget, NOTHING, total, 2, BAND) == [(edge,), (at(1000, 0.2, 3),)]
    with pytest.raises(OutOfReach):
        several([[dense, below]], budget, NOTHING, total, 1, BAND)
    # no set of ranks is as near as that: the best within the budget it is
    assert enc_model([[dense, below]], budget, NOTHING, total) == (below,)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_sets_come_in_order_and_none_is_left_out(seed: int) -> None:
    groups = layers(np.random.default_rng(seed), 3, 4)
    total, budgets = whole(groups), [Budget("macs", 0.5)]
    every = sorted((c for c in itertools.product(*groups) if macs(c) <= 0.5 * total.macs), key=damage)
    found = several(groups, budgets, NOTHING, total, 7)
    assert [damage(c) for c in found] == pytest.approx([damage(c) for c in every[:7]])
    assert len(set(found)) == len(found)
    assert len(several(groups, budgets, NOTHING, total, 10_000)) == len(every)


def test_the_combined_metric_is_scored_by_both_of_its_terms() -> None:
    rng = np.random.default_rng(3)
    energy = layers(rng, 3, 4)
    accuracy = [
        [
            c if c.dense else Candidate(c.layers, c.decomposition, c.rank, (), c.cost, float(rng.random() * 2))
            for c in group
        ]
        for group in energy
    ]
    total, budgets = whole(energy), [Budget("macs", 0.5)]

    def score(choice) -> float:
        places = [group.index(c) for group, c in zip(energy, choice, strict=True)]
        a_m = math.exp(-math.fsum(group[i].error for group, i in zip(accuracy, places, strict=True)))
        return a_m + math.exp(-damage(choice)) * macs(choice) / total.macs

    found = combined(energy, accuracy, budgets, NOTHING, total, 3)
    assert [(c.decomposition, c.rank) for c in found[0]]  # found by either view, told by place
    scores = []
    for choice in found:
        same = tuple(
            next(c for c in group if (c.decomposition, c.rank) == (picked.decomposition, picked.rank))
            for group, picked in zip(energy, choice, strict=True)
        )
        scores.append(score(same))
    assert scores == sorted(scores, reverse=True)
    alone = max(score(c) for c in enc_best(energy, budgets, NOTHING, total))
    assert scores[0] >= alone - 1e-12


@pytest.mark.parametrize("name", BUDGET_SOLVERS)
def test_every_solver_says_how_far_it_could_go(name: str) -> None:
    groups = layers(np.random.default_rng(0), 3)
    with pytest.raises(OutOfReach, match=r"macs=0.01 cannot be met: .* reach 0\.\d+ at the lowest rank"):
        BUDGET_SOLVERS[name](groups, [Budget("macs", 0.01)], NOTHING, whole(groups))


@pytest.mark.parametrize("name", BUDGET_SOLVERS)
def test_every_solver_holds_every_budget(name: str) -> None:
    groups = layers(np.random.default_rng(1), 4)
    total = whole(groups)
    budgets = [Budget("macs", 0.5), Budget("params", 0.45)]
    for choice in BUDGET_SOLVERS[name](groups, budgets, Cost(10, 20), total + Cost(10, 20)):
        assert macs(choice) + 10 <= 0.5 * (total.macs + 10)
        assert sum(c.cost.params for c in choice) + 20 <= 0.45 * (total.params + 20)


def test_the_network_chooses_among_many() -> None:
    groups = layers(np.random.default_rng(2), 5)
    found = BUDGET_SOLVERS["enc_inf"](groups, [Budget("macs", 0.5)], NOTHING, whole(groups))
    assert 1 < len(found) <= enc.TOP


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(LowRankError, match="no budget solver is called 'greedy': one of knapsack, enc_map"):
        find_solver("greedy")

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from onnx_lowrank.budgets import BUDGET_SOLVERS
from onnx_lowrank.budgets.knapsack import GAP, OutOfReach, knapsack
from onnx_lowrank.types import DENSE, Budget, Candidate, Cost, LowRankError, Plan

NOTHING = Cost(0, 0)


def candidate(name, macs, params, error):
    return Candidate((name,), "svd" if error else DENSE, (1,) if error else (), (), Cost(macs, params), error)


def random_groups(rng, scale=100):
    """Up to four groups of up to six candidates, the dense one first."""
    groups = []
    for g in range(rng.integers(1, 5)):
        macs, params = (np.sort(rng.integers(1, scale, rng.integers(1, 7)))[::-1] for _ in range(2))
        errors = [0.0, *rng.random(5)]
        groups.append([candidate(f"g{g}", *one) for one in zip(macs.tolist(), params.tolist(), errors, strict=False)])
    return groups


def cost_of(choices, rest=NOTHING):
    return sum((c.cost for c in choices), rest)


def dense_cost(groups, rest=NOTHING):
    return cost_of([group[0] for group in groups], rest)


def within(choices, budgets, rest, original):
    """As a plan reports it."""
    plan = Plan(tuple(choices), rest=rest, original=original)
    return all(plan.ratio(budget.metric) <= budget.ratio for budget in budgets)


def by_enumeration(groups, budgets, rest, original):
    """Least error of all choices within the budgets; infinity where there is none."""
    choices = itertools.product(*groups)
    return min((math.fsum(c.error for c in x) for x in choices if within(x, budgets, rest, original)), default=math.inf)


def check_against_enumeration(groups, budgets, rest=NOTHING):
    """The choice of the solver, held against all there are. True where there is one."""
    original = dense_cost(groups, rest)
    best = by_enumeration(groups, budgets, rest, original)
    if best == math.inf:
        with pytest.raises(OutOfReach):
            knapsack(groups, budgets, rest, original)
        return False
    choices = knapsack(groups, budgets, rest, original)
    assert [c.layers for c in choices] == [group[0].layers for group in groups]
    assert all(c in group for c, group in zip(choices, groups, strict=True))
    assert within(choices, budgets, rest, original)
    assert math.fsum(c.error for c in choices) <= best * (1 + 2 * GAP) + 1e-12
    return True


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_the_choice_within_one_budget_is_the_best_of_all_choices(metric):
    rng = np.random.default_rng(1)
    found = [check_against_enumeration(random_groups(rng), [Budget(metric, rng.uniform(0.05, 1))]) for _ in range(80)]
    assert 20 < sum(found) < 80  # both outcomes were met with


def test_the_choice_within_two_budgets_is_the_best_of_all_choices():
    rng = np.random.default_rng(2)
    found = [
        check_against_enumeration(
            random_groups(rng),
            [Budget("macs", rng.uniform(0.3, 1)), Budget("params", rng.uniform(0.3, 1))],
            Cost(*rng.integers(0, 20, 2).tolist()),
        )
        for _ in range(80)
    ]
    assert 20 < sum(found) < 80


def test_a_budget_exactly_at_the_cost_of_a_choice_allows_it_and_one_unit_less_does_not():
    """At every size of cost, though the solver itself lets a budget be missed by a millionth."""
    rng = np.random.default_rng(3)
    for scale in (10, 1_000, 10**6, 10**9, 10**11):
        for _ in range(20):
            groups = random_groups(rng, scale)
            total = dense_cost(groups).macs
            used = cost_of([group[rng.integers(len(group))] for group in groups]).macs
            check_against_enumeration(groups, [Budget("macs", used / total)])
            if used > 1:
                check_against_enumeration(groups, [Budget("macs", (used - 1) / total)])


def test_a_ratio_whose_product_is_rounded_below_a_whole_number_still_allows_it():
    assert 0.29 * 100 < 29
    groups = [[candidate("a", 100, 1, 0.0), candidate("a", 29, 1, 0.5)]]
    assert knapsack(groups, [Budget("macs", 0.29)], NOTHING, Cost(100, 1)) == (groups[0][1],)
    groups = [[candidate("a", 100, 1, 0.0), candidate("a", 30, 1, 0.5)]]
    with pytest.raises(OutOfReach):
        knapsack(groups, [Budget("macs", 0.29)], NOTHING, Cost(100, 1))


def test_no_candidate_is_taken_that_a_cheaper_one_of_the_same_error_beats():
    a = [candidate("a", 10, 10, 0.0), candidate("a", 6, 10, 0.3), candidate("a", 4, 10, 0.3)]
    (choice,) = knapsack([a], [Budget("macs", 0.5)], NOTHING, Cost(10, 10))
    assert choice == a[2]


def test_of_two_equal_choices_one_is_taken_and_the_same_one_every_time():
    groups = [[candidate(n, 10, 10, 0.0), candidate(n, 5, 5, 0.25)] for n in "ab"]
    first = knapsack(groups, [Budget("macs", 0.75)], NOTHING, Cost(20, 20))
    assert sorted(c.error for c in first) == [0, 0.25]
    assert knapsack(groups, [Budget("macs", 0.75)], NOTHING, Cost(20, 20)) == first


def test_a_budget_of_all_of_the_original_leaves_everything_dense():
    groups = random_groups(np.random.default_rng(4))
    original = dense_cost(groups)
    for budgets in ([Budget("macs", 1.0)], [Budget("macs", 1.0), Budget("params", 1.0)], []):
        assert all(c.dense for c in knapsack(groups, budgets, NOTHING, original))


def test_a_group_with_nothing_but_its_dense_candidate_takes_its_share_from_the_others():
    groups = [
        [candidate("fixed", 40, 1, 0.0)],
        [candidate("b", 60, 1, 0.0), candidate("b", 20, 1, 0.1), candidate("b", 10, 1, 0.2)],
    ]
    assert [c.error for c in knapsack(groups, [Budget("macs", 0.6)], NOTHING, Cost(100, 2))] == [0, 0.1]
    assert [c.error for c in knapsack(groups, [Budget("macs", 0.5)], NOTHING, Cost(100, 2))] == [0, 0.2]
    with pytest.raises(OutOfReach, match=r"^macs=0\.4 cannot be met: the layers .* reach 0\.500 at the lowest rank"):
        knapsack(groups, [Budget("macs", 0.4)], NOTHING, Cost(100, 2))


def test_only_dense_candidates_meet_only_a_budget_of_everything():
    groups = [[candidate("a", 10, 10, 0.0)]]
    assert knapsack(groups, [Budget("macs", 1.0)], NOTHING, Cost(10, 10)) == (groups[0][0],)
    with pytest.raises(OutOfReach, match=r"macs=0\.9 cannot be met: .* reach 1\.000 "):
        knapsack(groups, [Budget("macs", 0.9)], NOTHING, Cost(10, 10))


def test_what_no_group_covers_counts_against_the_budget():
    groups = [[candidate("a", 50, 1, 0.0), candidate("a", 10, 1, 0.1)]]
    original = Cost(100, 2)
    assert knapsack(groups, [Budget("macs", 0.6)], Cost(50, 1), original)[0].error == 0.1
    with pytest.raises(OutOfReach, match=r"macs=0\.55 cannot be met: .* reach 0\.600 "):
        knapsack(groups, [Budget("macs", 0.55)], Cost(50, 1), original)


def test_the_figure_of_a_budget_out_of_reach_can_be_asked_for():
    """It is rounded up: rounded down, the next try would fail as well."""
    groups = [[candidate("a", 30_000, 1, 0.0), candidate("a", 10_001, 1, 0.1)]]
    with pytest.raises(OutOfReach, match=r"macs=0\.333 .* reach 0\.334 "):
        knapsack(groups, [Budget("macs", 0.333)], NOTHING, Cost(30_000, 1))
    assert knapsack(groups, [Budget("macs", 0.334)], NOTHING, Cost(30_000, 1))[0].error == 0.1


def test_budgets_that_each_can_be_met_but_not_together_are_told_together():
    groups = [[candidate("a", 100, 100, 0.0), candidate("a", 20, 90, 0.1), candidate("a", 90, 20, 0.1)]]
    for metric in ("macs", "params"):
        assert knapsack(groups, [Budget(metric, 0.3)], NOTHING, Cost(100, 100))[0].error == 0.1
    both = [Budget("macs", 0.3), Budget("params", 0.25)]
    with pytest.raises(OutOfReach, match=r"^macs=0\.3, params=0\.25 cannot be met together: loosen one"):
        knapsack(groups, both, NOTHING, Cost(100, 100))


def test_out_of_reach_is_an_error_of_the_package():
    assert issubclass(OutOfReach, LowRankError)


def test_without_a_group_only_the_rest_has_to_fit():
    assert knapsack([], [Budget("macs", 0.5)], Cost(5, 5), Cost(10, 10)) == ()
    assert knapsack([], [], NOTHING, NOTHING) == ()
    with pytest.raises(OutOfReach, match=r"params=0\.4 cannot be met"):
        knapsack([], [Budget("params", 0.4)], Cost(5, 5), Cost(10, 10))


def test_errors_of_zero_everywhere_are_no_obstacle():
    groups = [[candidate("a", 10, 10, 0.0), Candidate(("a",), "svd", (1,), (), Cost(5, 5), 0.0)]]
    assert knapsack(groups, [Budget("macs", 0.5)], NOTHING, Cost(10, 10)) == (groups[0][1],)


def test_the_scale_of_errors_does_not_change_the_choice():
    rng = np.random.default_rng(5)
    groups = [
        [candidate(f"g{g}", 100, 100, 0.0)]
        + [candidate(f"g{g}", 10 * k, 10 * k, float(rng.random() / k)) for k in range(1, 9)]
        for g in range(6)
    ]
    picked = knapsack(groups, [Budget("macs", 0.4)], NOTHING, dense_cost(groups))
    for scale in (1e-9, 1e6):
        scaled = [
            [candidate(c.layers[0], c.cost.macs, c.cost.params, scale * c.error) for c in group] for group in groups
        ]
        again = knapsack(scaled, [Budget("macs", 0.4)], NOTHING, dense_cost(groups))
        assert [c.cost for c in again] == [c.cost for c in picked]


def test_several_hundred_layers_with_sixty_candidates_each_are_solved():
    """Held against Lagrange's bound, which proves by itself that nothing much better exists."""
    rng = np.random.default_rng(12)
    groups = []
    for g in range(200):
        size = int(10 ** rng.uniform(6, 8))
        shares = np.sort(rng.uniform(0.02, 0.9, 59))
        errors = (1 - shares) ** rng.uniform(1, 4) * rng.uniform(0.1, 1)
        rows = zip(shares, errors, strict=True)
        groups.append([candidate(f"g{g}", size, size, 0.0)])
        groups[-1] += [candidate(f"g{g}", int(s * size), int(s * size) + 1, float(e)) for s, e in rows]
    original = dense_cost(groups)
    choices = knapsack(groups, [Budget("macs", 0.4)], NOTHING, original)
    assert within(choices, [Budget("macs", 0.4)], NOTHING, original)
    limit = 0.4 * original.macs

    def bound(log_price: float) -> float:
        """No choice within the limit has a smaller error than this, whatever the price of a MAC."""
        price = math.exp(log_price)
        return sum(min(c.error + price * c.cost.macs for c in group) for group in groups) - price * limit

    best = minimize_scalar(lambda x: -bound(x), bounds=(math.log(1e-11), math.log(1e-7)), method="bounded")
    assert math.fsum(c.error for c in choices) <= (1 + 1e-4) * -best.fun


def test_the_table_holds_the_solver():
    groups = random_groups(np.random.default_rng(0))
    budgets = [Budget("macs", 1.0)]
    (picked,) = BUDGET_SOLVERS["knapsack"](groups, budgets, NOTHING, dense_cost(groups))
    assert picked == knapsack(groups, budgets, NOTHING, dense_cost(groups))


def test_many_layers_that_are_nearly_alike_end_with_a_plan_near_the_optimum():
    """Which of them takes a step more or less makes no difference, and a search tree without end."""
    rng, ranks = np.random.default_rng(0), np.arange(16, 820, 16)
    energy = np.cumsum(1 / np.arange(1024, 0, -1))[::-1]
    tail = np.sqrt(energy[ranks] / energy[0])
    groups = []
    for g in range(40):
        scale = 1 + 1e-3 * rng.standard_normal()
        made = [candidate(f"g{g}", 1, int(5120 * r), float(e * scale)) for r, e in zip(ranks, tail, strict=True)]
        groups.append([candidate(f"g{g}", 1, 1024 * 4096, 0.0), *made])
    original = dense_cost(groups)
    choices = knapsack(groups, [Budget("params", 0.4999)], NOTHING, original)
    assert cost_of(choices).params <= 0.4999 * original.params

    def bound(price):  # Lagrangian: no choice within the budget has less error than this
        best = sum(min(c.error + price * c.cost.params for c in group) for group in groups)
        return best - price * 0.4999 * original.params

    most = -minimize_scalar(lambda p: -bound(p * 1e-9), bounds=(0, 1e3), method="bounded").fun
    assert most <= sum(c.error for c in choices) <= most * (1 + 2e-3)

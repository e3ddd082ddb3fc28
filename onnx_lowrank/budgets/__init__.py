"""The table of budget solvers. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_lowrank.budgets.enc import enc_best, enc_map, enc_model
from onnx_lowrank.budgets.knapsack import knapsack
from onnx_lowrank.types import Budget, Candidate, Cost, member_of

Candidates = Sequence[Sequence[Candidate]]
Choices = tuple[Candidate, ...]

BudgetSolver = Callable[[Candidates, Sequence[Budget], Cost, Cost], "list[Choices]"]
"""Choices within budgets, the best first; of several the model itself tells the best."""


def _single(solver: Callable[[Candidates, Sequence[Budget], Cost, Cost], Choices]) -> BudgetSolver:
    return lambda candidates, budgets, rest, original: [solver(candidates, budgets, rest, original)]


BUDGET_SOLVERS: dict[str, BudgetSolver] = {
    "knapsack": _single(knapsack),
    "enc_map": _single(enc_map),
    "enc_model": _single(enc_model),
    "enc_inf": enc_best,
}

__all__ = ["BUDGET_SOLVERS", "BudgetSolver", "find_solver"]


def find_solver(name: str) -> BudgetSolver:
    """The member called `name`.

    Raises
    ------
    LowRankError
        For a name that is not in the table.
    """
    return member_of(BUDGET_SOLVERS, "budget solver", name)

"""The table of budget solvers. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_lowrank.budgets.knapsack import knapsack
from onnx_lowrank.types import Budget, Candidate, Cost

BudgetSolver = Callable[[Sequence[Sequence[Candidate]], Sequence[Budget], Cost, Cost], "tuple[Candidate, ...]"]

BUDGET_SOLVERS: dict[str, BudgetSolver] = {
    "knapsack": knapsack,
}

__all__ = ["BUDGET_SOLVERS", "BudgetSolver"]

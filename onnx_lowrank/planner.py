"""From layers to plans: candidates made once, and solved for as often as a search asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from onnx_lowrank.budgets import BUDGET_SOLVERS
from onnx_lowrank.candidates import Group, estimated_candidate, group_candidates, loaded
from onnx_lowrank.config import MEASURED, Config
from onnx_lowrank.decompositions import find_decomposition
from onnx_lowrank.graph.model import Model
from onnx_lowrank.parallel import run_all
from onnx_lowrank.ranks import parse_estimator
from onnx_lowrank.rewrite import FactorCache, LayerReport, rewrite
from onnx_lowrank.runtime import block_size
from onnx_lowrank.subject import Subject
from onnx_lowrank.types import Budget, Candidate, Cost, Plan, Progress, Skip

Outcome = TypeVar("Outcome")


class Planner:
    """A subject under a configuration, with what was computed for it so far."""

    def __init__(self, subject: Subject, config: Config, progress: Progress) -> None:
        for name in config.methods:
            find_decomposition(name)
        self.subject, self.config, self.progress = subject, config, progress
        self.seconds: dict[str, float] = {}
        # kernels are kept only for a search, which comes back to them: they may be as large as the model
        searches = config.max_drop is not None or any(budget.metric in MEASURED for budget in config.budget)
        self._cache = FactorCache() if searches else None
        self._candidates: list[tuple[Candidate, ...]] | None = None
        self._refused: tuple[Skip, ...] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def candidates(self) -> list[tuple[Candidate, ...]]:
        """Candidates of each group of the subject, the dense one first."""
        if self._candidates is None:
            block = self.config.align or block_size()
            made = self._for_each_group(partial(group_candidates, methods=self.config.methods, block=block))
            self._candidates = [candidates for candidates, _ in made]
            self._refused = tuple(skip for _, skip in made if skip)
        return self._candidates

    def _for_each_group(self, function: Callable[[Group], Outcome]) -> list[Outcome]:
        groups = self.subject.groups
        with self.stage("analyze"):
            return run_all(
                function,
                [partial(loaded, group) for group in groups],
                [group.layers[0].spec.params for group in groups],
                jobs=self.config.workers,
                progress=self.progress,
                stage="analyze",
            )

    @property
    def hopeless(self) -> bool:
        """True where no layer has a candidate that saves anything."""
        return all(len(candidates) == 1 for candidates in self.candidates())

    def skips(self) -> tuple[Skip, ...]:
        """Nodes left alone, so far as is known."""
        return self.subject.skips + self._refused

    def plan(self, choices: Sequence[Candidate], *notes: str) -> Plan:
        """A plan of `choices`, one for each group."""
        whole = self.subject.cost
        covered = sum((group.dense.cost for group in self.subject.groups), Cost(0, 0))
        rest = Cost(whole.macs - covered.macs, whole.params - covered.params)
        refused = {skip.layer for skip in self.skips()}
        spared = tuple(
            Skip(name, layer.op_type, "kept dense by the plan: other layers save as much at less error")
            for group, choice in zip(self.subject.groups, choices, strict=True)
            for name, layer in zip(group.names, group.layers, strict=True)
            if choice.dense and name not in refused
        )
        return Plan(tuple(choices), self.skips() + spared, rest, whole, self.subject.notes + notes)

    def dense(self, *notes: str) -> Plan:
        """The plan that changes nothing."""
        return self.plan([group.dense for group in self.subject.groups], *notes)

    def solve(self, budgets: Sequence[Budget]) -> Plan:
        """The plan of least predicted error within budgets on MACs and parameters."""
        candidates, dense = self.candidates(), self.dense()
        with self.stage("allocate"):
            return self.plan(BUDGET_SOLVERS["knapsack"](candidates, budgets, dense.rest, dense.original))

    def smallest(self, metric: str, *notes: str) -> Plan:
        """The plan that goes as far down in `metric` as the candidates allow."""
        return self.plan([min(group, key=lambda c: getattr(c.cost, metric)) for group in self.candidates()], *notes)

    def estimated(self) -> Plan:
        """The plan that a rank estimator makes, in the place of an allocation."""
        estimator = parse_estimator(self.config.rank or "vbmf")
        block = self.config.align or block_size()
        made = self._for_each_group(
            partial(estimated_candidate, methods=self.config.methods, estimator=estimator, block=block)
        )
        self._refused = tuple(item for item in made if isinstance(item, Skip))
        groups = self.subject.groups
        return self.plan([g.dense if isinstance(m, Skip) else m for g, m in zip(groups, made, strict=True)])

    def carry_out(self, plan: Plan) -> tuple[Model, tuple[LayerReport, ...]]:
        """The rewritten model, and what became of its layers."""
        subject = self.subject
        if all(choice.dense for choice in plan.choices):
            return subject.model, ()
        with self.stage("factorize"):
            return rewrite(
                subject.model,
                subject.found,
                subject.groups,
                plan,
                seed=self.config.seed,
                jobs=self.config.workers,
                progress=self.progress,
                cache=self._cache,
            )

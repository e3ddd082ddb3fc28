"""Plans: candidates solved for as often as a search asks, and carried out."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from onnx_lowrank.budgets import BUDGET_SOLVERS, find_solver
from onnx_lowrank.budgets.enc import TOP, combined
from onnx_lowrank.budgets.knapsack import OutOfReach, cheapest
from onnx_lowrank.cache import UNKEPT
from onnx_lowrank.cache.keys import source_key
from onnx_lowrank.candidates import pareto
from onnx_lowrank.config import MEASURED, Config
from onnx_lowrank.decompositions import find_decomposition, is_joint
from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.datafile import is_large
from onnx_lowrank.graph.model import Model
from onnx_lowrank.latency.engines import OnMNN
from onnx_lowrank.latency.sources import Table, check_target, filled_tables
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer_tasks import estimated_of, group_task, methods_key
from onnx_lowrank.planning.candidate_sets import CandidateSets, Policy
from onnx_lowrank.planning.fitting import Fitting
from onnx_lowrank.planning.placement import Placement
from onnx_lowrank.planning.run import Run
from onnx_lowrank.ranks import RANK_ESTIMATORS, parse_estimator
from onnx_lowrank.rewriting.rewrite import FactorCache, LayerReport, rewrite
from onnx_lowrank.subject import Subject
from onnx_lowrank.targets import Target, find_target
from onnx_lowrank.types import (
    Budget,
    Candidate,
    Cost,
    Factorization,
    LowRankError,
    Metric,
    Plan,
    Progress,
    Skip,
)

logger = logging.getLogger(__name__)

CHECKS = 4
"""Plans made in turn until the measured latency of one is near to what was asked."""

NEAR, AIM = 0.96, 0.985
"""Share of the latency asked for that a plan has to use, and that the next one aims at: below it by what repeats differ."""


class Planner(Run):
    """Plans for a subject under a configuration, and what was computed for them so far."""

    def __init__(self, subject: Subject, config: Config, progress: Progress, policy: Policy | None = None) -> None:
        for name in config.methods:
            find_decomposition(name)
        joint = [name for name in config.methods if is_joint(name)]
        if joint and config.damage in ("accuracy", "combined"):
            raise LowRankError(
                f"damage {config.damage} is measured of single layers: leave out {', '.join(joint)}, or take --damage output"
            )
        super().__init__(subject, config, progress)
        self._solver = find_solver(config.solver)
        self.placement = Placement(subject, self.target)
        self.timed_on_target = _times_are_of(self.target, config)
        check_target(subject, config, self.target)
        if config.needs_latency and not (self.timed_on_target or self.target.results):
            raise LowRankError(
                f"latency on target {self.target.name} cannot be told by {config.provider}: give a budget on macs or params "
                f"(--objective macs with --max-drop), or --provider {self.target.provider} where there is one"
            )
        self.policy = policy or Policy()
        self.fitting = Fitting(self, self.policy.plain)
        self.sets = CandidateSets(self, self.fitting, self.policy)
        # kernels are kept only for a search, which comes back to them: they may be as large as the model
        self._searches = config.max_drop is not None or any(budget.metric in MEASURED for budget in config.budget)
        self._cache: FactorCache | None = None
        self.scratch: Path | None = None
        """Folder for what a model too large for memory is made of on its way; without, all is in memory."""
        self._estimate_refused: tuple[Skip, ...] = ()
        self._table: Table | None = None
        self._tables: list[Table] = []
        self._latency_notes: tuple[str, ...] = ()

    @cached_property
    def engine(self) -> OnMNN | None:
        """What times models on the target in the place of ONNX Runtime; None where that does it itself."""
        if not self.target.engine:
            return None
        with self.stage("latency"):
            return OnMNN(self.subject, self.config, self.subject.feeds(self.config.batch_size))

    @property
    def hopeless(self) -> bool:
        """True where no layer has a candidate that saves anything."""
        return all(len(candidates) == 1 for candidates in self.sets.all())

    def skips(self) -> tuple[Skip, ...]:
        """Nodes left alone, so far as is known."""
        return self.subject.skips + (self._estimate_refused or self.sets.refused)

    def plan(self, choices: Sequence[Candidate], *notes: str) -> Plan:
        """A plan of `choices`, one for each group."""
        rest, whole = self._costs()
        refused = {skip.layer for skip in self.skips()}
        kept = {name for choice in choices if choice.dense for name in choice.layers}
        changed = any(not choice.dense for choice in choices)
        why = "kept dense by the plan: other layers save as much at less error" if changed else "no layer is changed"
        layers = [layer for group in self.subject.groups for layer in group.layers]
        spared = tuple(Skip(x.name, x.op_type, why) for x in layers if x.name in kept and (x.name not in refused))
        skips, notes = self.skips() + spared, self.subject.notes + notes
        return Plan(tuple(choices), skips, rest, whole, notes, fitted=self.fitting.wanted, dropped=self.subject.dropped)

    def _dense(self) -> list[Candidate]:
        """What leaves each group as it is."""
        dense = [group.dense for group in self.subject.groups]
        return [c for (c,) in self._table.priced([[c] for c in dense])] if self._table else dense

    def _costs(self) -> tuple[Cost, Cost]:
        """Cost of what no group covers, and of the whole model."""
        whole = self._table.original if self._table else self.subject.cost
        rest = whole + self.subject.added - sum((choice.cost for choice in self._dense()), Cost(0, 0))
        return (replace(rest, latency_ms=self._table.rest) if self._table else rest), whole

    def _with_biases(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Candidates with the biases that layers without one are given, for the correction of their mean."""
        return tuple(
            c if c.dense else replace(c, cost=c.cost + Cost(0, sum(self._bare.get(name, 0) for name in c.layers)))
            for c in candidates
        )

    @cached_property
    def _bare(self) -> dict[str, int]:
        """Output channels of layers that may come to have a bias and have none."""
        known = any(node.op_type == "BatchNormalization" for node in self.subject.model.graph.node)
        corrected = self.fitting.wanted or (known and not self.policy.plain)
        layers = [layer for group in self.subject.groups for layer in group.layers] if corrected else []
        return {x.name: x.spec.out_channels for x in layers if not x.bias and x.op_type != "MatMul"}

    def dense(self, *notes: str) -> Plan:
        """The plan that changes nothing."""
        return self.plan(self._dense(), *notes)

    def counts(self, metric: Metric) -> Metric:
        """What a plan counts `metric` by: itself where the plan knows it, else what stands for it."""
        if metric == "latency" and self._timed():
            return metric
        return MEASURED.get(metric, metric)

    def _timed(self) -> bool:
        """Whether the latency of candidates is known; it is measured here where the configuration needs it."""
        if self._table is None and not self._latency_notes and self.config.needs_latency:
            candidates = self.sets.all()
            engine = self.engine
            with self.stage("latency"):
                self._tables, self._latency_notes = filled_tables(
                    self.subject, self.config, self.target, engine, self.block, candidates, self.progress
                )
            self._table = next(iter(self._tables), None)
        return self._table is not None

    @property
    def unrest(self) -> float:
        """How much times varied while plans were made by them: 1 where they did not, or none were measured here."""
        return max((table.unrest for table in self._tables if isinstance(table, LatencyTable)), default=1.0)

    def _best(self, make: Callable[[], Plan], worth: Callable[[Plan], float]) -> Plan:
        """The best of what is made by each table of times; the one it was made by is that of all that follows.

        Raises
        ------
        OutOfReach
            Where none allows it.
        """
        if len(self._tables) < 2:
            return make()
        made: list[tuple[float, int, Plan]] = []
        for number, table in enumerate(self._tables):
            self._table = table
            try:
                plan = make()
            except OutOfReach as error:
                refused = error
                continue
            logger.info("table %d: latency %.3f, damage %.4g", number, plan.ratio("latency"), worth(plan))
            made.append((worth(plan), number, plan))
        if not made:
            raise refused
        _, number, plan = min(made, key=lambda item: item[:2])
        self._table = self._tables[number]
        return plan

    def solve(self, budgets: Sequence[Budget]) -> Plan:
        """The plan of least predicted error within budgets on MACs, parameters and (predicted) latency.

        Raises
        ------
        OutOfReach
            Where there is none.
        """
        return self._best(lambda: self._solved(self.sets.all(), budgets), lambda plan: plan.error)

    def _allocated(self, candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget]) -> Plan:
        """As :meth:`solve`, but made again until the whole plan, measured, takes about as long as it may."""
        aims = {budget.metric: budget.ratio for budget in budgets}
        plan = self._solved(candidates, budgets)
        asked = aims.get("latency")
        if asked is None or self._table is None:
            return plan
        tried: list[tuple[float, Plan]] = []
        factors: list[float] = []
        for _ in range(CHECKS):
            planned, reached = plan.ratio("latency"), self.check(plan)
            logger.info("latency: planned %.3f, measured %.3f", planned, reached)
            # one measurement may be of a bad moment: what all say of planned times counts as much as it does
            factors.append(reached / planned)
            usual = float(np.median(factors))
            likely = math.sqrt(reached * planned * usual)
            tried.append((likely, plan))
            if NEAR * asked <= likely <= asked:
                break
            aims["latency"] = min(AIM * asked / usual, 1.0)
            try:
                plan = self._solved(candidates, [Budget(metric, ratio) for metric, ratio in aims.items()])
            except OutOfReach:
                break
        return min(tried, key=lambda each: (each[0] > asked, abs(each[0] - asked)))[1]

    def check(self, plan: Plan) -> float:
        """Measured share of the original's latency of a plan, kernels apart; later plans know what was seen of its layers."""
        assert self._table is not None
        with self.stage("latency"):
            return self._table.check(plan)

    def _solved(self, candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget]) -> Plan:
        return self._plans(candidates, budgets)[0]

    def _plans(self, candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget]) -> list[Plan]:
        """What the solver makes of the candidates that are worth something by the metrics of `budgets`, the best first."""
        with self.stage("allocate"):
            rest, whole = self._costs()
            views = [candidates] if self.sets.by_accuracy is None else [candidates, self.sets.by_accuracy]
            priced = [self._table.priced(view) if self._table else view for view in views]
            priced = [[self._with_biases(group) for group in view] for view in priced]
            if self.config.damage == "combined":
                count = TOP if self.config.solver == "enc_inf" else 1
                picked = combined(priced[0], priced[1], budgets, rest, whole, count)
            else:
                worth = [_worth(group, budgets) for group in priced[-1]]
                picked = self._solver(worth, budgets, rest, whole)
            plans = [self.plan(choices, *self._latency_notes) for choices in picked]
            return [replace(plan, candidates=tuple(map(tuple, priced[-1]))) for plan in plans]

    def alternatives(self, budgets: Sequence[Budget]) -> list[Plan]:
        """Plans within budgets, the likeliest first, of which only the model itself can tell the best.

        Measured damages are those of layers changed alone, and those of all of them do not quite add up. A second plan
        goes by the mean of the damage and the plain error of each layer.
        """
        if self._solver is not BUDGET_SOLVERS["knapsack"] or self.config.damage == "combined":
            return self._plans(self.sets.all(), budgets)
        first = self._best(lambda: self._allocated(self.sets.all(), budgets), lambda plan: plan.error)
        if self.sets.unmeasured is None:
            return [first]
        halfway = [
            tuple(replace(c, error=math.sqrt(c.error * plain.error)) for c, plain in zip(group, plains, strict=True))
            for group, plains in zip(self.sets.all(), self.sets.unmeasured, strict=True)
        ]
        second = self._allocated(halfway, budgets)
        ranks = [[(c.decomposition, c.rank) for c in plan.choices] for plan in (first, second)]
        return [first] if ranks[0] == ranks[1] else [first, second]

    def smallest(self, metric: Metric, *notes: str) -> Plan:
        """The plan that goes as far down in `metric` as the candidates allow."""

        def made() -> Plan:
            candidates = self._table.priced(self.sets.all()) if self._table else self.sets.all()
            return self.plan(cheapest(candidates, metric), *notes)

        return self._best(made, lambda plan: plan.ratio(metric))

    def estimated(self) -> Plan:
        """The plan that a rank estimator makes, in the place of an allocation."""
        text = self.config.rank or "vbmf"
        estimator = parse_estimator(text)
        alone = tuple(name for name in self.config.methods if not is_joint(name))
        known = text, source_key(RANK_ESTIMATORS[text.partition("=")[0].strip()])
        made = self.for_each_group(
            estimated_of,
            [
                group_task(
                    group,
                    *(alone, estimator, self.block, self.target.formats.refuses),
                    size=group.dense.cost.params,
                    key=(methods_key(*alone), known, self.block, self.target.formats),
                )
                for group in self.subject.groups
            ],
        )
        self._estimate_refused = tuple(item for item in made if isinstance(item, Skip))
        groups = self.subject.groups
        return self.plan([g.dense if isinstance(m, Skip) else m for g, m in zip(groups, made, strict=True)])

    def on_target(self, plan: Plan) -> Plan:
        """`plan` less what the target does not take, or takes in more parts than the original."""
        if self.target.ops is None:
            return self.placement.held(plan, self._dense())
        with self.stage("partitions"):
            return self.placement.held(plan, self._dense())

    def take(self, choice: Candidate, made: Factorization) -> None:
        """Let `choice` be carried out with kernels made elsewhere, where nothing is fitted to samples."""
        self._cache = self._cache or FactorCache()
        self._cache.put(choice, made)

    def carry_out(self, plan: Plan, *, fit: bool = True) -> tuple[Model, tuple[LayerReport, ...]]:
        """The rewritten model, and what became of its layers; without `fit` by the weights alone.

        The external data of a large one are in a folder of its own.
        """
        subject = self.subject
        model: Model = subject.model
        layers: tuple[LayerReport, ...] = ()
        if all(choice.dense for choice in plan.choices):
            if self.config.dequantize and self.config.quantize == "none":  # it was brought back for its layers alone
                model = subject.given
        else:
            large = self.scratch is not None and is_large(model)
            if self._searches and self._cache is None:
                self._cache = FactorCache(self.scratch if large else None)
            with self.stage("factorize"):
                model, layers = rewrite(
                    model,
                    subject.found,
                    subject.groups,
                    plan,
                    seed=self.config.seed,
                    work=self.work,
                    kept=self.kept if fit else UNKEPT,
                    progress=self.progress,
                    cache=self._cache,
                    feeds=self.fitting.with_room() if fit else None,
                    statistics=self.fitting.statistics if fit and (self.sets.joint or self.fitting.tied) else {},
                    correct=not self.policy.plain,
                    folder=Path(tempfile.mkdtemp(prefix="result-", dir=self.scratch)) if large else None,
                )
        if self.config.finetune == "none" or not layers:  # what is trained needs them until then
            model = self.finished(model)
        return model, layers

    def finished(self, model: Model) -> Model:
        """`model` with its normalisations folded, where that is asked for."""
        if not self.config.fold_batchnorm:
            return model
        model = model.copy()
        fold_batchnorm(model)
        return model


def _times_are_of(target: Target, config: Config) -> bool:
    """Whether what the models are timed on is the target."""
    short = target.provider.removesuffix("ExecutionProvider")
    if target.engine or target.results:
        return target.engine
    return target is find_target("cpu") or config.provider.lower() in (target.provider.lower(), short.lower())


def _worth(candidates: Sequence[Candidate], budgets: Sequence[Budget]) -> list[Candidate]:
    """Candidates that none beats; where time counts, none that takes as long as the layer itself."""
    dense = [c for c in candidates if c.dense]
    if dense and any(budget.metric == "latency" for budget in budgets):
        candidates = [c for c in candidates if c.dense or c.cost.latency_ms < dense[0].cost.latency_ms]
    return [*dense, *pareto([c for c in candidates if not c.dense])]

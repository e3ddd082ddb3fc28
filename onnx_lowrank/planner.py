"""From layers to plans: candidates made once, and solved for as often as a search asks."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from onnx_lowrank.budgets import BUDGET_SOLVERS, find_solver
from onnx_lowrank.budgets.enc import TOP, combined
from onnx_lowrank.budgets.knapsack import OutOfReach, cheapest
from onnx_lowrank.cache import UNKEPT, Kept, environment, open_store
from onnx_lowrank.cache.keys import source_key
from onnx_lowrank.calibrate import Batch, collect, count, held_apart, patch_length, together
from onnx_lowrank.candidates import (
    Group,
    estimated_candidate,
    group_candidates,
    group_task,
    loaded_task,
    methods_key,
    pareto,
)
from onnx_lowrank.config import MEASURED, METHODS, Config
from onnx_lowrank.decompositions import find_decomposition, is_joint
from onnx_lowrank.engines import OnMNN
from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.datafile import is_large
from onnx_lowrank.graph.kernels import model_digest
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.sections import alike
from onnx_lowrank.parallel import Task, Work, run_all
from onnx_lowrank.placement import Placement
from onnx_lowrank.randomized import exactly
from onnx_lowrank.ranks import RANK_ESTIMATORS, parse_estimator
from onnx_lowrank.rewrite import FactorCache, LayerReport, rewrite
from onnx_lowrank.runtime import block_size, processor, version
from onnx_lowrank.sensitivity import agreeing, interpolated, measured
from onnx_lowrank.subject import Subject, open_config_data
from onnx_lowrank.tables import Table, check_target, filled_tables
from onnx_lowrank.targets import Target, find_target
from onnx_lowrank.types import (
    Budget,
    Candidate,
    Cost,
    Factorization,
    Layer,
    LayerStatistics,
    LowRankError,
    Metric,
    Plan,
    Progress,
    Skip,
)

logger = logging.getLogger(__name__)

CALIBRATION_SAMPLES = 2048
"""Samples that layers are fitted on at most; a few hundred do nearly as well."""

BATCH, BATCH_BYTES = 64, 1 << 23
"""Samples run at a time, and bytes of their inputs: a few times as much is alive inside the network."""

QUICK_KERNEL = 1 << 17
"""Elements of a kernel up to which CP is tried by default: a larger one takes seconds to half a minute, each."""

QUICK_PATCH = 1152
"""Length of the input patches up to which iterative fits to data are tried by default."""

CLOSED_FORM = ("svd", "channel_svd")
"""The fits to data without iterations."""

FITTING_BYTES = 4 << 30
"""Most bytes of activations kept for fitting layers one after the other: of large pictures, fewer samples are used."""

EVERY_RANK = 1 << 20
"""More ranks than any mode has."""

CHECKS = 4
"""Plans made in turn until the measured latency of one is near to what was asked."""

NEAR, AIM = 0.96, 0.985
"""Share of the latency asked for that a plan has to use, and that the next one aims at: below it by what repeats differ."""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Policy:
    """What a recipe lays down about the making of plans.

    Parameters
    ----------
    methods
        Those of each group, by its place among all; None for those of the configuration.
    every_rank
        Whether the ranks tried are all there are, and not a grid of them.
    plain
        Kernels are those of the weights alone, and no bias is corrected.
    """

    methods: Callable[[int, Group], tuple[str, ...]] | None = None
    every_rank: bool = False
    plain: bool = False


class Planner:
    """A subject under a configuration, with what was computed for it so far."""

    def __init__(self, subject: Subject, config: Config, progress: Progress, policy: Policy | None = None) -> None:
        for name in config.methods:
            find_decomposition(name)
        joint = [name for name in config.methods if is_joint(name)]
        if joint and config.damage in ("accuracy", "combined"):
            raise LowRankError(
                f"damage {config.damage} is measured of single layers: leave out {', '.join(joint)}, or take --damage output"
            )
        self._solver, self.target = find_solver(config.solver), find_target(config.target)
        self.placement = Placement(subject, self.target)
        self.timed_on_target = _times_are_of(self.target, config)
        check_target(subject, config, self.target)
        if config.needs_latency and not (self.timed_on_target or self.target.results):
            raise LowRankError(
                f"latency on target {self.target.name} cannot be told by {config.provider}: give a budget on macs or params "
                f"(--objective macs with --max-drop), or --provider {self.target.provider} where there is one"
            )
        self.subject, self.config, self.progress = subject, config, progress
        self.policy = policy or Policy()
        self.work = Work(config.workers, config.cluster, open_store())
        self.seconds: dict[str, float] = {}
        # kernels are kept only for a search, which comes back to them: they may be as large as the model
        searches = config.max_drop is not None or any(budget.metric in MEASURED for budget in config.budget)
        self._searches = searches
        self._cache: FactorCache | None = None
        self.scratch: Path | None = None
        """Folder for what a model too large for memory is made of on its way; without, all is in memory."""
        self._candidates: list[tuple[Candidate, ...]] | None = None
        self._unmeasured: list[tuple[Candidate, ...]] | None = None
        self._by_accuracy: list[tuple[Candidate, ...]] | None = None
        self._table: Table | None = None
        self._tables: list[Table] = []
        self._latency_notes: tuple[str, ...] = ()
        self._refused: tuple[Skip, ...] = ()
        self.fitted_on = 0, 0
        """Samples that layers were fitted on one after the other, of how many."""
        self._feeds: list[Batch] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        try:
            with exactly(self.config.exact):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def candidates(self) -> list[tuple[Candidate, ...]]:
        """Candidates of each group of the subject, the dense one first."""
        if self._candidates is None:
            damage = self.config.damage
            seen = self.statistics if damage in ("output", "weights") else {}
            made = self._for_each_group(
                _candidates_of,
                [
                    self._candidates_task(group, self._methods(index, group), _of_group(group, seen))
                    for index, group in enumerate((*self.subject.groups, *self.joint))
                ],
            )
            single = len(self.subject.groups)
            alone = [candidates for candidates, _ in made[:single]]
            together = [candidates[1:] for candidates, _ in made[single:] if len(candidates) > 1]
            self._candidates = [*alone, *together]
            if damage == "output" and self.fits:
                self._unmeasured = self._candidates
                seen_alone = self._on_samples(alone, partial(measured, statistics=seen))
                self._candidates = [*seen_alone, *(_as_measured(group, alone, seen_alone) for group in together)]
            elif damage in ("accuracy", "combined"):
                self._by_accuracy = self._on_samples(alone, agreeing)
            self._refused = tuple(skip for _, skip in made[:single] if skip)
        return self._candidates

    @property
    def known_candidates(self) -> Sequence[tuple[Candidate, ...]]:
        """Candidates of each group as plans see them, so far as any plan asked for them; empty where none did."""
        return self._by_accuracy or self._candidates or ()

    @property
    def block(self) -> int:
        """Multiple that ranks are kept to."""
        return self.config.align or self.target.block or block_size()

    @cached_property
    def joint(self) -> tuple[Group, ...]:
        """Layers that repeat, as groups to decompose together, where a method for that is asked for.

        Of a section whose layers differ in their input channels, those of the commonest number make a group too.
        """
        if not any(is_joint(name) for name in self.config.methods):
            return ()
        groups = []
        for section in self.subject.sections:
            same = alike(section.layers)
            groups += [Group(section.layers, joint=True)]
            groups += [Group(same, joint=True)] if 1 < len(same) < len(section.layers) else []
        return tuple(groups)

    @property
    def fits(self) -> bool:
        """Whether kernels are fitted to samples."""
        return self.config.calibrate is not None and not self.policy.plain

    def apart(self) -> list[Batch]:
        """Samples that nothing was fitted to."""
        feeds = self.calibration() or []
        return held_apart(feeds)[1] if self.fits else feeds

    def _on_samples(
        self, candidates: Sequence[tuple[Candidate, ...]], measure: Callable[..., list[tuple[Candidate, ...]]]
    ) -> list[tuple[Candidate, ...]]:
        """Candidates with what a measurement on the model itself makes of their errors."""
        with self.stage("sensitivity"):
            return measure(
                self.subject.model,
                self.subject.found,
                self.subject.groups,
                candidates,
                feeds=self.apart(),
                seed=self.config.seed,
                work=self.work,
                kept=self.kept,
                progress=self.progress,
            )

    @cached_property
    def kept(self) -> Kept:
        """Results kept of runs of this model on this machine."""
        runs = version(), processor(), os.cpu_count(), self.config.exact
        return (
            Kept(self.work.store).under(environment(), runs, model_digest(self.subject.model))
            if self.work.store
            else UNKEPT
        )

    @cached_property
    def engine(self) -> OnMNN | None:
        """What times models on the target in the place of ONNX Runtime; None where that does it itself."""
        if not self.target.engine:
            return None
        with self.stage("latency"):
            return OnMNN(self.subject, self.config, self.subject.feeds(self.config.batch_size))

    def _methods(self, index: int, group: Group) -> tuple[str, ...]:
        """The methods for a group: those asked for, or by default those whose fit is a matter of seconds."""
        if self.policy.methods is not None:
            return self.policy.methods(index, group)
        methods, spec = self.config.methods, group.layers[0].spec
        if group.joint or methods != METHODS:
            return methods
        if self.config.calibrate is not None:
            return methods if patch_length(spec) <= QUICK_PATCH else CLOSED_FORM
        return methods if spec.params <= QUICK_KERNEL else tuple(name for name in methods if name != "cp3")

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """What the layers see, where there are samples to fit to; those that read one kernel, what they see together."""
        feeds = self.calibration()
        if feeds is None or not self.fits:
            return {}
        with self.stage("calibrate"):
            seen = collect(
                self.subject.model,
                self.subject.found,
                [name for group in self.subject.groups for name in group.names],
                held_apart(feeds)[0],
                seed=self.config.seed,
                kept=self.kept,
                progress=self.progress,
            )
        for names in self._tied:
            seen |= dict.fromkeys(names, together([seen[name] for name in names])) if names[0] in seen else {}
        return seen

    @property
    def _tied(self) -> list[tuple[str, ...]]:
        """Names of the layers of each group that reads one kernel several times."""
        return [group.names for group in self.subject.groups if len(group.layers) > 1]

    def _candidates_task(
        self, group: Group, methods: tuple[str, ...], seen: list[LayerStatistics] | None
    ) -> Task[tuple[Any, ...]]:
        most = EVERY_RANK if self.policy.every_rank else None
        levels = self.config.damage in ("energy", "accuracy", "combined")
        return group_task(
            group,
            *(methods, seen, self.block, most, levels, self.target.refuses),
            size=group.dense.cost.params,
            key=(methods_key(*methods), seen, self.block, most, levels, self._target_key),
        )

    @property
    def _target_key(self) -> tuple[Any, ...]:
        """All that :meth:`Target.refuses` goes by."""
        return self.target.name, self.target.spatial

    def _for_each_group(
        self, function: Callable[[tuple[Any, ...]], Outcome], tasks: Sequence[Task[tuple[Any, ...]]]
    ) -> list[Outcome]:
        with self.stage("analyze"):
            return run_all(function, tasks, loaded_task, work=self.work, progress=self.progress, stage="analyze")

    def calibration(self) -> list[Batch] | None:
        """Samples for fitting, batch by batch; None where the user gave none."""
        if self._feeds is None and self.config.calibrate is not None:
            data = open_config_data("calibrate", self.subject.inputs, self.config)
            assert data is not None
            shapes = self.subject.sample_shapes
            size = sum(item.dtype.itemsize * math.prod(shapes[item.name]) for item in self.subject.inputs)
            batch = max(1, min(BATCH, BATCH_BYTES // max(size, 1)))
            self._feeds = [feeds for feeds, _ in data.take(CALIBRATION_SAMPLES).batches(batch)]
        return self._feeds

    @property
    def hopeless(self) -> bool:
        """True where no layer has a candidate that saves anything."""
        return all(len(candidates) == 1 for candidates in self.candidates())

    def skips(self) -> tuple[Skip, ...]:
        """Nodes left alone, so far as is known."""
        return self.subject.skips + self._refused

    def plan(self, choices: Sequence[Candidate], *notes: str) -> Plan:
        """A plan of `choices`, one for each group."""
        rest, whole = self._costs()
        refused = {skip.layer for skip in self.skips()}
        kept = {name for choice in choices if choice.dense for name in choice.layers}
        changed = any(not choice.dense for choice in choices)
        why = "kept dense by the plan: other layers save as much at less error" if changed else "no layer is changed"
        layers = [layer for group in self.subject.groups for layer in group.layers]
        spared = tuple(Skip(x.name, x.op_type, why) for x in layers if x.name in kept and (x.name not in refused))
        return Plan(tuple(choices), self.skips() + spared, rest, whole, self.subject.notes + notes)

    def _dense(self) -> list[Candidate]:
        """What leaves each group as it is."""
        dense = [group.dense for group in self.subject.groups]
        return [c for (c,) in self._table.priced([[c] for c in dense])] if self._table else dense

    def _costs(self) -> tuple[Cost, Cost]:
        """Cost of what no group covers, and of the whole model."""
        whole = self._table.original if self._table else self.subject.cost
        rest = whole - sum((choice.cost for choice in self._dense()), Cost(0, 0))
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
        corrected = self.fits or (known and not self.policy.plain)
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
            candidates = self.candidates()
            engine = self.engine
            with self.stage("latency"):
                self._tables, self._latency_notes = filled_tables(
                    self.subject, self.config, self.target, engine, self.block, candidates, self.progress
                )
            self._table = next(iter(self._tables), None)
        return self._table is not None

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
        return self._best(lambda: self._solved(self.candidates(), budgets), lambda plan: plan.error)

    def _allocated(self, candidates: Sequence[Sequence[Candidate]], budgets: Sequence[Budget]) -> Plan:
        """As :meth:`solve`, but made again until the whole plan, measured, takes about as long as it may."""
        aims = {budget.metric: budget.ratio for budget in budgets}
        plan = self._solved(candidates, budgets)
        asked = aims.get("latency")
        if asked is None or self._table is None:
            return plan
        tried: list[tuple[float, Plan]] = []
        for _ in range(CHECKS):
            reached = self.check(plan)
            logger.info("latency: planned %.3f, measured %.3f", plan.ratio("latency"), reached)
            tried.append((reached, plan))
            if NEAR * asked <= reached <= asked:
                break
            aims["latency"] = min(aims["latency"] * AIM * asked / reached, 1.0)
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
            views = [candidates] if self._by_accuracy is None else [candidates, self._by_accuracy]
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
            return self._plans(self.candidates(), budgets)
        first = self._best(lambda: self._allocated(self.candidates(), budgets), lambda plan: plan.error)
        if self._unmeasured is None or self._candidates is None:
            return [first]
        halfway = [
            tuple(replace(c, error=math.sqrt(c.error * plain.error)) for c, plain in zip(group, plains, strict=True))
            for group, plains in zip(self._candidates, self._unmeasured, strict=True)
        ]
        second = self._allocated(halfway, budgets)
        ranks = [[(c.decomposition, c.rank) for c in plan.choices] for plan in (first, second)]
        return [first] if ranks[0] == ranks[1] else [first, second]

    def smallest(self, metric: Metric, *notes: str) -> Plan:
        """The plan that goes as far down in `metric` as the candidates allow."""

        def made() -> Plan:
            candidates = self._table.priced(self.candidates()) if self._table else self.candidates()
            return self.plan(cheapest(candidates, metric), *notes)

        return self._best(made, lambda plan: plan.ratio(metric))

    def estimated(self) -> Plan:
        """The plan that a rank estimator makes, in the place of an allocation."""
        text = self.config.rank or "vbmf"
        estimator = parse_estimator(text)
        alone = tuple(name for name in self.config.methods if not is_joint(name))
        known = text, source_key(RANK_ESTIMATORS[text.partition("=")[0].strip()])
        made = self._for_each_group(
            _estimated_of,
            [
                group_task(
                    group,
                    *(alone, estimator, self.block, self.target.refuses),
                    size=group.dense.cost.params,
                    key=(methods_key(*alone), known, self.block, self._target_key),
                )
                for group in self.subject.groups
            ],
        )
        self._refused = tuple(item for item in made if isinstance(item, Skip))
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
        if not all(choice.dense for choice in plan.choices):
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
                    feeds=self._fitting() if fit else None,
                    statistics=self.statistics if fit and (self.joint or self._tied) else {},
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

    def _fitting(self) -> list[Batch] | None:
        """Samples that the layers are fitted on: as many as have room with all that is alive in both networks."""
        feeds = self.calibration()
        if feeds is None:
            return None
        alive = max((_alive(layer) for layer in self.subject.found.layers), default=0)
        room, few = FITTING_BYTES, list[Batch]()
        for batch in feeds:
            room -= alive * count([batch])
            if few and room < 0:
                break
            few.append(batch)
        self.fitted_on = count(few), count(feeds)
        return few


def _times_are_of(target: Target, config: Config) -> bool:
    """Whether what the models are timed on is the target."""
    short = target.provider.removesuffix("ExecutionProvider")
    if target.engine or target.results:
        return target.engine
    return target is find_target("cpu") or config.provider.lower() in (target.provider.lower(), short.lower())


def _alive(layer: Layer) -> int:
    """Bytes of a sample at a layer: its input, output and one more of that size, in two networks."""
    spec = layer.spec
    after = spec.output_size(layer.input_size)
    into, out = spec.in_channels * math.prod(layer.input_size), spec.out_channels * math.prod(after)
    return 8 * layer.batch * (into + 2 * out)


def _worth(candidates: Sequence[Candidate], budgets: Sequence[Budget]) -> list[Candidate]:
    """Candidates that none beats; where time counts, none that takes as long as the layer itself."""
    dense = [c for c in candidates if c.dense]
    if dense and any(budget.metric == "latency" for budget in budgets):
        candidates = [c for c in candidates if c.dense or c.cost.latency_ms < dense[0].cost.latency_ms]
    return [*dense, *pareto([c for c in candidates if not c.dense])]


def _as_measured(
    together: Sequence[Candidate],
    plain: Sequence[Sequence[Candidate]],
    seen: Sequence[Sequence[Candidate]],
) -> tuple[Candidate, ...]:
    """Candidates over several layers, with the damages that errors of this size do in each of them alone."""
    points = {
        before[0].layers[0]: [(b.error, a.error) for b, a in zip(before, after, strict=True) if not b.dense]
        for before, after in zip(plain, seen, strict=True)
    }
    return tuple(
        replace(
            c,
            error=math.fsum(
                interpolated(points[name], c.error / len(c.layers)) if points[name] else c.error for name in c.layers
            ),
        )
        for c in together
    )


def _of_group(group: Group, seen: Mapping[str, LayerStatistics]) -> list[LayerStatistics] | None:
    """What the layers of a group see; None unless it is known of all that have a kernel of their own."""
    names = [layer.name for layer in group.owners]
    return [seen[name] for name in names] if all(name in seen for name in names) else None


def _candidates_of(given: tuple[Any, ...]) -> tuple[tuple[Candidate, ...], Skip | None]:
    group, methods, seen, block, most, levels, refuses = given
    return group_candidates(group, methods, block, seen, most=most, levels=levels, refuses=refuses)


def _estimated_of(given: tuple[Any, ...]) -> Candidate | Skip:
    return estimated_candidate(*given)

"""The candidates of every group of layers, as a recipe wants them, with what samples say of their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from onnx_lowrank.calibration.moments import patch_length
from onnx_lowrank.calibration.sensitivity import agreeing, interpolated, measured
from onnx_lowrank.candidates import Group
from onnx_lowrank.config import METHODS
from onnx_lowrank.decompositions import find_decomposition, fits_to, is_joint, lift
from onnx_lowrank.graph.sections import alike
from onnx_lowrank.layer_tasks import candidates_of, group_task, methods_key
from onnx_lowrank.planning.fitting import Fitting
from onnx_lowrank.planning.run import Run
from onnx_lowrank.types import Candidate, LayerStatistics, Skip
from onnx_lowrank.work.tasks import Task

QUICK_KERNEL = 1 << 17
"""Elements of a kernel up to which CP is tried by default: a larger one takes seconds to half a minute, each."""

QUICK_PATCH = 1152
"""Length of the input patches up to which iterative fits to data are tried by default."""

CLOSED_FORM = ("svd", "channel_svd")
"""The fits to data without iterations."""

EVERY_RANK = 1 << 20
"""More ranks than any mode has."""

Set = tuple[Candidate, ...]
"""Candidates of one group, the dense one first; over several groups at once, none that is dense."""


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


class CandidateSets:
    """What each group of a run could become; made when it is asked for first."""

    def __init__(self, run: Run, fitting: Fitting, policy: Policy) -> None:
        self._run, self._fitting, self._policy = run, fitting, policy
        self._all: list[Set] | None = None
        self.unmeasured: list[Set] | None = None
        """With the errors of each layer alone, where :meth:`all` has what they do to the outputs."""
        self.by_accuracy: list[Set] | None = None
        """With losses of agreement in the place of errors, where these are what counts."""
        self.refused: tuple[Skip, ...] = ()
        """Layers that nothing could be made of, so far as is known."""

    def all(self) -> list[Set]:
        """Those of each group of the subject, then those over several."""
        if self._all is None:
            self._make()
        assert self._all is not None
        return self._all

    @property
    def known(self) -> Sequence[Set]:
        """As plans see them, so far as any plan asked for them; empty where none did."""
        return self.by_accuracy or self._all or ()

    @cached_property
    def joint(self) -> tuple[Group, ...]:
        """Layers that repeat, as groups to decompose together, where a method for that is asked for.

        Of a section whose layers differ in their input channels, those of the commonest number make a group too.
        """
        if not any(is_joint(name) for name in self._run.config.methods):
            return ()
        groups = []
        for section in self._run.subject.sections:
            same = alike(section.layers)
            groups += [Group(section.layers, joint=True)]
            groups += [Group(same, joint=True)] if 1 < len(same) < len(section.layers) else []
        return tuple(groups)

    def _make(self) -> None:
        run, fitting = self._run, self._fitting
        damage, groups = run.config.damage, run.subject.groups
        seen = fitting.statistics if damage in ("output", "weights") else {}
        made = run.for_each_group(
            candidates_of,
            [self._task(index, group, _of_group(group, seen)) for index, group in enumerate((*groups, *self.joint))],
        )
        alone = [candidates for candidates, _ in made[: len(groups)]]
        over_several = [candidates[1:] for candidates, _ in made[len(groups) :] if len(candidates) > 1]
        self._all = [*alone, *over_several]
        if damage == "output" and fitting.wanted:
            self.unmeasured = self._all
            seen_alone = self._on_samples(alone, partial(measured, statistics=seen))
            self._all = [*seen_alone, *(_as_measured(group, alone, seen_alone) for group in over_several)]
        elif damage in ("accuracy", "combined"):
            self.by_accuracy = self._on_samples(alone, agreeing)
        self.refused = tuple(skip for _, skip in made[: len(groups)] if skip)

    def _on_samples(self, candidates: Sequence[Set], measure: Callable[..., list[Set]]) -> list[Set]:
        """Candidates with what a measurement on the model itself makes of their errors."""
        run = self._run
        with run.stage("sensitivity"):
            return measure(
                run.subject.model,
                run.subject.found,
                run.subject.groups,
                candidates,
                feeds=self._fitting.apart(),
                seed=run.config.seed,
                work=run.work,
                kept=run.kept,
                progress=run.progress,
            )

    def _task(self, index: int, group: Group, seen: list[LayerStatistics] | None) -> Task[tuple[Any, ...]]:
        run, methods = self._run, self._methods(index, group)
        if seen and not all(fits_to(name, each) for each in seen for name in _taking(group, methods)):
            seen = None  # by the weights alone: errors of one and the other kind do not compare
        most = EVERY_RANK if self._policy.every_rank else None
        levels = run.config.damage in ("energy", "accuracy", "combined")
        return group_task(
            group,
            *(methods, seen, run.block, most, levels, run.target.formats.refuses),
            size=group.dense.cost.params,
            key=(methods_key(*methods), seen, run.block, most, levels, run.target.formats),
        )

    def _methods(self, index: int, group: Group) -> tuple[str, ...]:
        """The methods for a group: those asked for, or by default those whose fit is a matter of seconds."""
        if self._policy.methods is not None:
            return self._policy.methods(index, group)
        config, spec = self._run.config, group.layers[0].spec
        methods = config.methods
        if group.joint or methods != METHODS:
            return methods
        if config.calibrate is not None:
            return methods if patch_length(spec) <= QUICK_PATCH else CLOSED_FORM
        return methods if spec.params <= QUICK_KERNEL else tuple(name for name in methods if name != "cp3")


def _as_measured(over_several: Set, plain: Sequence[Set], seen: Sequence[Set]) -> Set:
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
        for c in over_several
    )


def _taking(group: Group, methods: Sequence[str]) -> list[str]:
    """Those of `methods` that take the layers of a group."""
    specs = [layer.spec for layer in group.owners]
    alike = [name for name in methods if is_joint(name) == group.joint]
    return [name for name in alike if not lift.refuses(find_decomposition(name), specs)]


def _of_group(group: Group, seen: Mapping[str, LayerStatistics]) -> list[LayerStatistics] | None:
    """What the layers of a group see; None unless it is known of all that have a kernel of their own."""
    names = [layer.name for layer in group.owners]
    return [seen[name] for name in names] if all(name in seen for name in names) else None

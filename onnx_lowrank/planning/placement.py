"""A model on its target: how many parts it is taken in, and plans that take it there in no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from onnx_lowrank.candidates import group_of, refused
from onnx_lowrank.graph.model import Model
from onnx_lowrank.rewriting.rewrite import sketch
from onnx_lowrank.runtime import Partitions
from onnx_lowrank.subject import Subject
from onnx_lowrank.targets import Target, count_partitions
from onnx_lowrank.types import Candidate, Plan, Skip


class Placement:
    """A subject on its target."""

    def __init__(self, subject: Subject, target: Target) -> None:
        self._subject, self._target = subject, target

    @cached_property
    def before(self) -> Partitions | None:
        """Parts that the target takes the original in; None where that cannot be told without it."""
        return self.of(self._subject.given)

    def of(self, model: Model) -> Partitions | None:
        """As :attr:`before`, of another model with the same inputs."""
        ops = self._target.ops
        return None if ops is None else count_partitions(model, self._subject.sample_shapes, ops)

    def held(self, plan: Plan, dense: Sequence[Candidate]) -> Plan:
        """`plan` less the chains that the target does not take, and those that cut the model into more parts on it.

        Parameters
        ----------
        dense
            What leaves each group of the subject as it is.
        """
        groups = {name: group for group in self._subject.groups for name in group.names}
        reasons = {
            choice: reason
            for choice in plan.choices
            if not choice.dense
            and (reason := refused(group_of(choice.layers, groups), choice, self._target.formats.refuses))
        }
        plan = self._without(plan, reasons, dense)
        changed = [choice for choice in plan.choices if not choice.dense]
        if not changed or self._takes(plan):
            return plan
        # what cuts the model is found by taking the layers in one by one: form matters, kernels do not
        dropped = dict.fromkeys(changed, f"decomposed it would cut the model into more parts on {self._target.name}")
        for choice in changed:
            fewer = {other: why for other, why in dropped.items() if other is not choice}
            if self._takes(self._without(plan, fewer, dense)):
                dropped = fewer
        return self._without(plan, dropped, dense)

    def _takes(self, plan: Plan) -> bool:
        """Whether the target takes the model of `plan` in as few parts as the original, and no smaller a share of it."""
        if self.before is None:
            return True
        after = self.of(sketch(self._subject.model, self._subject.found, plan))
        return after is not None and after.no_worse_than(self.before)

    def _without(self, plan: Plan, dropped: Mapping[Candidate, str], dense: Sequence[Candidate]) -> Plan:
        """`plan` with some of its choices left dense, each for its reason."""
        if not dropped:
            return plan
        instead = {name: choice for choice in dense for name in choice.layers}
        choices: dict[Candidate, None] = {}
        for choice in plan.choices:
            choices |= dict.fromkeys([instead[name] for name in choice.layers] if choice in dropped else [choice])
        kinds = {layer.name: layer.op_type for layer in self._subject.found.layers}
        skips = tuple(Skip(name, kinds[name], why) for choice, why in dropped.items() for name in choice.layers)
        names = ", ".join(skip.layer for skip in skips[:3]) + (" ..." if len(skips) > 3 else "")
        note = f"{len(skips)} layer(s) are left dense for target {self._target.name}, see their reasons: {names}"
        return replace(plan, choices=tuple(choices), skips=plan.skips + skips).with_notes(note)

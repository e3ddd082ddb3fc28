"""Models that memory need not hold: run part by part, each in a session of its own that goes before the next one comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import Segment, divided
from onnx_lowrank.runtime import Feeds, RunSettings, Session, Timing
from onnx_lowrank.types import LowRankError
from onnx_lowrank.work.memory import give_back_memory

PART_BYTES = 1 << 28
"""Weights of a part; one node may have more. ONNX Runtime holds them once more, in the order of its kernels."""

AT_ONCE = 8
"""Batches that pass a part while it is loaded."""

ROUNDS, WARM_UP = 20, 2
"""Timed runs of a part, and those before them."""


class PartSession:
    """What :class:`~onnx_lowrank.runtime.Session` is, of a model in parts.

    Every node runs with its own weights, in the order of the model; what runs across the end of a part, a fusion, is lost.
    """

    def __init__(self, model: Model, settings: RunSettings | None = None, *, part_bytes: int = PART_BYTES) -> None:
        """See that `model` can be run on its own parts; nothing is loaded yet."""
        self._settings = settings or RunSettings()
        self._model, self._parts = model, divided(model, part_bytes)
        self.provider = self._settings.provider_name
        self.outputs = tuple(output.name for output in model.graph.output)
        self.placement: dict[str, int] = {}
        self.fallback, self.runs_there = "", True

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Values of the outputs (all of them by default).

        Raises
        ------
        LowRankError
            Where the model cannot be loaded, or fails on these feeds.
        """
        return self.run_all([feeds], outputs)[0]

    def run_all(self, batches: Sequence[Feeds], outputs: Sequence[str] | None = None) -> list[list[np.ndarray]]:
        """As :meth:`run`, of several batches with each part loaded once."""
        alive: list[dict[str, np.ndarray]] = [dict(feeds) for feeds in batches]
        wanted = self.outputs if outputs is None else tuple(outputs)
        placed: dict[str, int] = {}
        for segment, later in self._each(wanted):
            session = self._open(segment, alive[0])
            for values in alive:
                self._advance(session, segment, values, later)
            for name, count in session.placement.items():
                placed[name] = placed.get(name, 0) + count
            del session
            give_back_memory()
        self.placement = placed
        stored = Constants(self._model)
        return [[_value(name, values, stored) for name in wanted] for values in alive]

    def times(self, feeds: Feeds) -> np.ndarray:
        """Milliseconds of ``ROUNDS`` runs: sums of those of the parts, each while it is loaded."""
        values, total = dict(feeds), np.zeros(ROUNDS)
        for segment, later in self._each(self.outputs):
            session = self._open(segment, values)
            given = {name: values[name] for name in segment.inputs}
            for number in range(-WARM_UP, ROUNDS):
                start = time.perf_counter()
                session.run(given)
                if number >= 0:
                    total[number] += 1e3 * (time.perf_counter() - start)
            self._advance(session, segment, values, later)
            del session
            give_back_memory()
        return total

    def _each(self, wanted: Sequence[str]) -> Iterator[tuple[Segment, set[str]]]:
        """The parts, each with the names that are needed after it."""
        later = [set(wanted)]
        for segment in reversed(self._parts):
            later.append(later[-1] | set(segment.inputs))
        yield from zip(self._parts, reversed(later[:-1]), strict=True)

    def _open(self, segment: Segment, values: Feeds) -> Session:
        dtypes = {name: values[name].dtype for name in segment.inputs}
        return Session(segment.serialize(dtypes), self._settings, folder=segment.folder)

    @staticmethod
    def _advance(session: Session, segment: Segment, values: dict[str, np.ndarray], later: set[str]) -> None:
        """Run a part, and forget what none after it reads."""
        made = session.run({name: values[name] for name in segment.inputs}, segment.outputs) if segment.outputs else []
        values.update(zip(segment.outputs, made, strict=True))
        for name in values.keys() - later:
            del values[name]


def _value(name: str, values: Feeds, stored: Constants) -> np.ndarray:
    if name in values:
        return values[name]
    constant = stored.find(name)
    if constant is None:
        raise LowRankError(f"output '{name}' is made by no node of the main graph: the model is damaged")
    return constant.read()


def time_in_parts(first: PartSession, second: PartSession, feeds: Feeds) -> Timing:
    """Times of two models in parts, one after the other: never more than one part of one of them is in memory."""
    return Timing(first.times(feeds), second.times(feeds))

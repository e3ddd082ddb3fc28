"""Times: two sessions in turn, and every node of a model in its place."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnx_lowrank.runtime.session import OPTIMIZED, WEIGHTS, Feeds, RunSettings, Session

BLOCKS = 50
"""Stretches of a measurement that are taken to be independent of one another."""


class Runs(Protocol):
    """A model that can be run: a session of whatever engine."""

    def run(self, feeds: Feeds) -> Any:
        """Values of the outputs."""


@dataclass(frozen=True)
class Timing:
    """Times of two sessions on the same feeds, in turn.

    Parameters
    ----------
    first_ms, second_ms
        One number for each round, in milliseconds.
    """

    first_ms: np.ndarray
    second_ms: np.ndarray

    @property
    def speedup(self) -> float:
        """Median over the rounds of (first / second)."""
        return float(np.median(self._ratios))

    @property
    def _ratios(self) -> np.ndarray:
        """Of each round; of many rounds the medians of ``BLOCKS`` stretches, since those that follow one another are disturbed alike."""
        ratios: np.ndarray = self.first_ms / self.second_ms
        if len(ratios) > 2 * BLOCKS:
            ratios = np.array([np.median(stretch) for stretch in np.array_split(ratios, BLOCKS)])
        return ratios

    @property
    def speedup_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the median ratio, from its order statistics: no assumption on the noise."""
        ratios = np.sort(self._ratios)
        n = len(ratios)
        # the rank of the median is binomial(n, 1/2): mean n/2, standard deviation sqrt(n)/2
        # and as many ratios are left out above as below, so that the models exchanged give the reciprocals
        low = max(int(np.floor((n - 1) / 2 - 0.98 * np.sqrt(n))), 0)
        return float(ratios[low]), float(ratios[n - 1 - low])


def time_pair(
    first: Runs, second: Runs, feeds: Feeds, *, rounds: int = 50, seconds: float = 10.0, least: float = 0.0
) -> Timing:
    """Run two sessions in turn and time each run; who goes first alternates, so that neither inherits a warm cache.

    Parameters
    ----------
    rounds
        Most rounds after the warm-up.
    seconds
        Stop after this long once there are ten rounds.
    least
        Go on for so many seconds however many rounds that takes: what disturbs a machine for a moment should not decide.
    """
    warm_up = 5 if _seconds(first, feeds) < 1 else 1
    for _ in range(warm_up):
        first.run(feeds)
        second.run(feeds)
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < least or (
        len(times) < rounds and (len(times) < 10 or spent < seconds)
    ):
        if len(times) % 2:
            late = _seconds(second, feeds)
            times.append((_seconds(first, feeds), late))
        else:
            times.append((_seconds(first, feeds), _seconds(second, feeds)))
    values = np.array(times) * 1e3
    return Timing(values[:, 0], values[:, 1])


@dataclass(frozen=True)
class Profile:
    """Where the time of one run of a model goes.

    Parameters
    ----------
    node_ms
        Time of each node of the optimised graph.
    reference_ms
        Time of one whole run of the session that ran in turn with it: what drifts of the machine's speed show in.
    optimized
        File of the optimised graph, without its weights.
    """

    node_ms: dict[str, float]
    reference_ms: float
    optimized: Path


def profile_nodes(
    model: Path,
    reference: Session,
    feeds: Feeds,
    settings: RunSettings,
    folder: Path,
    *,
    rounds: int = 40,
    seconds: float = 0.5,
) -> Profile:
    """Time every node of a model in its place in the whole, in turn with runs of `reference`.

    Parameters
    ----------
    folder
        For the files that ONNX Runtime writes; exists already.
    rounds, seconds
        Stop after so many runs, or after so long once there are five.
    """
    session = Session(model, settings, profile=folder)
    for _ in range(WARM_UP):
        session.run(feeds)
        reference.run(feeds)
    waits: list[float] = []
    start = time.perf_counter()
    while len(waits) < rounds and (len(waits) < 5 or time.perf_counter() - start < seconds):
        waits.append(_seconds(reference, feeds))
        session.run(feeds)
    times: dict[str, list[float]] = {}
    for event in json.loads(session.end_profile().read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL_TIME):
            times.setdefault(name.removesuffix(_KERNEL_TIME), []).append(event["dur"])
    (folder / WEIGHTS).unlink(missing_ok=True)
    spent = {name: typical(values[WARM_UP:]) / 1e3 for name, values in times.items()}
    return Profile(spent, typical(waits) * 1e3, folder / OPTIMIZED)


WARM_UP = 2
"""Runs of a profiled session before those that count."""

_KERNEL_TIME = "_kernel_time"


def typical(times: Sequence[float] | np.ndarray) -> float:
    """Mean of the three quarters that took least: the rest were disturbed.

    Examples
    --------
    >>> typical([1.0, 2.0, 3.0, 90.0])
    2.0
    """
    kept = np.sort(times)[: max(1, 3 * len(times) // 4)]
    return float(kept.mean()) if len(kept) else 0.0


def _seconds(session: Runs, feeds: Feeds) -> float:
    start = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - start

"""What times whole models on this machine beside ONNX Runtime: MNN, for the plan and for the result."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from onnx_lowrank.cache import cache_folder
from onnx_lowrank.config import Config
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.save import save
from onnx_lowrank.latency.probes import digest
from onnx_lowrank.latency.timings import Timings
from onnx_lowrank.latency.whole_times import WholeTimes
from onnx_lowrank.runtime import (
    MNNSession,
    RunSettings,
    Session,
    disagreement,
    mnn_version,
    processor,
    time_pair,
    typical,
)
from onnx_lowrank.subject import Subject
from onnx_lowrank.types import LowRankError, Progress
from onnx_lowrank.verification.verify import Feeds, Latency, check_latency
from onnx_lowrank.work.memory import give_back_memory

ROUNDS, ROUND_SECONDS, CHECK_SECONDS = 600, 1.6, 5.0
"""Of one model beside the original; a whole plan is looked at for longer."""


WIDTH = 2 * 1.96
"""Standard errors that an interval of 95 % is wide."""


class OnMNN:
    """The original of a subject on MNN, beside which other models are timed."""

    def __init__(self, subject: Subject, config: Config, feeds: Feeds) -> None:
        """Convert the original.

        Raises
        ------
        LowRankError
            Where MNN is not installed, does not take the model, or computes something else than ONNX Runtime.
        """
        self._feeds, self._threads = feeds, config.threads
        with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
            path = subject.given.path or Path(folder) / "model.onnx"
            if subject.given.path is None:
                save(subject.given, path)
            plain = Session(path)
            self._outputs = plain.outputs
            self.original = self.session(path)
            wrong = disagreement(self.original.run(feeds), plain.run(feeds))
        if wrong:
            raise LowRankError(f"target mnn computes the model otherwise: {wrong}; plan for another target")
        self.original_ms = typical(time_pair(self.original, self.original, feeds, rounds=10, seconds=2.0).first_ms)

    def session(self, path: Path) -> MNNSession:
        """A model of the same inputs and outputs on MNN."""
        shapes = {name: value.shape for name, value in self._feeds.items()}
        with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
            return MNNSession(path, shapes, self._outputs, Path(folder), self._threads)

    def latency(self, path: Path) -> Latency:
        """The model at `path` beside the original; no figure where it computes something else than in ONNX Runtime."""
        session = self.session(path)
        latency = check_latency(self.original, session, self._feeds, RunSettings(threads=self._threads))
        wrong = disagreement(session.run(self._feeds), Session(path).run(self._feeds))
        if not wrong:
            return latency
        return replace(
            latency,
            speedup=math.nan,
            speedup_low_95=math.nan,
            speedup_high_95=math.nan,
            fallback=f"no time is given for MNN: {wrong}",
        )

    def ratio(self, model: Model, *, thorough: bool = False) -> tuple[float, float]:
        """Median over rounds of the time of `model` over that of the original, run in turn; and its standard error."""
        with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
            save(model, Path(folder) / "model.onnx")
            session = self.session(Path(folder) / "model.onnx")
        seconds = CHECK_SECONDS if thorough else ROUND_SECONDS
        timing = time_pair(self.original, session, self._feeds, rounds=ROUNDS, seconds=seconds)
        del session
        give_back_memory()
        low, high = timing.speedup_interval
        return 1 / timing.speedup, (1 / low - 1 / high) / WIDTH


def mnn_times(subject: Subject, config: Config, engine: OnMNN, block: int, progress: Progress) -> WholeTimes:
    """The table of times on MNN, empty but for what earlier runs have kept."""
    environment = {
        "engine": f"MNN {mnn_version()}",
        "processor": processor(),
        "threads": str(config.threads),
        "batch": str(config.batch_size),
        "model": digest(subject),
    }
    timings = Timings(environment, cache_folder())
    return WholeTimes(subject, timings, engine.original_ms, block, engine, progress, seed=config.seed)

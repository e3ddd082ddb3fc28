"""What the stages of a run have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from onnx_lowrank.cache import UNKEPT, Kept, environment, open_store
from onnx_lowrank.config import Config
from onnx_lowrank.graph.kernels import model_digest
from onnx_lowrank.layer_tasks import loaded_task
from onnx_lowrank.randomized import exactly
from onnx_lowrank.runtime import processor, version
from onnx_lowrank.subject import Subject
from onnx_lowrank.targets import block_of, find_target
from onnx_lowrank.types import Progress
from onnx_lowrank.work.parallel import run_all
from onnx_lowrank.work.tasks import Task, Work

Outcome = TypeVar("Outcome")


class Run:
    """A subject under a configuration: where work is done, what is kept of it, and how long it took."""

    def __init__(self, subject: Subject, config: Config, progress: Progress) -> None:
        self.subject, self.config, self.progress = subject, config, progress
        self.target = find_target(config.target)
        self.work = Work(config.workers, config.cluster, open_store())
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        try:
            with exactly(self.config.exact):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @cached_property
    def kept(self) -> Kept:
        """Results kept of runs of this model on this machine."""
        if not self.work.store:
            return UNKEPT
        runs = version(), processor(), os.cpu_count(), self.config.exact
        return Kept(self.work.store).under(environment(), runs, model_digest(self.subject.model))

    @cached_property
    def block(self) -> int:
        """Multiple that ranks are kept to."""
        return block_of(self.config)

    def for_each_group(
        self, function: Callable[[tuple[Any, ...]], Outcome], tasks: Sequence[Task[tuple[Any, ...]]]
    ) -> list[Outcome]:
        """What `function` makes of the task of each group, in order."""
        with self.stage("analyze"):
            return run_all(function, tasks, loaded_task, work=self.work, progress=self.progress, stage="analyze")

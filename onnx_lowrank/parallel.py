"""Many independent tasks on the cores of this machine, with results that do not depend on how many."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import joblib
from threadpoolctl import threadpool_limits

from onnx_lowrank.types import Progress

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

LARGE = 1 << 23
"""Kernels of more elements than this are worked on one at a time, with all cores inside the linear algebra."""

WORTH_A_PROCESS = 1 << 20
"""Starting processes takes about a second: below this many elements in all, it is not worth it."""


def run_all(
    function: Callable[[Task], Outcome],
    tasks: Sequence[Callable[[], Task]],
    sizes: Sequence[int],
    *,
    jobs: int,
    progress: Progress,
    stage: str,
    keep: Callable[[int, Outcome], Any] | None = None,
) -> list[Any]:
    """``[function(task()) for task in tasks]``.

    The number of threads decides the last bits of a matrix product. So small tasks always run on one thread and
    large ones always on every core, whatever `jobs` is, and the same seed gives the same bytes.

    Parameters
    ----------
    function
        Picklable, as are its arguments.
    tasks
        Each makes its argument when its turn comes, so that few of them are in memory at once.
    sizes
        Elements that each task works on.
    jobs
        Processes for the small tasks.
    keep
        Called in this process with the number of a task and its outcome as soon as that is known; what it returns stands
        for the outcome.
    """
    done: dict[int, Any] = {}
    progress(stage, 0, len(tasks))

    def finish(index: int, outcome: Any) -> None:
        done[index] = outcome if keep is None else keep(index, outcome)
        progress(stage, len(done), len(tasks))

    # the largest first, so that no process is left with a long task at the end
    order = sorted(range(len(tasks)), key=lambda i: -sizes[i])
    small = [i for i in order if sizes[i] <= LARGE]
    if jobs > 1 and len(small) > 1 and sum(sizes[i] for i in small) > WORTH_A_PROCESS:
        calls = (joblib.delayed(_on_one_thread)(function, i, tasks[i]()) for i in small)
        # without max_nbytes every array sent would stay in a file in memory until the last task is done
        for index, outcome in joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", max_nbytes=None)(calls):
            finish(index, outcome)
    else:
        for index in small:
            finish(*_on_one_thread(function, index, tasks[index]()))
    for index in order:
        if index not in done:
            with threadpool_limits(os.cpu_count()):
                finish(index, function(tasks[index]()))
    return [done[i] for i in range(len(tasks))]


def _on_one_thread(function: Callable[[Task], Outcome], index: int, task: Task) -> tuple[int, Outcome]:
    with threadpool_limits(1):
        return index, function(task)

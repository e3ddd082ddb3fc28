"""A function mapped over layers: here, in processes of this machine or on a cluster, and only where it was not before.

Results do not depend on where, nor on how many work at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_limits

from onnx_lowrank.cache import environment, fingerprint
from onnx_lowrank.randomized import exact_wanted
from onnx_lowrank.types import Progress
from onnx_lowrank.work.memory import give_back_memory
from onnx_lowrank.work.processes import end_with
from onnx_lowrank.work.tasks import Given, Outcome, Task, Work, on_one_thread

LARGE = 1 << 23
"""Kernels of more elements than this are worked on one at a time, with all cores inside the linear algebra."""

WORTH_A_PROCESS = 1 << 20
"""Starting processes takes about a second: below this many elements in all, it is not worth it."""


WORTH_GIVING_BACK = 1 << 18
"""Elements of a task after which freed memory is returned to the system: for less it is not worth the time."""


def run_all(
    function: Callable[[Given], Outcome],
    tasks: Sequence[Task[Given]],
    load: Callable[[Given], Given],
    *,
    work: Work,
    progress: Progress,
    stage: str,
    keep: Callable[[int, Outcome], Any] | None = None,
) -> list[Any]:
    """``[function(task.given) for task in tasks]``, less what is kept from before.

    The number of threads decides the last bits of a matrix product. So small tasks always run on one thread and
    large ones always on every core of this machine, whatever `work` says, and the same seed gives the same bytes.

    Parameters
    ----------
    function
        Picklable, as are what `load` returns and what comes out. It reads each kernel once.
    load
        Reads the kernels of a task that is sent elsewhere, when its turn comes: few of them are in memory at once.
    keep
        Called in this process with the number of a task and its outcome as soon as that is known; what it returns stands
        for the outcome.
    """
    done: dict[int, Any] = {}
    progress(stage, 0, len(tasks))
    names: dict[int, str | None] = {}
    for index, task in enumerate(tasks if work.store else ()):
        names[index] = _name(function, task)
        _after(task)

    def finish(index: int, outcome: Any) -> None:
        done[index] = outcome if keep is None else keep(index, outcome)
        progress(stage, len(done), len(tasks))

    def take(outcomes: Iterable[tuple[int, Any]]) -> None:
        for index, outcome in outcomes:
            if work.store and (name := names[index]):
                work.store.put(name, outcome)
            finish(index, outcome)
            del outcome
            _after(tasks[index])

    for index, name in names.items():
        if work.store and name and (kept := work.store.get(name)) is not None:
            finish(index, kept)
    # the largest first, so that no process is left with a long task at the end
    order = sorted((i for i in range(len(tasks)) if i not in done), key=lambda i: -tasks[i].size)
    small = [i for i in order if tasks[i].size <= LARGE]
    if len(small) > 1 and sum(tasks[i].size for i in small) > WORTH_A_PROCESS:
        if work.cluster:
            from onnx_lowrank.work.cluster import on_cluster  # only here: its library is an extra

            take(on_cluster(work.cluster, function, load, {i: tasks[i] for i in small}))
        elif work.jobs > 1:
            take(_in_processes(function, load, {i: tasks[i] for i in small}, work.jobs))
    # here kernels are read where they are used, which may be nowhere
    take((i, on_one_thread(function, tasks[i].given)) for i in small if i not in done)
    for index in order:
        if index not in done:
            with threadpool_limits(os.cpu_count()):
                take([(index, function(tasks[index].given))])
    return [done[i] for i in range(len(tasks))]


def _after(task: Task[Any]) -> None:
    """Give back what the kernels of a task took: pieces of it would be left among what stays."""
    if task.size > WORTH_GIVING_BACK:
        give_back_memory()


def _name(function: Callable[..., Any], task: Task[Any]) -> str | None:
    """What the outcome of a task is kept under; None where that cannot be told."""
    if task.key is None:
        return None
    threads = os.cpu_count() if task.size > LARGE else 1
    try:
        return fingerprint(environment(), function.__qualname__, threads, exact_wanted(), task.key)
    except TypeError:
        return None


def _in_processes(
    function: Callable[[Given], Outcome],
    load: Callable[[Given], Given],
    tasks: Mapping[int, Task[Given]],
    jobs: int,
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes by the index of their tasks, as they come from processes of this machine."""
    calls = (joblib.delayed(_apart)(function, i, load(task.given)) for i, task in tasks.items())
    watched = {"initializer": end_with, "initargs": (os.getpid(),)}
    # without max_nbytes every array sent would stay in a file in memory until the last task is done
    outcomes = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", max_nbytes=None, **watched)(calls)
    try:
        # `yield from` would close them before the warning can be caught
        for each in outcomes:  # noqa: UP028
            yield each
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an interrupt, what is in hand is lost: that is meant
            outcomes.close()


def end_processes() -> None:
    """End processes that wait for more work: each holds its libraries, a few hundred megabytes. They start again by themselves."""
    get_reusable_executor(reuse=True).shutdown(wait=True)


def _apart(function: Callable[[Given], Outcome], index: int, given: Given) -> tuple[int, Outcome]:
    give_back_memory()  # of the task before, whose outcome is on its way
    return index, on_one_thread(function, given)

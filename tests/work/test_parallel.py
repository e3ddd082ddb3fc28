from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnx_lowrank.cache import Store
from onnx_lowrank.types import LowRankError, no_progress
from onnx_lowrank.work import parallel
from onnx_lowrank.work.parallel import LARGE, WORTH_A_PROCESS, run_all
from onnx_lowrank.work.tasks import Task, Work, on_one_thread


class Steps:
    """Progress as it was told."""

    def __init__(self):
        self.told = []

    def __call__(self, stage, done, total):
        self.told.append((stage, done, total))


def square(value):
    return value * value


def where(value):
    """Process in which a task runs."""
    return os.getpid()


def refuse(value):
    if value == 3:
        raise LowRankError("layer '3' cannot be factorised")
    return value


def singular_values(seed):
    """A result whose last bits depend on the number of threads."""
    return np.linalg.svd(np.random.default_rng(seed).standard_normal((60, 40)), compute_uv=False).tobytes()


def threads(value):
    return max(pool["num_threads"] for pool in threadpool_info())


def run(function, values, sizes, jobs=1, progress=no_progress, store=None, load=int):
    tasks = [Task(value, size, (value,)) for value, size in zip(values, sizes, strict=True)]
    return run_all(function, tasks, load, work=Work(jobs, store=store), progress=progress, stage="work")


controlled = pytest.mark.skipif(not threadpool_info(), reason="the linear algebra has no threads that can be limited")

BIG = WORTH_A_PROCESS // 2
"""Elements of a task of which three are worth starting processes for."""


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4], [4, 3, 2, 1], [2 * LARGE, 1, 3 * LARGE, 5], [0, 0, 0, 0]])
def test_results_come_in_the_order_of_the_tasks_whatever_their_sizes(sizes):
    assert run(square, [5, 6, 7, 8], sizes) == [25, 36, 49, 64]


def test_results_come_in_order_from_several_processes_too():
    sizes = [BIG, 2 * BIG, 2 * LARGE, BIG, 3 * BIG]
    assert run(square, [5, 6, 7, 8, 9], sizes, jobs=2) == [25, 36, 49, 64, 81]


def test_no_task_gives_no_result():
    steps = Steps()
    assert run(square, [], [], jobs=2, progress=steps) == []
    assert steps.told == [("work", 0, 0)]


def test_two_processes_give_the_same_bytes_as_one():
    seeds, sizes = list(range(6)), [BIG] * 5 + [2 * LARGE]
    assert run(singular_values, seeds, sizes, jobs=2) == run(singular_values, seeds, sizes, jobs=1)


def test_small_tasks_go_to_other_processes_where_there_is_enough_work():
    here = os.getpid()
    small = run(where, [1, 2, 3], [BIG, BIG, BIG], jobs=2)
    assert here not in small
    assert set(run(where, [1, 2, 3], [10, 10, 10], jobs=2)) == {here}
    assert set(run(where, [1, 2, 3], [BIG, BIG, BIG], jobs=1)) == {here}
    assert set(run(where, [1], [4 * BIG], jobs=2)) == {here}


def test_a_large_task_stays_here():
    here = os.getpid()
    mixed = run(where, [1, 2, 3, 4], [BIG, LARGE + 1, BIG, BIG], jobs=2)
    assert mixed[1] == here
    assert here not in (mixed[0], mixed[2], mixed[3])


@controlled
def test_a_large_task_has_every_core_and_a_small_one_a_single_thread(monkeypatch):
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 2)
    assert run(threads, [1, 2], [LARGE + 1, LARGE], jobs=1) == [2, 1]


@controlled
def test_a_small_task_runs_on_one_thread_in_every_process():
    assert run(threads, [1, 2, 3], [BIG, BIG, BIG], jobs=2) == [1, 1, 1]
    with threadpool_limits(2):
        assert run(threads, [1, 2, 3], [10, 10, 10], jobs=1) == [1, 1, 1]


def test_an_exception_of_a_large_task_comes_through():
    with pytest.raises(LowRankError, match="layer '3'"):
        run(refuse, [1, 3], [1, LARGE + 1])


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_counts_up_to_the_number_of_tasks(jobs):
    steps = Steps()
    run(square, [1, 2, 3, 4], [BIG, 2 * LARGE, BIG, BIG], jobs=jobs, progress=steps)
    assert steps.told == [("work", done, 4) for done in range(5)]


def test_the_largest_is_first_and_here_nothing_is_loaded_ahead_of_its_work():
    log = []

    def load(value):
        raise AssertionError("what is done here reads for itself")

    run(log.append, [1, 2, 3], [10, 30, 20], load=load)
    assert log == [2, 3, 1]


def test_a_task_for_another_process_is_loaded():
    assert run(abs, [1, 2, 3], [BIG] * 3, jobs=2, load=lambda value: -10 * value) == [10, 20, 30]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_exception_comes_through_as_it_was_raised(jobs):
    with pytest.raises(LowRankError, match=r"^layer '3' cannot be factorised$"):
        run(refuse, [1, 2, 3, 4], [BIG] * 4, jobs=jobs)


# --- what is kept -----------------------------------------------------------------------------------------------------


class Counted:
    """A function that counts its calls."""

    def __init__(self):
        self.calls = []
        self.__qualname__ = "counted"

    def __call__(self, value):
        self.calls.append(value)
        if value < 0:
            raise KeyboardInterrupt
        return (value, 2.0 * value)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_what_was_done_is_not_done_again(store):
    function = Counted()
    first = run(function, [3, 4], [1, 2], store=store)
    again = run(function, [3, 4, 5], [1, 2, 3], store=store)
    assert first == again[:2] == [(3, 6.0), (4, 8.0)]
    assert function.calls == [4, 3, 5]


def test_each_outcome_is_kept_before_the_next_task_begins(store):
    function = Counted()
    with pytest.raises(KeyboardInterrupt):
        run(function, [3, 4, -1, 5], [40, 30, 20, 10], store=store)
    assert function.calls == [3, 4, -1]
    run(function, [3, 4, 5], [40, 30, 10], store=store)
    assert function.calls == [3, 4, -1, 5]


def test_a_large_task_is_kept_for_this_number_of_cores(store, monkeypatch):
    function = Counted()
    run(function, [3, 4], [LARGE + 1, 1], store=store)
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 63)
    run(function, [3, 4], [LARGE + 1, 1], store=store)
    assert function.calls == [4, 3, 3]


def test_an_outcome_of_other_versions_is_not_taken(store, monkeypatch):
    function = Counted()
    run(function, [3], [1], store=store)
    monkeypatch.setattr(parallel, "environment", lambda: {"numpy": "another"})
    run(function, [3], [1], store=store)
    assert function.calls == [3, 3]


def test_what_cannot_be_told_apart_is_not_kept(store, tmp_path):
    tasks = [Task(3, 1, (object(),)), Task(4, 1)]
    for _ in range(2):
        made = run_all(square, tasks, int, work=Work(store=store), progress=no_progress, stage="work")
        assert made == [9, 16]
    assert list(tmp_path.rglob("*")) == []


def test_progress_counts_what_was_kept_too(store):
    run(square, [1, 2, 3], [1, 1, 1], store=store)
    steps = Steps()
    run(square, [1, 2, 3, 4], [1, 1, 1, 1], store=store, progress=steps)
    assert steps.told == [("work", done, 4) for done in range(5)]


@controlled
def test_several_threads_of_a_process_are_held_to_one_thread_each_and_take_it_back():
    seen = []
    with threadpool_limits(2):
        before = threads(0)
    others = [threading.Thread(target=lambda: seen.append(on_one_thread(threads, 0))) for _ in range(8)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert seen == [1] * 8
    with threadpool_limits(2):
        assert threads(0) == before

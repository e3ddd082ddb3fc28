from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnx_lowrank import parallel
from onnx_lowrank.parallel import LARGE, WORTH_A_PROCESS, run_all
from onnx_lowrank.types import LowRankError, no_progress


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


def run(function, values, sizes, jobs=1, progress=no_progress):
    tasks = [partial(int, value) for value in values]
    return run_all(function, tasks, sizes, jobs=jobs, progress=progress, stage="work")


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


def test_a_task_is_made_when_its_turn_comes_and_the_largest_first():
    log = []

    def make(value):
        log.append(f"make {value}")
        return value

    def work(value):
        log.append(f"work {value}")

    run_all(work, [partial(make, v) for v in (1, 2, 3)], [10, 30, 20], jobs=1, progress=no_progress, stage="work")
    assert log == ["make 2", "work 2", "make 3", "work 3", "make 1", "work 1"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_exception_comes_through_as_it_was_raised(jobs):
    with pytest.raises(LowRankError, match=r"^layer '3' cannot be factorised$"):
        run(refuse, [1, 2, 3, 4], [BIG] * 4, jobs=jobs)

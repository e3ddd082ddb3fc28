"""What is to be done for a layer, and where: the units that are mapped over processes or a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from threadpoolctl import threadpool_limits

from onnx_lowrank.cache import Store

Given = TypeVar("Given")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Task(Generic[Given]):
    """What is to be done for one layer, or a group of them.

    Parameters
    ----------
    given
        What the function takes, with its kernels still in the model.
    size
        Elements that are worked on.
    key
        All that the outcome depends on; see :func:`onnx_lowrank.cache.fingerprint`. None is never kept.
    placed
        Whether `given` can be sent as it is, so that its kernels are read from the model's file where the work is done.
    """

    given: Given
    size: int
    key: tuple[Any, ...] | None = None
    placed: bool = False


@dataclass(frozen=True)
class Work:
    """Where work is done, and what is kept of it.

    Parameters
    ----------
    jobs
        Processes for small tasks.
    cluster
        Address of a Dask scheduler, whose workers do the small tasks instead.
    store
        Cache of results; None for none.
    """

    jobs: int = 1
    cluster: str | None = None
    store: Store | None = None


_alone = threading.Lock()


def on_one_thread(function: Callable[[Given], Outcome], given: Given) -> Outcome:
    """``function(given)`` on one thread of the linear algebra.

    The limit is that of the whole process, and the thread that set it first has the say: where a process has several, as
    workers of a cluster may, they take turns.
    """
    with _alone, threadpool_limits(1):
        return function(given)

"""Work on the workers of a Dask cluster: the only importer of dask and distributed.

Kernels are named, and read where the work is done, as far as the workers see the model's file; otherwise they are sent. What a
lost worker had in hand Dask gives to another. What the cluster cannot do is left to the caller.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from onnx_lowrank.cache import environment
from onnx_lowrank.types import LowRankError
from onnx_lowrank.work.memory import give_back_memory, keep_freed_memory
from onnx_lowrank.work.tasks import Task, on_one_thread

if TYPE_CHECKING:
    import distributed

logger = logging.getLogger(__name__)

Given = TypeVar("Given")
Outcome = TypeVar("Outcome")

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""

PATIENCE_SECONDS = 30
"""How long a cluster may be without a worker."""

AHEAD = 2
"""Tasks that are with the cluster at a time, for each worker: one to do, one to do next."""

MADE, RAISED, UNSEEN, UNLIKE = "made", "raised", "unseen", "unlike"


def on_cluster(
    address: str,
    function: Callable[[Given], Outcome],
    load: Callable[[Given], Given],
    tasks: Mapping[int, Task[Given]],
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes by the index of their tasks, as they come; those that the cluster could not do are missing.

    Raises
    ------
    LowRankError
        Where no scheduler answers, or no worker would compute the same as this process.
    """
    with _client(address) as client:
        alike = _alike(client, address)
        waiting = deque(tasks)
        sent: dict[Any, int] = {}
        unseen = False

        def send(index: int, *, placed: bool) -> None:
            given = tasks[index].given if placed else load(tasks[index].given)
            call = (function, load if placed else None, given, environment())
            # others may join, and a worker that is started again has another address
            future = client.submit(_there, *call, pure=False, workers=alike, allow_other_workers=True)
            sent[future] = index

        while sent or waiting:
            while waiting and len(sent) < AHEAD * len(alike):
                index = waiting.popleft()
                send(index, placed=tasks[index].placed and not unseen)
            for future in _finished(client, sent):
                index = sent.pop(future)
                try:
                    kind, outcome = future.result()
                except Exception as error:  # Dask's, of any kind: lost, killed by its workers, cancelled
                    logger.warning("the cluster could not do a task, which is done here: %s", error)
                    continue
                if kind == RAISED:
                    raise outcome
                if kind == MADE:
                    yield index, outcome
                elif kind == UNSEEN:
                    logger.info("kernels are sent to the workers: %s", outcome)
                    unseen = True
                    send(index, placed=False)
                else:
                    logger.warning("a task is done here: %s", outcome)
            if not sent and not _workers(client):
                return


def _there(
    function: Callable[[Given], Outcome],
    load: Callable[[Given], Given] | None,
    given: Given,
    wanted: dict[str, str],
) -> tuple[str, Any]:
    """On a worker: what came of a task, and what that is."""
    keep_freed_memory()
    if difference := _difference(wanted, environment()):
        return UNLIKE, f"a worker has {difference}"
    try:
        given = load(given) if load else given
    except LowRankError as error:
        return UNSEEN, str(error)
    try:
        return MADE, on_one_thread(function, given)
    except LowRankError as error:
        return RAISED, error
    finally:
        give_back_memory()


def _its_environment() -> dict[str, str]:
    """On a worker: what decides about the last bits of what it computes."""
    return environment()


def _difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """In what two processes differ that would show in the results; empty where in nothing."""
    return "; ".join(
        f"{name} {found.get(name)} in the place of {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    )


@contextmanager
def _client(address: str) -> Iterator[distributed.Client]:
    try:
        import dask
        import distributed
    except ImportError as error:
        raise LowRankError("cluster needs Dask: pip install 'onnx-lowrank[dask]'") from error
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise LowRankError(
            f"no Dask scheduler answers at {address}: start one by `dask scheduler`, and workers by `dask worker ADDRESS`"
        ) from error
    # kernels are large, and few at a time
    with client, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
        yield client


def _alike(client: distributed.Client, address: str) -> list[str]:
    """The workers that compute what this process does, to the last bit."""
    if not _workers(client):
        raise LowRankError(f"the Dask cluster at {address} has no workers: start some by `dask worker {address}`")
    wanted = environment()
    found = client.run(_its_environment, on_error="return")
    reasons = {
        worker: f"cannot do the work ({said})" if isinstance(said, BaseException) else _difference(wanted, said)
        for worker, said in found.items()
    }
    alike = [worker for worker, reason in reasons.items() if not reason]
    for worker, reason in reasons.items():
        if reason:
            logger.warning("worker %s is not used: %s", worker, reason)
    if not alike:
        worker, reason = next(iter(reasons.items()))
        raise LowRankError(
            f"no worker of the cluster at {address} would compute the same as this machine (worker {worker}: {reason}): "
            f"give workers the same processor and the same versions"
        )
    return alike


def _workers(client: distributed.Client) -> bool:
    """Whether the cluster has any worker; one that is started again has some time for it."""
    import distributed

    try:
        client.wait_for_workers(1, timeout=PATIENCE_SECONDS)
    except (OSError, distributed.TimeoutError):
        return False
    return True


def _finished(client: distributed.Client, sent: dict[Any, int]) -> list[Any]:
    """Futures that are done, of which one at least is waited for; all of them where the cluster has no workers left."""
    import distributed

    while True:
        try:
            with client.as_current():
                return list(distributed.wait(list(sent), timeout=PATIENCE_SECONDS, return_when="FIRST_COMPLETED").done)
        except CancelledError:
            return [future for future in sent if future.done()]
        except distributed.TimeoutError:
            if not _workers(client):
                with suppress(OSError):
                    client.cancel(list(sent))
                return list(sent)

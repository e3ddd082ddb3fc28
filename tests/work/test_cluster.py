"""The same work on a real Dask cluster: the same bytes as in one process, whatever becomes of its workers."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.cache import Store, fingerprint
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.find import find_layers
from onnx_lowrank.graph.kernels import Kernel, PlacedKernel
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.layer_tasks import group_task, loaded_task
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import LowRankError, no_progress
from onnx_lowrank.work import cluster, parallel
from onnx_lowrank.work.parallel import run_all
from onnx_lowrank.work.tasks import Task, Work
from tests import tiny

distributed = pytest.importorskip("distributed", reason="Dask is not installed")

ROOT = Path(__file__).parents[2]
HERE = os.getpid()


@contextmanager
def dask(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process of Dask, with its log to read."""
    python = [sys.executable, "-m", "dask", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(python, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate()


def said(process: subprocess.Popen[str], what: str, times: int = 1) -> str:
    """The line of a log that says something, once it is there; what comes after it is read and forgotten."""
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        times -= what in line
        if not times:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return line
    raise AssertionError("".join(log))


@contextmanager
def on_loopback(workers: int, *options: str) -> Iterator[str]:
    """A scheduler and workers, processes on the loopback interface; its address."""
    with dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0") as scheduler:
        address = said(scheduler, "Scheduler at:").split()[-1]
        options = ("--nthreads", "1", "--nworkers", str(workers), "--no-dashboard", *options)
        with dask("worker", address, *options) as process:
            said(process, "Registered to:", times=workers)
            yield address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster whose workers are started again when they are lost."""
    with on_loopback(2) as found:
        yield found


@pytest.fixture(autouse=True)
def small_models_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTH_A_PROCESS", 0)


def run(function: Callable[[Any], Any], values: list[Any], address: str, **options: Any) -> list[Any]:
    tasks = [Task(value, 10, placed=True) for value in values]
    return run_all(function, tasks, same, work=Work(cluster=address), progress=no_progress, stage="work", **options)


def same(value: Any) -> Any:
    return value


def where(value: int) -> int:
    return os.getpid()


def singular_values(seed: int) -> bytes:
    return np.linalg.svd(np.random.default_rng(seed).standard_normal((60, 40)), compute_uv=False).tobytes()


def dies_once(given: tuple[str, int]) -> int:
    """Twice a number; the first process that is asked for 3 is killed over it."""
    place, value = given
    if value == 3:
        with open(place, "a") as file:
            first = not file.tell()
            file.write("x")
        if first:
            os.kill(os.getpid(), signal.SIGKILL)
    return 2 * value


def dies_elsewhere(given: tuple[int, int]) -> int:
    """Twice a number, in the process that asked; any other is killed."""
    if os.getpid() != given[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * given[1]


def refuse(value: int) -> int:
    if value == 3:
        raise LowRankError("layer '3' cannot be factorised")
    return value


def digest(result: lr.Result) -> str:
    return hashlib.sha256(result.model.SerializeToString()).hexdigest()


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks_are_done_by_the_workers_and_come_back_in_order(address: str) -> None:
    processes = set(run(where, list(range(16)), address))
    assert HERE not in processes and 1 <= len(processes) <= 2
    assert run(singular_values, [5, 3, 4], address) == [singular_values(seed) for seed in (5, 3, 4)]


def test_the_task_of_a_lost_worker_is_done_again(address: str, tmp_path: Path) -> None:
    place = tmp_path / "deaths"
    made = run(dies_once, [(str(place), value) for value in range(8)], address)
    assert made == [0, 2, 4, 6, 8, 10, 12, 14]
    assert len(place.read_text()) == 2


def test_what_a_cluster_without_workers_left_undone_is_done_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 1)
    with on_loopback(1, "--no-nanny") as address, caplog.at_level(logging.WARNING, "onnx_lowrank"):
        made = run(dies_elsewhere, [(HERE, value) for value in range(6)], address)
        assert made == [0, 2, 4, 6, 8, 10]
        assert "which is done here" in caplog.text
        with pytest.raises(LowRankError, match="has no workers: start some by `dask worker tcp://"):
            run(where, [1, 2], address)


def test_an_exception_comes_through_as_it_was_raised(address: str) -> None:
    with pytest.raises(LowRankError, match=r"^layer '3' cannot be factorised$"):
        run(refuse, [1, 2, 3, 4], address)


def test_each_outcome_is_kept(address: str, tmp_path: Path) -> None:
    tasks = [Task(value, 10, (value,), placed=True) for value in (1, 2, 3)]
    options: dict[str, Any] = {"progress": no_progress, "stage": "work"}
    first = run_all(where, tasks, same, work=Work(cluster=address, store=Store(tmp_path)), **options)
    assert HERE not in first
    assert run_all(where, tasks, same, work=Work(store=Store(tmp_path)), **options) == first


def test_no_scheduler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(LowRankError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1: start one by"):
        run(where, [1, 2], "tcp://127.0.0.1:1")


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(LowRankError, match=r"cluster needs Dask: pip install 'onnx-lowrank\[dask\]'"):
        run(where, [1, 2], "tcp://127.0.0.1:1")


def test_workers_that_would_compute_something_else_are_not_used(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {**cluster.environment(), "numpy": "0.9"}
    monkeypatch.setattr(cluster, "environment", lambda: environment)
    with pytest.raises(LowRankError, match=r"would compute the same .* numpy .* in the place of 0.9\): give workers"):
        run(where, [1, 2], address)
    # one that joins later is told by each task
    monkeypatch.setattr(cluster, "_alike", lambda client, address: list(client.nthreads()))
    with caplog.at_level(logging.WARNING, "onnx_lowrank"):
        assert run(where, [1, 2, 3], address) == [HERE] * 3
    assert "a task is done here: a worker has numpy" in caplog.text


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.save(tiny.two_large(), tmp_path / "model.onnx")


def kernel_of(given: tuple[Any, ...]) -> tuple[int, bytes]:
    """Where a task was done, and the kernel it saw."""
    return os.getpid(), given[0].layers[0].read_weight().tobytes()


def seen(source: Any, address: str, prepare: Callable[[], object] = lambda: None) -> list[tuple[int, bytes]]:
    groups = open_subject(source, make_config()).groups
    tasks = [group_task(group, size=10, key=()) for group in groups]
    prepare()
    return run_all(kernel_of, tasks, loaded_task, work=Work(cluster=address), progress=no_progress, stage="work")


def expected(source: Any) -> list[bytes]:
    return [group.layers[0].read_weight().tobytes() for group in open_subject(source, make_config()).groups]


def test_kernels_of_a_file_are_named_and_not_sent(path: Path, address: str, caplog: pytest.LogCaptureFixture) -> None:
    groups = open_subject(str(path), make_config()).groups
    tasks = [group_task(group, size=10, key=()) for group in groups]
    assert all(task.placed and len(pickle.dumps(task.given)) < 2000 for task in tasks)
    wanted = expected(str(path))
    with caplog.at_level(logging.INFO, "onnx_lowrank"):
        found = seen(str(path), address)
    assert HERE not in {process for process, _ in found}
    assert [kernel for _, kernel in found] == wanted
    assert "are sent" not in caplog.text


@pytest.mark.parametrize("form", ["raw", "external", "float_data", "transposed", "bfloat16"])
def test_kernels_of_every_form_come_back_from_their_place(tmp_path: Path, form: str) -> None:
    model = tiny.classifier()  # Gemms, one of them transposed
    if form == "transposed":
        for node in model.graph.node:
            del node.attribute[:]
        model.graph.initializer[0].dims[:] = model.graph.initializer[0].dims[::-1]
        model.graph.initializer[2].dims[:] = model.graph.initializer[2].dims[::-1]
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if form == "bfloat16":
            value = value.astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        if form == "float_data":
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, value.shape, value.ravel()))
    path = tmp_path / "model.onnx"
    if form == "external":
        onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    elif form == "bfloat16":
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
        path.write_bytes(model.SerializeToString())
    else:
        onnx.save(model, path)
    loaded = load(path)
    shapes = infer(loaded, {"x": (1, 16)})
    layers = find_layers(loaded, shapes).layers
    assert len(layers) == 2
    for layer in layers:
        kernel = layer.read_weight
        there = pickle.loads(pickle.dumps(kernel))
        assert kernel.placed is (form != "float_data")
        assert isinstance(there, PlacedKernel) is kernel.placed
        assert (there().dtype, there().shape) == (kernel().dtype, kernel().shape)
        assert fingerprint(there()) == fingerprint(kernel())


@pytest.mark.parametrize("content", [None, bytes(100), bytes(1 << 22)], ids=["gone", "cut short", "another"])
def test_kernels_that_the_workers_do_not_see_are_sent(
    path: Path, address: str, content: bytes | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = path.with_name("there.onnx")  # what the workers find under the name
    if content is not None:
        other.write_bytes(content)
    monkeypatch.setattr(Kernel, "_place", lambda self: (other, 50))
    with caplog.at_level(logging.INFO, "onnx_lowrank"):
        found = seen(str(path), address)
    assert HERE not in {process for process, _ in found}
    assert [kernel for _, kernel in found] == expected(str(path))
    assert "kernels are sent to the workers" in caplog.text


@pytest.mark.parametrize("change", ["gone", "longer", "cut short", "no model"])
def test_kernels_of_a_file_that_was_changed_are_sent(path: Path, address: str, change: str) -> None:
    wanted = expected(str(path))

    def prepare() -> None:
        data = path.read_bytes()
        changed = {"gone": b"", "longer": b"x" + data, "cut short": data[:-5000], "no model": b"\xff" * 100}[change]
        path.write_bytes(changed)
        if change == "gone":
            path.unlink()

    found = seen(str(path), address, prepare)
    assert HERE not in {process for process, _ in found}
    assert [kernel for _, kernel in found] == wanted


def test_kernels_of_a_model_in_memory_are_sent(address: str) -> None:
    found = seen(tiny.two_large(), address)
    assert HERE not in {process for process, _ in found}
    assert [kernel for _, kernel in found] == expected(tiny.two_large())


# --- whole runs -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"budget": {"macs": 0.5}, "seed": 3}
CALIBRATED: dict[str, Any] = {**OPTIONS, "methods": "channel_svd,tucker2", "align": 16}


def ways() -> dict[str, dict[str, Any]]:
    with np.load(models.DIGITS_CALIBRATE) as data:
        few = {"input": data["input"][:16]}
    return {"weights": OPTIONS, "calibrated": {**CALIBRATED, "calibrate": [few]}}


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """Digests of what one process makes."""
    return {name: digest(lr.compress(models.DIGITS, jobs=1, **options)) for name, options in ways().items()}


def test_processes_on_loopback_make_the_same_bytes_as_one_process(alone: dict[str, str], address: str) -> None:
    assert digest(lr.compress(models.DIGITS, cluster=address, **ways()["calibrated"])) == alone["calibrated"]


def test_a_local_cluster_makes_the_same_bytes(alone: dict[str, str]) -> None:
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options) as local:
        assert digest(lr.compress(models.DIGITS, cluster=local.scheduler_address, **OPTIONS)) == alone["weights"]


@pytest.mark.parametrize("stage", ["analyze", "factorize"])
def test_a_worker_killed_in_the_middle_changes_nothing(stage: str, alone: dict[str, str], address: str) -> None:
    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(2)
        victim = sorted(client.run(os.getpid).values())[0]
    killed = []

    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done == 1 and not killed:
            assert total > 2
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    assert digest(lr.compress(models.DIGITS, cluster=address, progress=progress, **OPTIONS)) == alone["weights"]
    assert killed


def test_a_cluster_is_not_taken_from_a_file(tmp_path: Path) -> None:
    from onnx_lowrank.config import read_config

    (tmp_path / "options.toml").write_text("cluster = 'tcp://10.0.0.1:8786'\n")
    with pytest.raises(LowRankError, match="cluster would execute what comes from there: give it on the command line"):
        read_config(tmp_path / "options.toml")

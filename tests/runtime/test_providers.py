"""Providers that are absent, that leave the work to the CPU, or that fail: each is said, and no figure is made up."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from rich.console import Console

import onnx_lowrank as lr
from onnx_lowrank import pipeline, runtime
from onnx_lowrank.cli import main
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.report.data import Size
from onnx_lowrank.report.text import render_verification
from onnx_lowrank.runtime import CPU, RunSettings, Session, apart, providers
from onnx_lowrank.search import bench
from onnx_lowrank.types import LowRankError
from onnx_lowrank.verification.verify import Accuracy, Latency, check_latency
from tests import tiny

NNAPI = "NnapiExecutionProvider"
REAL = onnxruntime.InferenceSession
QUICK = {"methods": "svd", "align": 1, "jobs": 1}


class Imitation:
    """A session of a build with NNAPI: the CPU computes, and `takes` says how many of its nodes NNAPI claims.

    As in ONNX Runtime, what a provider raises is caught and retried on the CPU unless fallback is turned off.
    """

    takes: Callable[[int], int] = staticmethod(lambda count: count)
    fails = ""
    given: list[Any]

    def __init__(self, source: Any, options: Any = None, providers: Any = (), enable_fallback: int = 1, **_: Any):
        names = [item if isinstance(item, str) else item[0] for item in providers]
        type(self).given = list(providers)
        self._ours, self._retry = NNAPI in names, bool(enable_fallback)
        if self._ours and self.fails == "load":
            self._fail("the driver refused the graph")
        self._session = REAL(source, options, providers=[CPU])

    def _fail(self, text: str) -> None:
        if not self._retry:
            raise RuntimeError(text)
        self._ours = False

    def run(self, outputs: Any, feeds: Any) -> Any:
        if self._ours and self.fails == "run":
            self._fail("the driver gave up")
        return self._session.run(outputs, feeds)

    def end_profiling(self) -> str:
        return self._session.end_profiling()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [n for part in self._session.get_provider_graph_assignment_info() for n in part.get_nodes()]
        taken = type(self).takes(len(nodes)) if self._ours else 0
        parts = {NNAPI: nodes[:taken], CPU: nodes[taken:]}
        return [SimpleNamespace(ep_name=k, get_nodes=lambda v=v: v) for k, v in parts.items() if v]


class HostedHere:
    """In the place of a process: a thread of this one, which imitations reach."""

    def __init__(self, said: Any) -> None:
        (asked, asks), (answered, answers) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(asks, "wb"), os.fdopen(answered, "rb")

        def serve() -> None:
            with os.fdopen(asked, "rb") as requests, os.fdopen(answers, "wb") as back:
                back.write(apart.READY)
                back.flush()
                apart.serve(requests, back)

        threading.Thread(target=serve, daemon=True).start()

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        pass

    def wait(self) -> int:
        return 0


@pytest.fixture
def nnapi(monkeypatch: pytest.MonkeyPatch) -> type[Imitation]:
    """A build of ONNX Runtime that has NNAPI."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [NNAPI, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Imitation)
    monkeypatch.setattr(apart, "start", HostedHere)
    monkeypatch.setattr(apart, "_hosts", weakref.WeakValueDictionary())
    monkeypatch.setattr(Imitation, "fails", "")
    monkeypatch.setattr(Imitation, "takes", staticmethod(lambda count: count))
    return Imitation


def verify(**options: Any) -> lr.Verification:
    return lr.verify(tiny.classifier(), tiny.classifier(), provider="nnapi", **options)


@pytest.mark.parametrize(
    "job", [verify, lambda: lr.compress(tiny.classifier(), budget={"macs": 0.5}, provider="nnapi")]
)
def test_a_provider_that_is_absent_is_an_error_that_says_what_it_takes(job: Callable[[], Any]) -> None:
    with pytest.raises(LowRankError, match=r"'nnapi' is not in this build .* it needs an Android device and the onnx"):
        job()


def test_a_provider_that_runs_everything_is_timed(nnapi: type[Imitation]) -> None:
    check = verify()
    (latency,) = check.latency
    assert (latency.provider, latency.placement, latency.fallback) == (NNAPI, {NNAPI: 3}, "")
    assert latency.original_placement == {NNAPI: 3}
    assert latency.original_ms > 0
    assert check.met


def test_a_provider_that_left_all_to_the_cpu_gets_no_figure(nnapi: type[Imitation], monkeypatch: Any) -> None:
    monkeypatch.setattr(nnapi, "takes", staticmethod(lambda count: 0))
    check = verify()
    (latency,) = check.latency
    assert (latency.provider, latency.placement) == (NNAPI, {CPU: 3})
    figures = [v for k, v in vars(latency).items() if k.endswith("_ms") or k.startswith("speedup")]
    assert len(figures) == 7
    assert all(math.isnan(figure) for figure in figures)
    assert not check.met
    assert any(f"{NNAPI} runs none of the 3 nodes, all are on {CPU}" in note for note in check.notes)
    assert any(f"no time is given for {NNAPI}; it needs an Android device" in note for note in check.notes)


def test_the_command_line_says_so_and_ends_with_1(
    nnapi: type[Imitation], monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(nnapi, "takes", staticmethod(lambda count: 0))
    model = tiny.save(tiny.classifier(), tmp_path / "model.onnx")
    assert main(["verify", str(model), str(model), "--provider", "nnapi", "--json", str(tmp_path / "r.json")]) == 1
    assert "not run on Nnapi" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["latency"][0]["original_ms"] is None


def test_a_latency_asked_for_that_the_cpu_would_give_is_refused_before_the_work(
    nnapi: type[Imitation], monkeypatch: Any
) -> None:
    monkeypatch.setattr(nnapi, "takes", staticmethod(lambda count: 0))
    for job in (lr.compress, lr.analyze):
        with pytest.raises(LowRankError, match=r"latency asked for cannot be measured: Nnapi.* none of the 3 nodes"):
            job(tiny.classifier(), budget={"latency": 0.9}, provider="nnapi", **QUICK)


def test_a_result_that_alone_falls_back_gets_no_figure_and_meets_no_latency(
    nnapi: type[Imitation], monkeypatch: Any
) -> None:
    settings, model = RunSettings("nnapi"), tiny.classifier().SerializeToString()
    whole = Session(model, settings)
    before = whole.placement
    monkeypatch.setattr(Session, "placement", property(lambda self: before if self is whole else {CPU: 3}))
    latency = check_latency(whole, Session(model, settings), {"x": tiny.inputs(1)}, settings)
    assert math.isnan(latency.speedup)
    assert latency.fallback.startswith(f"compressed: {NNAPI} runs none of the 3 nodes")
    assert latency.original_placement == {NNAPI: 3}
    monkeypatch.setattr(bench, "check_latency", lambda *args: latency)
    monkeypatch.setattr(LatencyTable, "usable", False)
    result = lr.compress(tiny.classifier(), budget={"latency": 0.9}, **QUICK)
    assert [(b.metric, b.met) for b in result.report.budgets] == [("latency", False)]
    assert result.report.layers
    assert not result.met


def test_nodes_that_fell_back_are_counted_beside_the_figure(nnapi: type[Imitation], monkeypatch: Any) -> None:
    monkeypatch.setattr(nnapi, "takes", staticmethod(lambda count: 2))
    check = verify()
    assert check.latency[0].original_ms > 0
    assert check.latency[0].placement == {NNAPI: 2, CPU: 1}
    assert any(f"{NNAPI} runs 2 of 3 nodes, the others are on {CPU}" in note for note in check.notes)
    assert check.met


@pytest.mark.parametrize(
    ("when", "match"),
    [
        ("load", f"cannot load the model on {NNAPI}: the driver refused the graph; it needs an Android device"),
        ("run", f"does not run on {NNAPI} on inputs x .*: the driver gave up"),
    ],
)
def test_a_provider_that_fails_is_not_retried_on_the_cpu(
    nnapi: type[Imitation], monkeypatch: Any, when: str, match: str
) -> None:
    monkeypatch.setattr(nnapi, "fails", when)
    with pytest.raises(LowRankError, match=match):
        verify()
    assert runtime.probe(RunSettings("nnapi"), *pipeline.probe_model()).startswith("does not work: ")


def test_a_version_that_does_not_say_where_nodes_run_gives_no_figure(nnapi: type[Imitation], monkeypatch: Any) -> None:
    monkeypatch.delattr(nnapi, "get_provider_graph_assignment_info")
    check = verify()
    assert math.isnan(check.latency[0].speedup)
    assert any("does not say where nodes run" in note for note in check.notes)
    assert math.isfinite(lr.verify(tiny.classifier(), tiny.classifier()).latency[0].speedup), "the CPU is the CPU"


def test_options_reach_the_provider(nnapi: type[Imitation]) -> None:
    verify(provider_option={"flags": "1"})
    assert nnapi.given == [(NNAPI, {"flags": "1"}), CPU]


def test_a_provider_gets_axes_of_fixed_size(nnapi: type[Imitation], monkeypatch: Any, tmp_path: Path) -> None:
    data, seen = tiny.labelled(tiny.classifier(), 10), []
    monkeypatch.setattr(
        nnapi, "run", lambda self, outputs, feeds: seen.append(feeds) or self._session.run(outputs, feeds)
    )
    check = verify(batch_size=4, evaluate=[({"x": data["x"]}, data["labels"])])
    assert {feeds["x"].shape for feeds in seen} == {(4, 16)}
    assert check.accuracy.samples == 8
    check = verify(batch_size=4, evaluate=str(tiny.save_data(tmp_path / "ten.npz", **data)))
    assert any(
        re.match(r"the last 2 samples of .*ten.npz fill no batch and were left out", note) for note in check.notes
    )


# Libraries of providers


@pytest.fixture
def plugin(monkeypatch: Any) -> list[Any]:
    """A library of a provider Foo with two devices; what sessions ask for is written down."""
    asked: list[Any] = []
    monkeypatch.setattr(providers, "_libraries", {})
    have = [CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(have))
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: have.append(name))
    kinds = [SimpleNamespace(ep_name="Foo", device=SimpleNamespace(type=f"Kind.{kind}")) for kind in ("CPU", "NPU")]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: kinds)

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices: Any, options: Any) -> None:
            asked.append(([device.device.type for device in devices], options))

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    return asked


def foo(**options: str) -> RunSettings:
    return RunSettings("foo", options=tuple(options.items()), libraries=(("Foo", "foo.so"),))


def test_a_provider_of_a_library_runs_on_its_most_special_device(plugin: list[Any]) -> None:
    model = tiny.classifier().SerializeToString()
    session = Session(model, foo(a="1"))
    assert plugin == [(["Kind.NPU"], {"a": "1"})]
    assert session.provider == "Foo"
    assert not session.runs_there, "the session says CPU"


def test_a_library_that_cannot_be_loaded_is_one_line() -> None:
    with pytest.raises(
        LowRankError, match=r"^/nowhere.so cannot be loaded as the library of execution provider Foo: "
    ) as e:
        verify(provider_library={"Foo": "/nowhere.so"})
    assert "\n" not in str(e.value)


def test_a_library_does_not_take_the_name_of_another_provider() -> None:
    with pytest.raises(LowRankError, match="has a provider of that name already"):
        verify(provider_library={CPU: "/nowhere.so"})


# Trials


def test_a_trial_in_a_process_of_its_own_says_the_same() -> None:
    assert runtime.probe_apart(RunSettings(), *pipeline.probe_model()) == "works"


def test_a_session_in_a_process_of_its_own_is_as_one_here() -> None:
    model, feeds = tiny.classifier().SerializeToString(), {"x": tiny.inputs(3)}
    here, there = Session(model), apart.Host("foo").ask(Session, model)
    assert (there.provider, there.outputs, there.placement) == (here.provider, here.outputs, here.placement)
    assert there.runs_there
    for mine, theirs in zip(here.run(feeds), there.run(feeds), strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(LowRankError, match="the model does not run on inputs x"):
        there.run({"x": np.zeros((1, 3), np.float32)})
    other = there.host.ask(Session, model)
    assert len(runtime.time_pair(there, other, feeds, rounds=12).first_ms) == 12


def test_a_process_ends_with_its_last_session_and_forgets_the_others_before() -> None:
    model = tiny.classifier().SerializeToString()
    host = apart.Host("foo")
    process, first, second = host._process, host.ask(Session, model), host.ask(Session, model)
    assert (first.number, second.number) == (0, 1)
    del first
    gc.collect()
    assert second.run({"x": tiny.inputs(1)})
    gone = apart.SessionApart(host, 0, "foo", (), {})
    with pytest.raises(LowRankError, match="foo or its driver crashed"):
        gone.run({"x": tiny.inputs(1)})
    del host, second, gone
    gc.collect()
    assert process.poll() is not None


def test_a_crash_ends_with_its_process() -> None:
    host = apart.Host("foo")
    with pytest.raises(LowRankError, match=r"^foo or its driver crashed: its process ended with code -6$"):
        host.ask(os.abort)
    assert not host.alive


def test_a_file_of_the_current_folder_does_not_stand_for_a_library(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert apart.Host("foo").ask(os.getcwd) == str(tmp_path)


def test_what_a_library_prints_is_no_answer(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('hello')\nimport os\nos.write(1, b'there')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    host = apart.Host("foo")
    assert host.ask(print, "more") is None
    assert host.ask(os.getppid) == os.getpid()


def test_last_words_are_told() -> None:
    with pytest.raises(LowRankError, match=r"ended with code 3 \(no such backend\)$"):
        apart.Host("foo").ask(exec, "import os; os.write(2, b'no such backend\\n'); os._exit(3)")


def test_a_process_goes_with_the_error_that_it_returned() -> None:
    host = apart.Host("foo")
    process = host._process
    gc.disable()
    try:
        with pytest.raises(LowRankError, match="cannot load"):
            host.ask(Session, b"no model")
        del host
        assert process.poll() is not None
    finally:
        gc.enable()


def test_sessions_of_two_processes_are_not_mixed_up() -> None:
    model = tiny.classifier().SerializeToString()
    first, second = (apart.Host("foo").ask(Session, model) for _ in range(2))
    with pytest.raises(ValueError, match="sessions of two processes"):
        runtime.time_pair(first, second, {"x": tiny.inputs(1)})


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "onnxruntime_qnn.py").write_text("raise OSError('a library is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = dict(lr.pipeline.providers())
    expected = "does not work: package onnxruntime_qnn is installed and cannot be used: a library is missing"
    assert found["QNNExecutionProvider"] == expected
    with pytest.raises(LowRankError, match="package onnxruntime_qnn is installed and cannot be used"):
        lr.verify(tiny.classifier(), tiny.classifier(), provider="qnn")


def test_a_trial_without_an_answer_is_ended() -> None:
    with pytest.raises(LowRankError, match="its process gave no answer in 1 seconds"):
        apart.Host("foo").ask(signal.pause, limit=1)


def test_the_list_tries_what_is_there_and_says_what_the_rest_takes(monkeypatch: Any) -> None:
    tried = []
    monkeypatch.setattr(runtime, "probe_apart", lambda settings, *rest: tried.append(settings) or "works")
    found = dict(lr.pipeline.providers(provider="foo", provider_option="a=1", provider_library="Foo=foo.so"))
    assert found["CPUExecutionProvider"] == found["Foo"] == "works"
    assert CPU not in [s.provider for s in tried], "the CPU needs no process of its own"
    assert [(s.options, s.libraries) for s in tried if s.provider == "Foo"] == [((("a", "1"),), (("Foo", "foo.so"),))]
    assert found[NNAPI] == "not in this build; it needs an Android device and the onnxruntime-android package"


def test_times_of_a_simulator_are_not_those_of_the_device(monkeypatch: Any) -> None:
    monkeypatch.setattr(providers.platform, "machine", lambda: "x86_64")
    assert "its times say nothing of the device's" in runtime.simulated("QNNExecutionProvider")
    assert runtime.simulated(CPU) == ""
    latency = Latency("QNNExecutionProvider", 1, 1, 2.0, 1.0, 2.0, 1.0, 2.0, 2.0, 2.0, {"QNNExecutionProvider": 3})
    check = lr.Verification(Size(1, 1, 1), Size(1, 1, 1), Accuracy("top1", 1, 1, 0, 0, 1, {}), (latency,), (), {})
    console = Console(record=True, file=io.StringIO(), width=200)
    console.print(*render_verification(check))
    assert "ms, QNN (simulator), batch 1" in console.export_text()
    monkeypatch.setattr(providers.platform, "machine", lambda: "aarch64")
    assert runtime.simulated("QNNExecutionProvider") == ""

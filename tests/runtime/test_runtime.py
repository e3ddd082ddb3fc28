from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from scipy import stats

from onnx_lowrank import runtime
from onnx_lowrank.runtime import (
    CPU,
    RunSettings,
    Session,
    Timing,
    available_providers,
    block_size,
    known_providers,
    probe,
    tensor_shapes,
    time_pair,
    version,
)
from onnx_lowrank.runtime.timing import BLOCKS
from onnx_lowrank.types import LowRankError
from tests.helpers import parse

MODEL = parse(
    "agraph (float[N, 3] x) => (float[N, 2] y, float[N, 3] z) { y = MatMul(x, w)  z = Relu(x) }",
    w=np.arange(6, dtype=np.float32).reshape(3, 2),
)
FEEDS = {"x": np.array([[1.0, -2.0, 3.0]], dtype=np.float32)}


def session(settings=None):
    return Session(MODEL.SerializeToString(), settings)


# --- providers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CPUExecutionProvider", "cpuexecutionprovider", "CPU", "cpu"])
def test_a_provider_is_known_by_its_full_and_its_short_name(name):
    assert RunSettings(name).provider_name == CPU


@pytest.mark.parametrize("name", ["gpu", "", "CPUExecution", "TensorrtExecutionProvider"])
def test_a_provider_that_is_not_there_is_told_in_one_line_with_those_that_are(name):
    with pytest.raises(LowRankError) as caught:
        session(RunSettings(name))
    message = str(caught.value)
    assert message.startswith(f"execution provider '{name}' is not in this build of ONNX Runtime: one of ")
    assert CPU in message
    assert "\n" not in message


def test_the_cpu_is_available_and_known():
    assert CPU in available_providers()
    assert set(available_providers()) <= set(known_providers())
    assert version() == onnxruntime.__version__


# --- sessions -----------------------------------------------------------------------------------------------------


def test_a_session_returns_all_outputs_or_those_asked_for():
    outputs = session().run(FEEDS)
    assert session().outputs == ("y", "z")
    assert outputs[0].tolist() == [[8.0, 10.0]]
    assert outputs[1].tolist() == [[1.0, 0.0, 3.0]]
    assert [o.tolist() for o in session().run(FEEDS, ["z"])] == [[[1.0, 0.0, 3.0]]]


def test_a_model_is_read_from_a_path_from_its_name_and_from_bytes(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(MODEL, path)
    for source in (path, str(path), path.read_bytes()):
        assert Session(source).run(FEEDS)[0].tolist() == [[8.0, 10.0]]


def test_external_data_of_bytes_is_looked_for_in_the_folder_given(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.ModelProto.FromString(MODEL.SerializeToString()),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert Session(path.read_bytes(), folder=tmp_path).run(FEEDS)[0].tolist() == [[8.0, 10.0]]
    with pytest.raises(LowRankError, match="ONNX Runtime cannot load the model"):
        Session(path.read_bytes(), folder=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "damaged",
    [b"", b"no model at all", MODEL.SerializeToString()[:-20], Path("/nowhere/model.onnx")],
    ids=["nothing", "text", "cut off", "no file"],
)
def test_a_damaged_model_is_told_in_one_line(damaged):
    with pytest.raises(LowRankError) as caught:
        Session(damaged)
    assert str(caught.value).startswith("ONNX Runtime cannot load the model: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.__cause__ is not None


def test_feeds_that_do_not_fit_are_told_with_their_shapes():
    with pytest.raises(LowRankError, match=r"^the model does not run on inputs x \[1, 4\]: .*; give --input-shape"):
        session().run({"x": np.zeros((1, 4), np.float32)})


def test_a_small_model_is_placed_on_the_cpu():
    assert session().placement == {CPU: 2}
    assert session(RunSettings(optimize=False)).placement == {CPU: 2}


def test_optimisations_can_be_turned_off():
    model = parse("agraph (float[2] x) => (float[2] y) { a = Identity(x)  b = Identity(a)  y = Relu(b) }")
    kept = Session(model.SerializeToString(), RunSettings(optimize=False))
    removed = Session(model.SerializeToString())
    assert kept.placement == {CPU: 3}
    assert removed.placement == {CPU: 1}


class Old:
    """A session of a version that does not tell where its nodes run."""

    def run(self, outputs, feeds):
        return []

    def get_outputs(self):
        return []


def test_where_nodes_run_is_left_open_by_a_version_that_does_not_say(monkeypatch):
    monkeypatch.setattr(runtime.session.ort, "InferenceSession", lambda *args, **kwargs: Old())
    assert session().placement == {}
    assert probe(RunSettings(), b"", {}) == "loads and runs, but this version of ONNX Runtime does not say where"


def test_a_provider_works_where_it_really_ran_something():
    model = MODEL.SerializeToString()
    assert probe(RunSettings(), model, FEEDS) == "works"
    assert probe(RunSettings(), b"damaged", FEEDS).startswith("does not work: ONNX Runtime cannot load the model")
    assert probe(RunSettings("NoSuchProvider"), model, FEEDS).startswith(
        "does not work: execution provider 'NoSuchProvider'"
    )


def test_a_provider_that_left_everything_to_the_cpu_does_not_count_as_working(monkeypatch):
    monkeypatch.setattr(runtime.Session, "placement", property(lambda self: {"OtherExecutionProvider": 2}))
    assert probe(RunSettings(), MODEL.SerializeToString(), FEEDS) == (
        "loads, but ran nothing here (all on OtherExecutionProvider)"
    )


def test_shapes_are_those_of_the_tensors_that_the_model_returns():
    feeds = {"x": np.zeros((5, 3), np.float32)}
    assert tensor_shapes(session(), feeds, ["y", "z"]) == {"y": (5, 2), "z": (5, 3)}
    assert tensor_shapes(session(), feeds, ["z", "unknown"]) == {"z": (5, 3)}
    assert tensor_shapes(session(), feeds, ["unknown"]) == {}
    assert tensor_shapes(session(), feeds, []) == {}


# --- block size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("flags\t\t: fpu sse4_2 avx2 avx512f avx512dq", 16),
        ("flags\t\t: fpu sse4_2 avx avx2", 8),
        ("Features\t: fp asimd neon", 8),
        ("", 8),
    ],
)
def test_the_block_size_follows_the_flags_of_the_processor(monkeypatch, text, size):
    monkeypatch.setattr(Path, "read_text", lambda path: text if str(path) == "/proc/cpuinfo" else pytest.fail(path))
    assert block_size() == size


def test_the_block_size_without_flags_suits_both_kinds_of_kernels(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert block_size() == 16


# --- timing -------------------------------------------------------------------------------------------------------


def test_the_speedup_is_the_median_of_the_ratios_and_not_the_ratio_of_the_medians():
    timing = Timing(np.array([10.0, 20.0, 90.0]), np.array([5.0, 5.0, 90.0]))
    assert timing.speedup == 2.0
    assert np.median(timing.first_ms) / np.median(timing.second_ms) == 4.0


def ratios(values):
    return Timing(np.asarray(values, dtype=float), np.ones(len(values)))


@pytest.mark.parametrize(
    ("rounds", "low", "high"),
    [(10, 2, 9), (11, 2, 10), (20, 6, 15), (50, 18, 33), (100, 40, 61), (3, 1, 3), (1, 1, 1)],
)
def test_the_interval_of_a_median_lies_between_these_order_statistics(rounds, low, high):
    """The tables of the binomial distribution: of 100 values, the 40th and the 61st, whatever the order of the rounds."""
    values = np.random.default_rng(0).permutation(np.arange(1, rounds + 1))
    assert ratios(values).speedup_interval == (low, high)


def test_the_interval_covers_the_median_with_at_least_95_percent():
    for rounds in range(6, 2 * BLOCKS + 1):
        low, high = (int(place) for place in ratios(np.arange(1, rounds + 1)).speedup_interval)
        # the median is between these order statistics when at least `low` and fewer than `high` values are below it
        covered = stats.binom.cdf(high - 1, rounds, 0.5) - stats.binom.cdf(low - 1, rounds, 0.5)
        assert 0.95 <= covered < 0.95 + 0.4 / np.sqrt(rounds), rounds


def test_exchanging_the_models_gives_the_reciprocal_figures():
    rng = np.random.default_rng(1)
    first, second = rng.uniform(1, 2, 37), rng.uniform(1, 2, 37)
    one, other = Timing(first, second), Timing(second, first)
    assert other.speedup == pytest.approx(1 / one.speedup)
    assert other.speedup_interval == pytest.approx(tuple(1 / x for x in reversed(one.speedup_interval)))
    assert one.speedup_interval[0] < one.speedup < one.speedup_interval[1]


def test_one_disturbed_round_moves_neither_the_speedup_nor_its_interval_much():
    values = np.full(50, 2.0)
    values[7] = 1000.0
    assert ratios(values).speedup == 2.0
    assert ratios(values).speedup_interval == (2.0, 2.0)


class Clocked:
    """A session that takes a planted time on a clock of its own."""

    def __init__(self, name, took, clock, log):
        self.name, self.took, self.clock, self.log = name, took, clock, log

    def run(self, feeds):
        self.clock[0] += next(self.took)
        self.log.append(self.name)
        return []


def planted(monkeypatch, first, second):
    clock, log = [0.0], []
    monkeypatch.setattr(runtime.timing.time, "perf_counter", lambda: clock[0])
    return Clocked("a", iter(first), clock, log), Clocked("b", iter(second), clock, log), log


def test_sessions_are_timed_in_turn_after_a_warm_up_and_who_is_first_alternates(monkeypatch):
    warm = [0.5] * 6
    a, b, log = planted(monkeypatch, [*warm, 0.004, 0.006, 0.008], [*warm[1:], 0.002, 0.003, 0.004])
    timing = time_pair(a, b, {}, rounds=3)
    assert "".join(log) == "a" + "ab" * 5 + "ab" + "ba" + "ab"
    assert timing.first_ms == pytest.approx([4, 6, 8])
    assert timing.second_ms == pytest.approx([2, 3, 4])
    assert timing.speedup == pytest.approx(2)


def test_a_slow_model_is_warmed_up_once_and_stopped_after_ten_rounds(monkeypatch):
    a, b, log = planted(monkeypatch, itertools.repeat(3.0), itertools.repeat(2.0))
    timing = time_pair(a, b, {}, rounds=50, seconds=10.0)
    assert len(timing.first_ms) == len(timing.second_ms) == 10
    assert log.count("a") == 1 + 1 + 10
    assert log.count("b") == 1 + 10


def test_a_fast_model_is_run_for_all_rounds(monkeypatch):
    a, b, _ = planted(monkeypatch, itertools.repeat(0.001), itertools.repeat(0.001))
    assert len(time_pair(a, b, {}, rounds=23).first_ms) == 23


def test_a_measurement_goes_on_for_the_least_time_however_many_rounds_it_takes(monkeypatch):
    a, b, _ = planted(monkeypatch, itertools.repeat(0.01), itertools.repeat(0.01))
    assert len(time_pair(a, b, {}, rounds=5, least=0.99).first_ms) == 50


def test_many_rounds_that_are_disturbed_alike_count_for_few():
    level = np.repeat(np.random.default_rng(0).normal(2.0, 0.1, 50), 100)
    low, high = ratios(level).speedup_interval
    assert high - low > 0.02
    assert ratios(np.sort(level[::100])).speedup_interval == pytest.approx((low, high))


def test_a_speedup_lies_between_its_bounds_however_many_rounds_there_were():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drifting = 1.8 + 0.1 * (np.arange(3000) > rng.integers(500, 2500)) + 0.3 * rng.exponential(size=3000) ** 2
        timing = ratios(drifting)
        assert timing.speedup_interval[0] <= timing.speedup <= timing.speedup_interval[1]


def test_real_sessions_are_timed_in_milliseconds():
    timing = time_pair(session(), session(), FEEDS, rounds=4)
    assert timing.first_ms.shape == timing.second_ms.shape == (4,)
    assert (timing.first_ms > 0).all() and (timing.second_ms > 0).all()

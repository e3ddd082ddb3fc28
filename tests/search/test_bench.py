"""The bench: what it measures, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.calibration import moments
from onnx_lowrank.calibration.calibrate import HELD_OUT
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.model import load
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.search import bench as bench_module
from onnx_lowrank.search.bench import Attempt, open_bench
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import LowRankError, no_progress
from onnx_lowrank.verification.verify import Latency
from tests import tiny
from tests.helpers import arrays, run


def planner(model: Any = None, **options: Any) -> Planner:
    config = make_config(**{"methods": "svd", "align": 1, "jobs": 1, **options})
    return Planner(open_subject(tiny.classifier() if model is None else model, config), config, no_progress)


def batches(**arrays: np.ndarray) -> list[Any]:
    """Data in pieces of an odd size."""
    labels = arrays.pop("labels")
    return [({"x": arrays["x"][i : i + 9]}, labels[i : i + 9]) for i in range(0, len(labels), 9)]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_the_scratch_folder_goes_when_the_work_is_done_or_fails(scratch: Path) -> None:
    with open_bench(planner()) as bench:
        bench.attempt(bench.planner.smallest("macs"))
        assert list(scratch.iterdir())
    assert not list(scratch.iterdir())
    with pytest.raises(LowRankError, match="no metric is called"), open_bench(planner(metric="beauty")):
        pass
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("size", [1, 7, 400])
def test_accuracy_does_not_depend_on_how_many_samples_run_at_a_time(monkeypatch: Any, size: int) -> None:
    data = tiny.labelled(tiny.classifier(), 100)
    with open_bench(planner(evaluate=batches(**data))) as bench:
        plan = bench.planner.smallest("macs")
        monkeypatch.setattr(bench_module, "EVALUATION_BATCH", size)
        attempt = bench.attempt(plan)
        outputs = run(attempt.model.proto, {"x": data["x"]})[0]
    assert attempt.accuracy.samples == 100
    assert attempt.accuracy.compressed == pytest.approx((outputs.argmax(axis=1) == data["labels"]).mean(), abs=1e-12)
    assert 0 < attempt.accuracy.compressed < 1


def test_the_plan_that_changes_nothing_loses_nothing() -> None:
    data = tiny.labelled(tiny.classifier(), 100)
    with open_bench(planner(evaluate=batches(**data))) as bench:
        attempt = bench.attempt(bench.planner.dense())
    assert attempt.layers == ()
    assert attempt.size == bench.original
    assert attempt.accuracy.drop == 0
    assert attempt.accuracy.others["cosine"] == pytest.approx(1)


def test_calibration_samples_stand_in_for_missing_evaluation_samples() -> None:
    with open_bench(planner(calibrate=[{"x": tiny.inputs(30)}])) as bench:
        assert bench.attempt(bench.planner.dense()).accuracy.samples == 30
        assert not bench.notes
    both = planner(calibrate=[{"x": tiny.inputs(30)}], evaluate=[{"x": tiny.inputs(20)}])
    with open_bench(both) as bench:
        assert bench.attempt(bench.planner.dense()).accuracy.samples == 20


def test_what_was_measured_is_what_was_written() -> None:
    with open_bench(planner()) as bench:
        attempt = bench.attempt(bench.planner.smallest("macs"))
        written = onnx.load(attempt.path)
        assert written == attempt.model.proto
        assert attempt.size.size_bytes == attempt.path.stat().st_size
    assert (attempt.size.macs, attempt.size.params) == tiny.count(written, {"x": tiny.inputs(1)})


def test_a_model_with_other_outputs_is_refused() -> None:
    other = tiny.classifier()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    with open_bench(planner()) as bench, pytest.raises(LowRankError, match="different outputs"):
        bench.measure(load(other), bench.planner.dense(), ())


def test_a_rewritten_model_that_is_not_valid_is_refused() -> None:
    broken = tiny.classifier()
    broken.graph.node[1].input[0] = "nowhere"
    with open_bench(planner()) as bench, pytest.raises(LowRankError, match="the rewritten model is not valid, please"):
        bench.measure(load(broken), bench.planner.dense(), ())


def test_a_model_that_no_runtime_can_run_is_refused_before_the_work() -> None:
    # its sizes are all known, so that nothing but the bench has to run it
    work = planner(tiny.strange("strange.domain.Relu"))
    with pytest.raises(LowRankError, match="ONNX Runtime cannot load the model"), open_bench(work):
        pass
    assert work.seconds == {}


def test_a_metric_of_ones_own_sees_all_outputs_and_labels_at_once(tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text(
        "def shapes(outputs, labels):\n    return 100 * len(outputs[0]) + len(labels) + 0.25 * len(outputs)\n"
        "def unlabelled(outputs, labels):\n    return 1.0 if labels is None else 0.0\n"
        "def fails(outputs, labels):\n    return outputs[5]\n"
    )
    data = tiny.labelled(tiny.classifier(), 40)
    with open_bench(planner(evaluate=batches(**data), metric=f"{tmp_path}/metric.py:shapes")) as bench:
        accuracy = bench.attempt(bench.planner.smallest("macs")).accuracy
    assert (accuracy.original, accuracy.compressed, accuracy.drop) == (4040.25, 4040.25, 0)
    with open_bench(planner(evaluate=[{"x": data["x"]}], metric=f"{tmp_path}/metric.py:unlabelled")) as bench:
        assert bench.attempt(bench.planner.dense()).accuracy.original == 1
    with (
        open_bench(planner(evaluate=batches(**data), metric=f"{tmp_path}/metric.py:fails")) as bench,
        pytest.raises(LowRankError, match=r"metric .*metric.py:fails raised IndexError: list index out of range"),
    ):
        bench.attempt(bench.planner.dense())


def test_labels_that_the_original_only_guesses_are_noted_once_and_no_drop_is_held_on_them() -> None:
    data = tiny.labelled(tiny.classifier(), 200)
    data["labels"] = np.random.default_rng(1).integers(10, size=200)
    with open_bench(planner(evaluate=batches(**data))) as bench:
        for _ in range(2):
            bench.attempt(bench.planner.smallest("macs"))
        (note,) = bench.notes
    assert "of 200 right, no better than guessing among" in note
    work = planner(evaluate=batches(**data), max_drop=0.1)
    with (
        open_bench(work) as bench,
        pytest.raises(LowRankError, match=r"^max_drop cannot be held on .* no better than gue"),
    ):
        bench.attempt(bench.planner.dense())
    work = planner(evaluate=batches(**data), max_drop=0.1, metric="agreement")
    with open_bench(work) as bench:
        assert bench.attempt(bench.planner.dense()).accuracy.drop == 0
        assert not bench.notes


def test_latency_is_that_of_both_models_on_the_same_feeds() -> None:
    data = [{"x": tiny.inputs(30)}]
    with open_bench(planner(evaluate=data, batch_size=5, threads=1)) as bench:
        latency = bench.latency(bench.attempt(bench.planner.smallest("macs")))
    assert (latency.provider, latency.threads, latency.batch) == ("CPUExecutionProvider", 1, 5)
    assert latency.original_ms > 0 and latency.compressed_ms > 0
    assert latency.original_ms <= latency.original_p90_ms and latency.compressed_ms <= latency.compressed_p90_ms
    assert latency.speedup_low_95 <= latency.speedup <= latency.speedup_high_95
    assert list(latency.placement) == ["CPUExecutionProvider"]
    assert latency.placement["CPUExecutionProvider"] >= 4  # four Gemms, and the Relu where it is not fused


def test_a_fixed_batch_is_kept() -> None:
    model = tiny.classifier()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    with open_bench(planner(model, batch_size=5)) as bench:
        assert bench.latency(bench.attempt(bench.planner.smallest("macs"))).batch == 2


def test_where_fits_to_samples_do_worse_on_others_the_weights_alone_are_taken_and_said_to_be() -> None:
    pictures = arrays(models.DIGITS_CALIBRATE)["input"][:128]
    alike = pictures.copy()
    alike[np.arange(len(pictures)) % HELD_OUT != HELD_OUT - 1] = pictures[0]
    made = {}
    for name, samples in (("alike", alike), ("varied", pictures)):
        of = planner(
            models.DIGITS,
            calibrate=[{"input": samples}],
            methods="channel_svd",
            include="*conv1*",
            budget={"macs": 0.9},
        )
        with open_bench(of) as bench:
            made[name] = bench.attempt(bench.planner.solve(bench.planner.config.budget))
    assert made["alike"].layers and made["varied"].layers
    assert bench_module.UNFITTED in made["alike"].plan.notes
    assert not any(layer.fitted for layer in made["alike"].layers)
    assert all(layer.fitted for layer in made["varied"].layers)


def test_layers_that_see_too_much_to_be_fitted_are_told_and_not_blamed_on_the_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moments, "MAX_PATCH", 8)
    pictures = arrays(models.DIGITS_CALIBRATE)["input"][:64]
    notes = lr.compress(models.DIGITS, calibrate=[{"input": pictures}], methods="spatial_svd", include="*conv2*", budget={"macs": 0.9},
                        jobs=1).report.notes  # fmt: skip
    assert bench_module.UNFITTED not in notes
    assert any("layer(s) see more than" in note and "by their weights alone" in note for note in notes)


def test_of_two_measurements_the_one_that_was_disturbed_less_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_bench(planner()) as bench:
        attempt = bench.attempt(bench.planner.smallest("macs"))
        plain = bench.latency(attempt)
        bounds = iter([(1.0, 3.0), (1.9, 2.1), (1.5, 2.5)])

        def timed(attempt: Attempt) -> Latency:
            low, high = next(bounds)
            return replace(plain, speedup=2.0, speedup_low_95=low, speedup_high_95=high)

        bench._latencies.clear()
        monkeypatch.setattr(bench, "_time", timed)
        assert bench.latency(attempt).speedup_low_95 == 1.0
        assert bench.latency_again(attempt).speedup_low_95 == 1.9
        assert bench.latency_again(attempt).speedup_low_95 == bench.latency(attempt).speedup_low_95 == 1.9

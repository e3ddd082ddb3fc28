"""What an error in a layer does to the outputs is measured on the model, not read off the layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.calibration import sensitivity
from onnx_lowrank.calibration.sensitivity import _few, agreeing, interpolated, measured
from onnx_lowrank.candidates import group_candidates, group_layers
from onnx_lowrank.graph.find import find_layers
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import infer, model_inputs, sample_shapes
from onnx_lowrank.types import Candidate, no_progress
from onnx_lowrank.work.tasks import Work
from tests.helpers import arrays, normal, parse

BRANCHES = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
  [main] a = Conv <pads = [1,1,1,1]> (x, w1)
  [aside] b = Conv <pads = [1,1,1,1]> (x, w2)
  little = Mul (b, tenth)
  y = Add (a, little)
}"""


def branches():
    """A sum in which one addend counts for a tenth, that is a hundredth of the energy."""
    weight = normal(8, 8, 3, 3)
    return parse(BRANCHES, w1=weight, w2=weight[::-1].copy(), tenth=np.array([0.1], "float32"))


def damages(proto, feeds: list[dict[str, np.ndarray]], methods=("channel_svd",)) -> list[tuple[Candidate, ...]]:
    model = load(proto)
    inputs = model_inputs(model)
    found = find_layers(model, infer(model, sample_shapes(inputs, {})[0]))
    groups = group_layers(found.layers)
    candidates = [group_candidates(group, methods, 1)[0] for group in groups]
    return measured(
        model, found, groups, candidates, statistics={}, feeds=feeds, seed=0, work=Work(), progress=no_progress
    )


def test_an_error_counts_for_what_it_does_to_the_output() -> None:
    main, aside = damages(branches(), [{"x": normal(32, 8, 6, 6, seed=3)}])
    # the same kernel with its output channels in another order: the same candidates
    for one, other in zip(main[1:], aside[1:], strict=True):
        assert one.rank == other.rank
        assert one.error == pytest.approx(100 * other.error, rel=0.2)


def test_the_damage_grows_with_the_error() -> None:
    (group, *_) = damages(branches(), [{"x": normal(16, 8, 6, 6, seed=3)}])
    errors = [c.error for c in sorted(group[1:], key=lambda c: -c.cost.macs)]
    assert errors == sorted(errors) and errors[0] < 0.1 * errors[-1]
    assert group[0].dense and group[0].error == 0


def test_an_allocation_takes_from_the_layer_that_counts_less() -> None:
    feeds = [{"x": normal(64, 8, 6, 6, seed=3)}]
    plan = lr.analyze(branches(), calibrate=feeds, budget={"macs": 0.6}, methods="channel_svd", align=1)
    kept = {choice.layers[0]: choice.cost.macs for choice in plan.choices}
    assert kept["aside"] < 0.5 * kept["main"]


@pytest.mark.parametrize("error", [0.001, 0.05, 0.9])
def test_outside_the_sizes_measured_the_damage_goes_on_as_it_rose(error: float) -> None:
    points = [(0.1, 0.01), (0.4, 0.01 * 4**1.5)]
    assert interpolated(points, error) == pytest.approx(0.01 * (error / 0.1) ** 1.5)


def test_a_damage_never_falls_with_the_error() -> None:
    points = [(0.03, 0.5), (0.12, 0.2), (0.4, 0.9)]  # the second by chance
    curve = [interpolated(points, e) for e in np.geomspace(0.01, 1, 30)]
    assert curve == sorted(curve)
    assert interpolated(points, 0.0) == 0


def test_with_more_layers_each_is_seen_on_fewer_samples() -> None:
    feeds = [{"x": np.zeros((64, 2))} for _ in range(16)]
    counts = [sum(len(b["x"]) for b in _few(feeds, probes, 1 << 30)) for probes in (30, 300, 600, 9000)]
    assert counts[0] == 1024 and counts[1] // 2 == counts[2] and counts[3] == 16
    alone = [{"x": np.zeros((64, 2)), "scale": np.zeros(1)}]
    assert _few(alone, 90000, 1 << 30) == alone  # an input without samples cannot be cut


def test_samples_whose_activations_do_not_fit_are_left_out_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"input": arrays(models.DIGITS_CALIBRATE)["input"][:128]}]
    options: dict[str, Any] = {"calibrate": feeds, "budget": {"macs": 0.5}, "methods": "channel_svd,svd"}
    whole = lr.compress(models.DIGITS, **options)
    assert not any("do not fit" in note for note in whole.report.notes)
    monkeypatch.setattr("onnx_lowrank.subject.BATCH", 32)
    monkeypatch.setattr("onnx_lowrank.planning.fitting.FITTING_BYTES", 1)
    few = lr.compress(models.DIGITS, **options)
    assert few.met
    assert any(note.startswith("layers were fitted on 32 of 128 calibration samples") for note in few.report.notes)


def test_every_layer_of_the_shipped_model_has_a_damage() -> None:
    feeds = [{"input": arrays(models.DIGITS_CALIBRATE)["input"][:64]}]
    plan = lr.analyze(models.DIGITS, calibrate=feeds, budget={"macs": 0.5})
    assert all(choice.dense or 0 < choice.error < 10 for choice in plan.choices)


def test_samples_seen_in_portions_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(models.DIGITS)
    found = find_layers(model, infer(model, sample_shapes(model_inputs(model), {})[0]))
    groups = group_layers(found.layers)
    candidates = [group_candidates(group, ("channel_svd",), 4)[0] for group in groups]
    pictures = arrays(models.DIGITS_TEST)["input"]
    feeds = [{"input": pictures[i : i + 40]} for i in range(0, 200, 40)]

    def errors() -> list[float]:
        made = agreeing(model, found, groups, candidates, feeds=feeds, seed=0, work=Work(), progress=no_progress)
        return [candidate.error for group in made for candidate in group]

    whole = errors()
    assert max(whole) > 0
    monkeypatch.setattr(sensitivity, "ACTIVATIONS_BYTES", 1)
    assert errors() == pytest.approx(whole)


def test_no_more_samples_than_fit_are_looked_at() -> None:
    feeds = [{"x": np.zeros((64, 4))} for _ in range(4)]
    assert sum(len(batch["x"]) for batch in _few(feeds, 1, 100)) == 100
    assert sum(len(batch["x"]) for batch in _few(feeds, 1, 1)) == 16

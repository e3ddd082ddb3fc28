"""The samples that layers are fitted on: from all over, and in no order that a step which looks at the first few would fall for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import models
from onnx_lowrank import subject
from onnx_lowrank.config import make_config
from onnx_lowrank.planning import fitting
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import no_progress
from tests.helpers import arrays


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits sorted by class; the first pixel, which is 0 in all of them, says which."""
    held = arrays(models.DIGITS_TEST)
    order = np.argsort(held["labels"], kind="stable")
    pictures, labels = held["input"][order], held["labels"][order]
    pictures[:, 0, 0, 0] = labels
    path = tmp_path_factory.mktemp("data") / "sorted.npz"
    np.savez(path, input=pictures, labels=labels)
    return path


def classes(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> list[np.ndarray]:
    monkeypatch.setattr(subject, "CALIBRATION_SAMPLES", most)
    config = make_config(calibrate=path, budget={"macs": 0.5})
    feeds = Planner(open_subject(models.DIGITS, config), config, no_progress).fitting.feeds
    return [batch["input"][:, 0, 0, 0] for batch in feeds or []]


def test_of_many_samples_those_taken_are_of_all_classes(in_order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = np.concatenate(classes(in_order, monkeypatch, 100))
    assert len(taken) == 100
    counts = np.bincount(taken.astype(int), minlength=10)
    assert counts.min() >= 8 and counts.max() <= 12


def test_samples_that_stand_class_by_class_are_mixed(in_order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = classes(in_order, monkeypatch, 2048)
    assert [len(batch) for batch in batches] == [64] * 9 + [24]
    assert all(len(set(batch)) == 10 for batch in batches)
    with np.load(in_order) as held:
        assert sorted(np.concatenate(batches)) == sorted(held["labels"])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 0, 1, 1], True), ([0, 10, 10, 2, 2], True), ([0, 1, 0, 1], False), ([3, 3, 3], False), ([], False)],
)
def test_classes_stand_one_by_one_in_whatever_order_they_are(labels: list[int], expected: bool) -> None:
    assert fitting.in_order([np.array(labels[:2], int), np.array(labels[2:], int)]) is expected


def test_samples_in_another_order_stay_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = arrays(models.DIGITS_TEST)
    held["input"][:, 0, 0, 0] = held["labels"]
    np.savez(tmp_path / "as_is.npz", **held)
    taken = np.concatenate(classes(tmp_path / "as_is.npz", monkeypatch, 2048))
    np.testing.assert_array_equal(taken, held["labels"])


def test_samples_of_unequal_shapes_stay_in_their_order() -> None:
    feeds = [{"x": np.zeros((2, 3, 4))}, {"x": np.ones((2, 3, 5))}]
    assert [batch["x"].shape for batch in fitting.mixed(feeds, 0)] == [(2, 3, 4), (2, 3, 5)]

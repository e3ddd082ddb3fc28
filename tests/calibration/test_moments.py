"""Patches too long for a moment: what stands for it says the same."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.calibration import moments
from onnx_lowrank.calibration.calibrate import collect
from onnx_lowrank.types import LayerStatistics, no_progress
from tests.calibration.test_calibrate import opened
from tests.helpers import normal, parse

CONV = "g (float[N, 3, 5, 5] x) => (float[N, 4, 5, 5] y) { [layer] y = Conv <pads = [1,1,1,1]> (x, w) }"
LENGTH = 27


def collected(monkeypatch: pytest.MonkeyPatch, *, limit: int, longest: int = 100) -> dict[str, LayerStatistics]:
    monkeypatch.setattr(moments, "MAX_PATCH", limit)
    monkeypatch.setattr(moments, "LONGEST_PATCH", longest)
    model, found = opened(parse(CONV, w=normal(4, 3, 3, 3)))
    batches = [{"x": 1 + normal(8, 3, 5, 5, seed=s)} for s in range(3)]
    return collect(model, found, ["layer"], batches, seed=0, progress=no_progress)


def test_long_patches_are_kept_and_shrunk_as_their_covariance_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = collected(monkeypatch, limit=LENGTH - 1)["layer"]
    assert seen.patches is not None and seen.patches.shape == (seen.samples, LENGTH) and not seen.second_moment.size
    np.testing.assert_allclose(seen.patches.mean(axis=0), 0, atol=1e-6)
    # Ledoit & Wolf (2004), lemma 3.2 to 3.4, term by term
    covariance = seen.patches.T @ seen.patches / seen.samples
    scale = np.trace(covariance) / LENGTH
    noise = np.mean([np.square(np.outer(p, p) - covariance).sum() for p in seen.patches]) / seen.samples
    share = noise / np.square(covariance - scale * np.eye(LENGTH)).sum()
    assert 0.001 < share < 1
    np.testing.assert_allclose(seen.shrinkage, (share, scale), rtol=1e-4)
    kernel = normal(4, LENGTH, seed=7)
    outputs = kernel @ ((1 - share) * covariance + share * scale * np.eye(LENGTH)) @ kernel.T
    np.testing.assert_allclose(seen.output_covariance(kernel), outputs, rtol=1e-4, atol=1e-4)
    assert seen.output_energy(kernel) == pytest.approx(np.trace(outputs), rel=1e-4)


def test_both_forms_agree_on_what_a_kernel_makes_of_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    short = collected(monkeypatch, limit=LENGTH)["layer"]
    long = collected(monkeypatch, limit=LENGTH - 1)["layer"]
    assert short.patches is None and long.patches is not None
    kernel = normal(4, LENGTH, seed=7)
    np.testing.assert_allclose(long.mean, short.mean, rtol=1e-5)
    np.testing.assert_allclose(long.output_covariance(kernel), short.output_covariance(kernel), rtol=0.1, atol=0.1)


def test_of_patches_longer_than_that_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not collected(monkeypatch, limit=10, longest=LENGTH - 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_kernels_of_any_precision_are_seen_in_that_of_the_patches(dtype: type) -> None:
    patches = 30 * normal(20, 9000)
    seen = LayerStatistics(np.zeros(9000), np.empty((0, 0)), 20, patches, (0.5, 900.0))
    kernel = normal(8, 9000, seed=3).astype(dtype)
    assert np.isfinite(seen.output_energy(kernel))
    assert np.trace(seen.output_covariance(kernel)) == pytest.approx(seen.output_energy(kernel), rel=1e-4)


def test_rows_of_a_flattened_activation_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MAX_PATCH", 10)
    monkeypatch.setattr("onnx_lowrank.calibration.calibrate.LONG_ROWS", 48)
    text = """g (float[N, 5, 12] x) => (float[M, 4] y) {
      flat = Reshape (x, shape)
      [layer] y = Gemm (flat, w)
    }"""
    model, found = opened(parse(text, w=normal(12, 4), shape=np.array([-1, 12])))
    batches = [{"x": normal(20, 5, 12, seed=s)} for s in range(3)]
    seen = collect(model, found, ["layer"], batches, seed=0, progress=no_progress)["layer"]
    assert seen.samples == 48  # of 300 rows


def test_no_more_long_patches_are_kept_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lowrank.calibration.calibrate.LONG_ROWS", 48)
    assert collected(monkeypatch, limit=10)["layer"].samples == 48  # two of each of 24 samples

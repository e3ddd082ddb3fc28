"""The regression of targets on inputs: both of its forms against the solution written out."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.rewriting.regression import RIDGES, ByMoments, ByPatches, Regression, regression_of
from onnx_lowrank.types import LayerStatistics

ROWS, LENGTH, OUT = 60, 12, 6


def problem(group: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A kernel (O, D / g), inputs (n, D) with a mean, and targets that another kernel and noise make of them."""
    rng = np.random.default_rng(0)
    inputs = (rng.standard_normal((ROWS, LENGTH)) * np.linspace(0.3, 2, LENGTH) + 1).astype(np.float32)
    weight = rng.standard_normal((OUT, LENGTH // group))
    other = weight + 0.5 * rng.standard_normal(weight.shape)
    blocks = zip(np.split(inputs, group, axis=1), np.split(other, group), strict=True)
    targets = np.concatenate([x @ w.T for x, w in blocks], axis=1) + noise * rng.standard_normal((ROWS, OUT))
    return weight, inputs, targets.astype(np.float32)


def regression(form: type[Regression], weight: np.ndarray, group: int, inputs: np.ndarray) -> Regression:
    fitted, apart = inputs[:48], inputs[48:]
    mean = fitted.mean(axis=0, dtype=np.float64)
    moment, patches = fitted.T.astype(np.float64) @ fitted / len(fitted), (fitted - mean).astype(np.float32)
    by_moment = LayerStatistics(mean, moment, len(fitted))
    stats = by_moment if form is ByMoments else LayerStatistics(mean, np.empty((0, 0)), len(fitted), patches)
    made = regression_of(weight, group, stats, fitted, apart)
    assert type(made) is form
    return made


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("form", [ByMoments, ByPatches])
def test_the_kernel_is_the_solution_of_the_pulled_regression(form: type[Regression], group: int) -> None:
    weight, inputs, targets = problem(group)
    made = regression(form, weight, group, inputs)
    mean = targets[:48].mean(axis=0, dtype=np.float64)
    kernel = made.kernel(
        targets[:48], mean, np.empty((0, OUT), np.float32), np.ones(OUT)
    )  # none held out: the first pull
    for index in range(group):
        ins, outs = (slice(index * n // group, (index + 1) * n // group) for n in (LENGTH, OUT))
        x = inputs[:48, ins] - inputs[:48, ins].mean(axis=0)
        covariance = x.T @ x / 48
        pull = RIDGES[0] * np.trace(covariance) / len(covariance)
        cross = (targets[:48, outs] - mean[outs]).T @ x / 48
        wanted = (cross + pull * weight[outs]) @ np.linalg.inv(covariance + pull * np.eye(len(covariance)))
        np.testing.assert_allclose(kernel[outs], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [ByMoments, ByPatches])
def test_targets_that_say_nothing_leave_the_kernel_as_it_is(form: type[Regression]) -> None:
    weight, inputs, _ = problem(1)
    made = regression(form, weight, 1, inputs)
    noise = 30 * np.random.default_rng(1).standard_normal((ROWS, OUT)).astype(np.float32)
    targets = (inputs @ weight.T).astype(np.float32)
    targets[:48] += noise[:48]  # the rows held out tell that it is noise
    kernel = made.kernel(targets[:48], targets[:48].mean(axis=0, dtype=np.float64), targets[48:], np.ones(OUT))
    np.testing.assert_array_equal(kernel, weight)


@pytest.mark.parametrize("form", [ByMoments, ByPatches])
def test_targets_that_say_something_change_it(form: type[Regression]) -> None:
    weight, inputs, targets = problem(1, noise=0.01)
    made = regression(form, weight, 1, inputs)
    mean = targets[:48].mean(axis=0, dtype=np.float64)
    kernel = made.kernel(targets[:48], mean, targets[48:], np.ones(OUT))
    inner = inputs[48:] - inputs[:48].mean(axis=0)
    missed = [np.square(targets[48:] - mean - inner @ w.T).mean() for w in (kernel, weight)]
    assert missed[0] < 0.01 * missed[1]


@pytest.mark.parametrize("group", [1, 2])
def test_outputs_of_the_layer_itself_leave_it_as_it_is_however_far_its_moment_is_shrunk(group: int) -> None:
    """A few patches, whose covariance is mostly replaced by a multiple of the identity."""
    weight, inputs, _ = problem(group)
    fitted = inputs[:10] - inputs[:10].mean(axis=0)
    share, variance = 0.6, float(np.square(fitted).mean())
    moment = (1 - share) * (fitted.T @ fitted).astype(np.float64) / 10 + share * variance * np.eye(LENGTH)
    made = ByMoments(weight, group, LayerStatistics(np.zeros(LENGTH), moment, 10), fitted, fitted[:0])
    blocks = zip(np.split(fitted, group, axis=1), np.split(weight, group), strict=True)
    targets = np.concatenate([x @ w.T for x, w in blocks], axis=1)
    kernel = made.kernel(targets, np.zeros(OUT), targets[:0], np.ones(OUT))
    np.testing.assert_allclose(kernel, weight, rtol=1e-4, atol=1e-5)

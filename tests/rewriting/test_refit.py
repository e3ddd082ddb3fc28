"""Layers refitted in sequence: what the data brings, and that every way a layer can be wired is handled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.calibration import moments
from onnx_lowrank.rewriting.refit import refit
from onnx_lowrank.types import Factorization
from tests.helpers import arrays, normal, parse, run


def samples(count: int = 128) -> list[dict[str, np.ndarray]]:
    """Unlabelled pictures of digits."""
    return [{"input": arrays(models.DIGITS_CALIBRATE)["input"][:count]}]


def outputs(model, name: str = "input") -> np.ndarray:
    return run(model, {name: arrays(models.DIGITS_TEST)["input"][:200]})[0]


def error(model) -> float:
    reference = outputs(str(models.DIGITS))
    return float(np.linalg.norm(outputs(model) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("methods", ["spatial_svd,svd", "cp3", "tucker2,svd"])
def test_unlabelled_samples_bring_the_outputs_back(methods: str) -> None:
    plan = lr.analyze(models.DIGITS, budget={"macs": 0.3}, methods=methods)
    blind = lr.apply(models.DIGITS, plan)
    aware = lr.apply(models.DIGITS, plan, calibrate=samples())
    assert aware.report.compressed.macs == blind.report.compressed.macs
    assert error(aware.model) < 0.6 * error(blind.model)  # on pictures that the fit has not seen


def test_layers_that_see_long_patches_are_fitted_where_a_closed_form_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MAX_PATCH", 8)
    options: dict[str, Any] = {"calibrate": samples(), "budget": {"macs": 0.3}, "jobs": 1}
    aware = lr.compress(models.DIGITS, methods="channel_svd,svd", **options)
    blind = lr.compress(models.DIGITS, methods="channel_svd,svd", jobs=1, budget={"macs": 0.3})
    assert {layer.fitted for layer in aware.report.layers} == {True}
    assert error(aware.model) < 0.6 * error(blind.model)
    assert not any("by their weights alone" in note for note in aware.report.notes)
    other = lr.compress(models.DIGITS, methods="spatial_svd,svd", **options)
    assert {layer.decomposition: layer.fitted for layer in other.report.layers}["spatial_svd"] is False
    assert any("by their weights alone" in note for note in other.report.notes)


def test_a_kernel_that_several_layers_read_is_not_fitted_to_long_patches_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moments, "MAX_PATCH", 8)
    text = """g (float[N, 8, 5, 5] x) => (float[N, 8, 5, 5] y) {
      [one] a = Conv <pads = [1,1,1,1]> (x, w)
      [two] y = Conv <pads = [1,1,1,1]> (a, w)
    }"""
    model, x = parse(text, w=normal(8, 8, 3, 3)), normal(64, 8, 5, 5, seed=1)
    report = lr.compress(model, calibrate=[{"x": x}], budget={"macs": 0.5}, methods="channel_svd", jobs=1).report
    assert [layer.fitted for layer in report.layers] == [False, False]
    assert any("2 layer(s) see more than" in note for note in report.notes)


def test_the_same_samples_and_seed_give_the_same_bytes() -> None:
    made = [
        lr.compress(models.DIGITS, calibrate=samples(), budget={"macs": 0.4}, methods="channel_svd,svd")
        for _ in range(2)
    ]
    assert made[0].model.SerializeToString() == made[1].model.SerializeToString()


def test_a_layer_without_a_bias_is_given_one_that_takes_the_mean() -> None:
    text = "g (float[N, 8, 5, 5] x) => (float[N, 8, 5, 5] y) { [only] y = Conv <pads = [1,1,1,1]> (x, w) }"
    model = parse(text, w=normal(8, 8, 3, 3))
    x = 3 + normal(64, 8, 5, 5, seed=1)
    result = lr.compress(model, calibrate=[{"x": x}], budget={"macs": 0.3}, methods="channel_svd")
    (node,) = [n for n in result.model.graph.node if n.output[0] == "y"]
    assert len(node.input) == 3
    difference = run(result.model, {"x": x})[0] - run(model, {"x": x})[0]
    np.testing.assert_allclose(difference.mean(axis=(0, 2, 3)), 0, atol=1e-3)


@pytest.mark.parametrize(
    "layer",
    [
        "MatMul (x, w)",
        "Gemm (x, w)",
        "Gemm <alpha = 2.0, beta = 0.5> (x, w, c)",
        "Gemm <alpha = 0.5> (x, w, m)",
    ],
)
def test_products_are_fitted_in_all_their_forms(layer: str) -> None:
    rng = np.random.default_rng(0)
    few = (rng.standard_normal((256, 5)) @ rng.standard_normal((5, 16)) + 1).astype("float32")
    stored = {"w": normal(16, 12), "c": normal(12), "m": normal(1, 12)}
    used = {name: value for name, value in stored.items() if name in layer.replace("MatMul", "").replace("Gemm", "")}
    model = parse(f"g (float[N, 16] x) => (float[N, 12] y) {{ [only] y = {layer} }}", **used)
    result = lr.compress(model, calibrate=[{"x": few}], budget={"params": 0.95}, methods="svd", align=1)
    assert result.report.layers
    got, wanted = run(result.model, {"x": few})[0], run(model, {"x": few})[0]
    # inputs of six directions (five and their mean): a rank of that size loses nothing, though the kernel is full
    assert np.linalg.norm(got - wanted) < 2e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["channel_svd", "channel_svd_in", "spatial_svd", "tucker2", "cp3"])
def test_transposed_convolutions_are_fitted_to_what_they_see(method: str) -> None:
    text = """g (float[N, 16, 6, 6] x) => (float[N, 12, 13, 13] y) {
      [only] y = ConvTranspose <strides = [2,2]> (x, w, b)
    }"""
    model = parse(text, w=normal(16, 12, 3, 3), b=normal(12))
    mix = normal(16, 16, seed=3) * np.geomspace(1, 0.01, 16, dtype="float32")
    x = np.einsum("nihw,oi->nohw", normal(96, 16, 6, 6, seed=2), mix)
    plan = lr.analyze(model, budget={"macs": 0.6}, methods=method, align=1)
    fitted, blind = (lr.apply(model, plan, **given) for given in ({"calibrate": [{"x": x[:64]}]}, {}))
    wanted = run(model, {"x": x[64:]})[0]
    lost = [np.linalg.norm(run(each.model, {"x": x[64:]})[0] - wanted) for each in (fitted, blind)]
    assert lost[0] < 0.8 * lost[1]


def test_layers_that_share_a_kernel_are_fitted_to_what_they_see_together() -> None:
    text = """g (float[N, 16, 6, 6] x, float[N, 16, 6, 6] z) => (float[N, 12, 6, 6] y) {
      [one] a = Conv <pads = [1,1,1,1]> (x, w)
      [two] b = Conv <pads = [1,1,1,1]> (z, w)
      y = Add (a, b)
    }"""
    model = parse(text, w=normal(12, 16, 3, 3))
    few = normal(16, 6, seed=3)
    feeds = {name: np.einsum("nihw,oi->nohw", normal(96, 6, 6, 6, seed=n), few) for n, name in enumerate("xz")}
    result = lr.compress(model, calibrate=[feeds], budget={"macs": 0.95}, methods="channel_svd_in", align=1)
    assert {layer.name for layer in result.report.layers} == {"one", "two"}
    got, wanted = run(result.model, feeds)[0], run(model, feeds)[0]
    # inputs of six directions in both places: a rank of that size loses nothing, though the kernel is full
    assert np.linalg.norm(got - wanted) < 2e-2 * np.linalg.norm(wanted)
    assert len({node.input[1] for node in result.model.graph.node if node.op_type == "Conv"}) == 2


def test_a_sum_is_made_right_by_the_layer_that_comes_last() -> None:
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
      [one] a = Conv <pads = [1,1,1,1]> (x, w1)
      [two] b = Conv <pads = [1,1,1,1]> (x, w2)
      y = Add (a, b)
    }"""
    model = parse(text, w1=normal(8, 8, 3, 3), w2=normal(8, 8, 3, 3, seed=1))
    x = normal(128, 8, 6, 6, seed=2)
    plan = lr.analyze(model, budget={"macs": 0.4}, methods="channel_svd", align=1)
    assert [c.decomposition for c in plan.choices] == ["channel_svd"] * 2
    fitted = lr.apply(model, plan, calibrate=[{"x": x}])
    got, wanted = run(fitted.model, {"x": x})[0], run(model, {"x": x})[0]
    # both layers see the same input, so the second can mend what the first lost as far as its rank allows
    alone = np.linalg.norm(run(lr.apply(model, plan).model, {"x": x})[0] - wanted)
    assert np.linalg.norm(got - wanted) < 0.85 * alone


def test_layers_that_share_a_kernel_and_transposed_ones_run_along() -> None:
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 12, 12] y) {
      [one] a = Conv <pads = [1,1,1,1]> (x, w)
      r = Relu (a)
      [two] b = Conv <pads = [1,1,1,1]> (r, w)
      [up] y = ConvTranspose <strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]> (b, u)
    }"""
    model = parse(text, w=normal(8, 8, 3, 3), u=normal(8, 8, 3, 3, seed=1))
    x = normal(32, 8, 6, 6, seed=2)
    result = lr.compress(model, calibrate=[{"x": x}], budget={"macs": 0.6}, methods="channel_svd", align=1)
    names = {layer.name for layer in result.report.layers}
    assert {"one", "two"} <= names
    assert np.isfinite(run(result.model, {"x": x})[0]).all()
    kernels = {n.input[1] for n in result.model.graph.node if n.op_type == "Conv"}
    assert len(kernels) == 2 + ("up" in names)  # stored once for both


@pytest.mark.parametrize("count", [24, 200])
@pytest.mark.parametrize("methods", ["channel_svd,svd", "cp3"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_refit_never_raises_the_error_on_samples_it_has_not_seen(count: int, methods: str, share: float) -> None:
    plan = lr.analyze(models.DIGITS, budget={"macs": share}, methods=methods, align=8)
    blind, fitted = lr.apply(models.DIGITS, plan), lr.apply(models.DIGITS, plan, calibrate=samples(count))
    assert error(fitted.model) < error(blind.model)


def test_where_the_fit_does_harm_the_weights_alone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lr.analyze(models.DIGITS, budget={"macs": 0.3}, methods="channel_svd,svd")
    blind = lr.apply(models.DIGITS, plan)

    def harmful(*args: Any, **options: Any) -> dict[tuple[str, ...], Factorization]:
        made = refit(*args, **options)
        return {
            layers: replace(each, kernels=((-each.kernels[0][0], *each.kernels[0][1:]),))
            for layers, each in made.items()
        }

    monkeypatch.setattr("onnx_lowrank.rewriting.rewrite.refit", harmful)
    kept = lr.apply(models.DIGITS, plan, calibrate=samples(64))
    assert error(kept.model) == error(blind.model)
    assert any("give more calibration samples" in note for note in kept.report.notes)


@pytest.mark.parametrize("layer", ["Conv <pads = [1,1,1,1]> (x, w)", "Conv <pads = [1,1,1,1]> (x, w, c)"])
def test_on_inputs_without_structure_the_refit_does_no_harm(layer: str) -> None:
    """Independent inputs of one variance: the norm of the kernel is that of the output, and there is nothing to learn."""
    model = parse(
        f"g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {{ [only] a = {layer}\n y = Relu (a) }}",
        **({"w": normal(8, 8, 3, 3)} | ({"c": normal(8)} if ", c" in layer else {})),
    )
    seen, other = normal(16, 8, 6, 6, seed=1), normal(256, 8, 6, 6, seed=2)
    plan = lr.analyze(model, budget={"macs": 0.4}, methods="channel_svd", align=1)
    wanted = run(model, {"x": other})[0]
    blind, fitted = (
        np.linalg.norm(run(lr.apply(model, plan, **options).model, {"x": other})[0] - wanted)
        for options in ({}, {"calibrate": [{"x": seen}]})
    )
    assert fitted < 1.02 * blind


def test_what_a_clip_cuts_off_is_left_free() -> None:
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
      [only] a = Conv <pads = [1,1,1,1]> (x, w, c)
      y = Clip (a, low, high)
    }"""
    # half of each channel is cut off, at the one end or the other
    bias = np.array([-1, 1] * 4, "float32")
    model = parse(text, w=normal(8, 8, 3, 3), c=bias, low=np.float32(-1), high=np.float32(1))
    x = normal(512, 8, 6, 6, seed=2)
    result = lr.compress(model, calibrate=[{"x": x}], budget={"macs": 0.56}, methods="channel_svd", align=1)
    free = parse(text.replace("Clip (a, low, high)", "Identity (a)"), w=normal(8, 8, 3, 3), c=bias)
    plain = lr.compress(free, calibrate=[{"x": x}], budget={"macs": 0.56}, methods="channel_svd", align=1)
    other = normal(64, 8, 6, 6, seed=3)
    wanted = run(model, {"x": other})[0]
    cut = np.linalg.norm(run(result.model, {"x": other})[0] - wanted)
    uncut = np.linalg.norm(np.clip(run(plain.model, {"x": other})[0], -1, 1) - wanted)
    assert cut < 0.97 * uncut

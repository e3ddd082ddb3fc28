"""The published pipelines that train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.ranks import evbmf
from onnx_lowrank.types import ConvSpec, LowRankError
from tests.helpers import arrays, normal

pytest.importorskip("torch", reason="training needs the extra [finetune]")

TEST = models.DIGITS.with_name("digits_test.npz")
LABELS: dict[str, Any] = {"finetune": "labels", "train": TEST, "epochs": 1, "augment": "none", "jobs": 1}
CP = LABELS | {"recipe": "vbmf_cp"}
ORTHOGONAL = LABELS | {"recipe": "orthogonal", "rank": "ratio=0.4"}


def kernel(name: str) -> np.ndarray:
    model = onnx.load(models.DIGITS)
    node = next(n for n in model.graph.node if n.name == name)
    return next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == node.input[1])


def estimate(weight: np.ndarray) -> int:
    unfolded = [np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1) for axis in (0, 1)]
    return max(evbmf(matrix).rank for matrix in unfolded)


def ranks(result: lr.Result) -> dict[str, int]:
    return {layer.name: layer.rank[0] for layer in result.report.layers}


@pytest.fixture(scope="module")
def layer_by_layer() -> lr.Result:
    return lr.compress(models.DIGITS, evaluate=TEST, **CP | {"learning_rate": 1e-2})


@pytest.fixture(scope="module")
def at_start() -> lr.Result:
    return lr.compress(models.DIGITS, evaluate=TEST, **CP, rank="vbmf_at_start")


def test_layers_become_cp_chains_in_forward_order(layer_by_layer: lr.Result) -> None:
    layers = layer_by_layer.report.layers
    assert len(layers) >= 3
    assert {layer.decomposition for layer in layers} == {"cp3"}
    order = [node.name for node in onnx.load(models.DIGITS).graph.node]
    assert sorted(layers, key=lambda layer: order.index(layer.name)) == list(layers)
    steps = [note for note in layer_by_layer.report.notes if re.match(r"\S+: rank \d+", note)]
    assert len(steps) >= len(layers)
    assert all("accuracy from" in note or "nothing better" in note for note in steps if "dense" not in note)
    assert layer_by_layer.report.compressed.macs < layer_by_layer.report.original.macs


def test_ranks_come_from_the_weights_of_the_moment(layer_by_layer: lr.Result, at_start: lr.Result) -> None:
    fixed, moving = ranks(at_start), ranks(layer_by_layer)
    assert all(rank == estimate(kernel(name)) for name, rank in fixed.items())
    first = next(iter(fixed))
    assert moving[first] == fixed[first]  # nothing had been trained yet
    assert moving != fixed


def test_ranks_by_sensitivity_keep_the_share_of_work_asked_for() -> None:
    result = lr.compress(models.DIGITS, evaluate=TEST, **CP, rank="sensitivity=0.3")
    after = sum(layer.macs_after for layer in result.report.layers)
    before = sum(layer.macs_before for layer in result.report.layers)
    assert 0.2 < after / before < 0.4


@pytest.mark.parametrize("method", ["tucker2", "channel_svd", "channel_svd_in", "cp3"])
def test_a_chain_of_full_rank_composes_to_its_kernel(method: str) -> None:
    weight = normal(6, 5, 3, 3, dtype="float64")
    spec, decomposition = ConvSpec(weight.shape), find_decomposition(method)
    rank = lift.max_rank(decomposition, [spec])
    made = lift.factorize(decomposition, [spec], [weight], rank, rng=np.random.default_rng(0))
    composed = lift.compose(lift.chains(decomposition, [spec], rank)[0], made.of(0))
    np.testing.assert_allclose(composed, weight, atol=1e-9)


def distances(result: lr.Result) -> list[float]:
    (note,) = (note for note in result.report.notes if note.startswith("distance from orthogonal"))
    return [float(value) for value in re.findall(r"\d+: ([\d.e+-]+)", note)]


@pytest.mark.parametrize("method", ["tucker2", "channel_svd"])
def test_factors_are_kept_orthogonal_and_then_cut(method: str) -> None:
    options = ORTHOGONAL | {"methods": method, "epochs": 4, "learning_rate": 5e-3}
    free = lr.compress(models.DIGITS, evaluate=TEST, **options, orthogonality=0.0)
    held = lr.compress(models.DIGITS, evaluate=TEST, **options, orthogonality=100.0)
    assert distances(free)[0] == pytest.approx(0.0, abs=1e-6)  # orthonormal at the start
    assert distances(held)[-1] < 0.5 * distances(free)[-1]
    for result in (free, held):
        assert {layer.decomposition for layer in result.report.layers} == {method}
        assert result.report.compressed.macs < result.report.original.macs
        assert result.report.accuracy.compressed > 0.9
        assert {"Concat"}.isdisjoint(node.op_type for node in result.model.graph.node)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "vbmf_cp"}, "recipe vbmf_cp trains after each layer"),
        (CP | {"budget": {"macs": 0.5}}, "leave out --budget"),
        (CP | {"methods": "svd"}, "leave out --methods"),
        (CP | {"rank": "energy=0.9"}, "vbmf, vbmf_at_start or sensitivity=SHARE"),
        ({"recipe": "orthogonal"}, "give --finetune labels"),
        (ORTHOGONAL | {"methods": "svd"}, "one of tucker2, channel_svd, channel_svd_in, cp3"),
        (ORTHOGONAL | {"max_drop": 0.1}, "takes its ranks from an estimator"),
        (ORTHOGONAL | {"orthogonality": -1.0}, "orthogonality -1.0 was given"),
    ],
)
def test_what_a_recipe_lays_down_is_not_contradicted(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LowRankError, match=said):
        lr.compress(models.DIGITS, evaluate=TEST, **options)


def with_external_data(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "external.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "external.onnx"


def with_constants(model: onnx.ModelProto, folder: Path) -> Path:
    constants = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "constants.onnx")
    return folder / "constants.onnx"


@pytest.mark.parametrize("options", [CP, ORTHOGONAL], ids=["vbmf_cp", "orthogonal"])
def test_where_a_model_keeps_its_kernels_makes_no_difference(options: dict[str, Any], tmp_path: Path) -> None:
    picture = {"input": arrays(TEST)["input"][:8]}
    stored = (
        models.DIGITS,
        *(store(onnx.load(models.DIGITS), tmp_path) for store in (with_external_data, with_constants)),
    )
    plain, *others = (lr.compress(path, evaluate=TEST, **options) for path in stored)
    expected, *outputs = (
        onnxruntime.InferenceSession(result.model.SerializeToString()).run(None, picture)[0]
        for result in (plain, *others)
    )
    for other, output in zip(others, outputs, strict=True):
        assert other.report.layers == plain.report.layers
        np.testing.assert_array_equal(output, expected)

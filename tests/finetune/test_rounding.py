"""Training through eight bits: the program rounds as ONNX Runtime does, and gradients pass."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_lowrank as lr

torch = pytest.importorskip("torch")

from onnx_lowrank.finetune.program import Program, weights_of  # noqa: E402
from onnx_lowrank.graph.model import load  # noqa: E402
from onnx_lowrank.graph.plain import plain_graph  # noqa: E402
from onnx_lowrank.quantize import insert_qdq, measure_ranges, prepared  # noqa: E402
from onnx_lowrank.quantize.rounding import rounding_of  # noqa: E402
from tests.helpers import run  # noqa: E402
from tests.quantize.test_qdq import network, quantized  # noqa: E402


def test_a_program_that_rounds_is_the_quantised_model() -> None:
    proto = network()
    feeds, ready, model = quantized(proto)
    program = Program(plain_graph(ready), rounding=rounding_of(ready, model))
    plain = Program(plain_graph(ready))
    with torch.no_grad():
        got = program(program.tensors(feeds))["y"].numpy()
        exact = plain(plain.tensors(feeds))["y"].numpy()
    (wanted,) = run(model.proto, feeds, optimize=False)
    left, rounded = np.square(got - wanted).sum(), np.square(exact - wanted).sum()
    assert left < 0.1 * rounded  # a step here and there goes the other way; biases are not rounded


def test_gradients_pass_through_the_rounding() -> None:
    feeds, ready, model = quantized(network())
    graph = plain_graph(ready)
    program = Program(graph, weights_of(graph), rounding=rounding_of(ready, model))
    program(program.tensors(feeds))["y"].square().sum().backward()
    for name, value in program.parameters.items():
        assert value.grad is not None and value.grad.abs().max() > 0, name


def test_training_through_the_rounding_brings_the_outputs_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import DIGITS, DIGITS_CALIBRATE, DIGITS_TEST

    monkeypatch.setenv("ONNX_LOWRANK_CACHE", "")
    common = {"calibrate": str(DIGITS_CALIBRATE), "evaluate": str(DIGITS_TEST), "jobs": 1}
    options = {
        "rank": "ratio=0.1",
        "align": 1,
        "methods": "channel_svd",
        "include": ("conv3", "conv4"),
        "quantize": "int8",
        **common,
    }
    rough = lr.compress(str(DIGITS), **options)
    assert rough.report.accuracy.others["cosine"] < 0.998
    tuned = lr.compress(str(DIGITS), finetune="distill", epochs=4, **options)
    assert tuned.report.accuracy.others["cosine"] > rough.report.accuracy.others["cosine"]
    assert any("through the rounding of INT8" in note for note in tuned.plan.notes)
    kinds = [node.op_type for node in tuned.model.graph.node]
    assert kinds.count("QuantizeLinear") > 5


def test_the_same_model_comes_out_of_the_same_ranges() -> None:
    feeds, ready, _ = quantized(network())
    ranges = measure_ranges(ready, [feeds])
    first, second = (insert_qdq(ready, ranges).proto.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert prepared(load(network()), [feeds]).proto.SerializeToString() == ready.proto.SerializeToString()

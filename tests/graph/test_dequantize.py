"""Models in eight bits come back to floating point: near to what they computed, and free to be decomposed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from onnx_lowrank import analyze, compress
from onnx_lowrank.cli import main
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.dequantize import dequantized
from onnx_lowrank.graph.model import load
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.quantize import insert_qdq, measure_ranges, prepared
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import LowRankError, no_progress
from tests.helpers import feeds_of, normal, parse, run

TEXT = """g (float[N, 3, 16, 16] x) => (float[N, 16, 16, 16] y) {
  [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  [bend] r = Relu (a)
  [second] b = Conv <pads = [1, 1, 1, 1]> (r, w2)
  [third] y = Conv <pads = [1, 1, 1, 1]> (b, w3)
}"""


def network() -> onnx.ModelProto:
    kernels = {"w1": normal(16, 3, 3, 3), "w2": normal(16, 16, 3, 3, seed=2), "w3": normal(16, 16, 3, 3, seed=3)}
    return parse(TEXT, **kernels, b1=normal(16, seed=1))


def quantized(proto: onnx.ModelProto) -> tuple[dict[str, np.ndarray], onnx.ModelProto]:
    feeds = feeds_of(proto, x=(8, 3, 16, 16))
    ready = prepared(load(proto), [feeds])
    return feeds, insert_qdq(ready, measure_ranges(ready, [feeds])).proto


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def test_no_node_of_quantisation_is_left_and_the_outputs_stay_near() -> None:
    feeds, proto = quantized(network())
    given = proto.SerializeToString()
    made = dequantized(load(proto))
    onnx.checker.check_model(made.proto, full_check=True)
    kinds = Counter(node.op_type for node in made.graph.node)
    assert kinds["Conv"] == 3 and not kinds["QuantizeLinear"] and not kinds["DequantizeLinear"]
    (got,), (rounded,), (wanted,) = run(made.proto, feeds), run(proto, feeds), run(network(), feeds)
    assert distance(got, rounded) < 3e-3 and distance(got, wanted) < 3e-3
    assert proto.SerializeToString() == given


def test_a_relu_that_a_quantiser_left_out_comes_back() -> None:
    feeds, proto = quantized(network())
    left = [node for node in proto.graph.node if node.op_type == "Relu"]
    renamed = {node.output[0]: node.input[0] for node in left}
    for node in left:
        proto.graph.node.remove(node)
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    made = dequantized(load(proto))
    assert "Clip" in {node.op_type for node in made.graph.node}
    (got,), (wanted,) = run(made.proto, feeds), run(network(), feeds)
    assert distance(got, wanted) < 3e-3


QDQ = """g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
  q = QuantizeLinear (x, s, o)
  y = DequantizeLinear (q, s, o)
  d = DequantizeLinear (q, s, o)
  k = DequantizeLinear <axis = 1> (w, t)
  z = MatMul (d, k)
}"""


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_outputs_of_the_graph_and_scales_of_channels(opset: int) -> None:
    kernel, scales = np.arange(-8, 8, dtype=np.int8).reshape(4, 4), np.array([1, 2, 3, 4], np.float32)
    proto = parse(QDQ, opset=opset, s=np.float32(0.5), o=np.uint8(100), w=kernel, t=scales)
    made = dequantized(load(proto))
    feeds = {"x": np.array([[0.4, -1.2, 3.0, 7.6]], np.float32)}
    first, second = run(made.proto, feeds)
    np.testing.assert_allclose(first, feeds["x"])
    np.testing.assert_allclose(second, feeds["x"] @ (kernel * scales))
    assert {tensor.name for tensor in made.graph.initializer} == {"k"}


def test_integers_that_come_from_elsewhere_stay() -> None:
    text = """g (int8[N, 4] x) => (float[N, 4] z) { d = DequantizeLinear (x, s) k = DequantizeLinear (w, s) z = MatMul (d, k) }"""
    proto = parse(text, s=np.float32(0.5), w=np.eye(4, dtype=np.int8))
    made = dequantized(load(proto))
    assert [node.op_type for node in made.graph.node] == ["DequantizeLinear", "MatMul"]
    (got,) = run(made.proto, {"x": np.array([[4, 2, -2, 8]], np.int8)})
    np.testing.assert_allclose(got, [[1, 0.5, -0.5, 2]])


def test_a_model_in_floats_is_refused() -> None:
    with pytest.raises(LowRankError, match=r"a model with DequantizeLinear nodes .* was expected"):
        dequantized(load(network()))


def test_layers_are_decomposed_where_it_is_asked_for() -> None:
    feeds, proto = quantized(network())
    assert not analyze(proto, rank="ratio=0.5").choices
    result = compress(proto, budget={"macs": 0.6}, dequantize=True, calibrate=[feeds])
    assert result.report.layers and result.met
    assert any("brought back to floating point" in note for note in result.report.notes)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_the_model_comes_back_as_it_was_where_no_layer_is_changed(tmp_path, where: str) -> None:
    feeds, proto = quantized(network())
    onnx.save(proto, tmp_path / "given.onnx")
    source = tmp_path / "given.onnx" if where == "file" else proto
    options = {"dequantize": True, "metric": "sqnr", "evaluate": [feeds], "objective": "macs", "jobs": 1}
    result = compress(source, max_drop=1e-7, **options)
    assert not result.report.layers and result.report.unchanged
    result.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").read_bytes() == proto.SerializeToString()
    assert result.report.original == result.report.compressed
    assert result.report.original.size_bytes == len(proto.SerializeToString())


def test_times_are_shares_of_the_quantised_model(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    onnx.save(quantized(network())[1], tmp_path / "given.onnx")
    monkeypatch.setattr(LatencyTable, "_speedup", lambda self, bench: 0.8)
    config = make_config(dequantize=True, budget={"latency": 0.5})
    subject = open_subject(tmp_path / "given.onnx", config)
    table = LatencyTable(subject, config, subject.feeds(), no_progress)
    dense = table.priced([[group.dense] for group in subject.groups])
    assert table.original.latency_ms == pytest.approx(0.8 * (table.rest + sum(c.cost.latency_ms for (c,) in dense)))


def test_a_quantised_model_is_decomposed_and_quantised_again(tmp_path) -> None:
    feeds, proto = quantized(network())
    onnx.save(proto, tmp_path / "given.onnx")
    np.save(tmp_path / "x.npy", feeds["x"])
    words = [
        "compress",
        str(tmp_path / "given.onnx"),
        str(tmp_path / "small.onnx"),
        "--calibrate",
        str(tmp_path / "x.npy"),
    ]
    assert main([*words, "--dequantize", "--quantize", "int8", "--budget", "macs=0.6", "--quiet"]) == 0
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node)
    assert kinds["QuantizeLinear"] and kinds["Conv"] > 3

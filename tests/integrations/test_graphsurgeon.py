"""onnx-graphsurgeon graphs at the public boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.interop import from_proto, to_proto
from tests import tiny
from tests.helpers import arrays, run

QUICK: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}


def digits() -> onnx.ModelProto:
    return onnx.load(models.DIGITS)


def exported(graph: gs.Graph) -> onnx.ModelProto:
    proto = gs.export_onnx(graph)
    proto.ir_version = 8
    return proto


def state(graph: gs.Graph) -> Any:
    """All that a user sees of a graph."""
    nodes = [
        (n.op, n.name, [t.name for t in n.inputs], [t.name for t in n.outputs], dict(n.attrs)) for n in graph.nodes
    ]
    constants = {
        name: tensor.values.tobytes() for name, tensor in graph.tensors().items() if isinstance(tensor, gs.Constant)
    }
    return nodes, constants, [t.name for t in graph.inputs], [t.name for t in graph.outputs]


def test_only_a_graph_is_taken_for_one() -> None:
    proto = tiny.classifier()
    for other in (proto, "model.onnx", None):
        assert to_proto(other) is other
    assert from_proto(proto, proto) is proto
    assert from_proto(proto, "model.onnx") is proto
    graph = gs.import_onnx(proto)
    assert isinstance(to_proto(graph), onnx.ModelProto)
    assert isinstance(from_proto(proto, graph), gs.Graph)


def test_a_graph_becomes_a_model_that_every_current_runtime_reads() -> None:
    proto = to_proto(gs.import_onnx(digits()))
    assert proto.ir_version <= 10
    assert [o.version for o in proto.opset_import if o.domain == ""] == [17]
    x = {"input": arrays(models.DIGITS_TEST)["input"][:8]}
    np.testing.assert_array_equal(run(proto, x)[0], run(digits(), x)[0])


@pytest.mark.parametrize("make", [tiny.classifier, digits])
def test_a_graph_comes_back_as_one_that_computes_what_the_proto_would(make: Any) -> None:
    name, shape = {"classifier": ("x", (5, 16)), "digits": ("input", (5, 1, 8, 8))}[make.__name__]
    x = {name: np.random.default_rng(0).standard_normal(shape, dtype="float32")}
    result = lr.compress(gs.import_onnx(make()), budget={"macs": 0.5}, **QUICK)
    assert isinstance(result.model, gs.Graph)
    expected = lr.compress(make(), budget={"macs": 0.5}, **QUICK)
    assert result.report.compressed.macs == expected.report.compressed.macs
    np.testing.assert_array_equal(run(exported(result.model), x)[0], run(expected.model, x)[0])
    assert len(result.model.nodes) == len(expected.model.graph.node)


def test_the_graph_that_was_given_is_not_changed() -> None:
    graph = gs.import_onnx(digits())
    before = state(graph)
    result = lr.compress(graph, budget={"macs": 0.5}, **QUICK)
    assert state(graph) == before
    assert state(result.model) != before
    assert state(lr.compress(graph, budget={"macs": 1.0}, **QUICK).model) == before


def test_every_function_takes_a_graph() -> None:
    graph = gs.import_onnx(tiny.classifier())
    plan = lr.analyze(graph, budget={"macs": 0.5}, **QUICK)
    result = lr.apply(graph, plan, **QUICK)
    assert isinstance(result.model, gs.Graph)
    check = lr.verify(graph, result.model, evaluate=[{"x": tiny.inputs(20)}])
    assert check.compressed.macs == result.report.compressed.macs < check.original.macs
    assert [layer.name for layer in lr.inspect(graph, **QUICK).layers] == ["first", "second"]


def test_a_graph_built_by_hand_is_compressed(tmp_path: Any) -> None:
    x, y = (gs.Variable(name, np.float32, ("N", 16)) for name in "xy")
    graph = gs.Graph(inputs=[x], outputs=[y], opset=13)
    graph.layer(op="MatMul", name="only", inputs=[x, gs.Constant("w", tiny.planted(16, 16, 2, noise=0))], outputs=[y])
    result = lr.compress(graph, budget={"params": 0.3}, **QUICK)
    assert [layer.rank for layer in result.report.layers] == [(2,)]
    result.save(tmp_path / "small.onnx")
    feeds = {"x": tiny.inputs(4)}
    # the kernel is of rank 2: what differs is the rounding of float32 sums of 16 terms of at most about 10
    np.testing.assert_allclose(run(str(tmp_path / "small.onnx"), feeds)[0], run(exported(graph), feeds)[0], atol=1e-5)

"""What stays in floating point: by the times and errors that are measured."""

from __future__ import annotations

from onnx_lowrank.graph.model import Model, load
from onnx_lowrank.quantize import choose, measure_ranges, prepared
from tests.helpers import feeds_of, normal, parse

TEXT = """g (float[N, 16, 16, 16] x) => (float[N, 16, 8, 8] y) {
  [one] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
  [bend] r = Relu (a)
  [two] b = Conv <strides = [2, 2]> (r, w2)
  [three] c = Conv <pads = [1, 1, 1, 1]> (b, w3)
  [again] s = Relu (c)
  [four] y = Conv <pads = [1, 1, 1, 1]> (s, w4)
}"""
SHAPES = {"a": (1, 16, 16, 16), "b": (1, 16, 8, 8), "c": (1, 16, 8, 8), "y": (1, 16, 8, 8)}


def network(*, rough: bool = False):
    """A chain of two convolutions, `two` and `three`, between others.

    A rough one has large weights for a channel of zeros: in eight bits nothing else is left of it.
    """
    sizes = {"w1": 3, "w2": 1, "w3": 3, "w4": 3}
    kernels = {name: normal(16, 16, size, size, seed=seed) for seed, (name, size) in enumerate(sizes.items())}
    if rough:
        kernels["w1"][0] = 0
        kernels["w2"][:, 0] = 300
    return parse(TEXT, **kernels)


def floats(model: Model) -> set[str]:
    """Convolutions whose kernel is stored as it was."""
    stored = {tensor.name for tensor in model.graph.initializer if tensor.name in ("w1", "w2", "w3", "w4")}
    return {node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] in stored}


def chosen(proto, time, **options):
    feeds = feeds_of(proto, x=(32, 16, 16, 16))
    ready = prepared(load(proto), [feeds])
    return choose(ready, SHAPES, measure_ranges(ready, [feeds]), [feeds], time, **options)


def test_the_chain_that_does_the_damage_stays_in_floating_point() -> None:
    choice = chosen(network(rough=True), lambda model: 1.0)
    assert {"two", "three"} <= set(choice.float_nodes)
    all_in_bytes = chosen(network(rough=True), lambda model: 1.0 + len(floats(model)))
    assert choice.error < 0.1 * all_in_bytes.error
    assert all_in_bytes.float_nodes == ()


def test_the_beginning_stays_in_floating_point_where_that_is_faster() -> None:
    choice = chosen(network(), lambda model: 0.5 if floats(model) == {"one"} else 1.0)
    assert choice.float_nodes == ("one", "bend")
    assert "1 of 4 convolutions and products stay in floating point (one)" in choice.note


def test_bytes_are_kept_to_where_they_are_counted() -> None:
    faster = chosen(network(), lambda model: 0.5 if floats(model) else 1.0)
    assert faster.float_nodes
    small = chosen(network(), lambda model: 0.5 if floats(model) else 1.0, most=0)
    assert small.float_nodes == () and small.size < faster.size


def test_signed_activations_where_they_are_faster() -> None:
    def time(model: Model) -> float:
        signed = any(t.data_type == 3 and not t.dims for t in model.graph.initializer)
        return 0.5 if signed else 1.0

    choice = chosen(network(), time)
    assert choice.signed and "signed activations" in choice.note

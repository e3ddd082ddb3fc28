"""Channels within a chain scaled to the same largest value: the function stays, and eight bits serve every channel."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.plain import plain_graph
from onnx_lowrank.quantize.equalize import equalized, links
from tests.helpers import feeds_of, normal, parse, run

SPREAD = np.geomspace(1e-3, 1, 8).astype(np.float32)
"""Sizes of channels that one scale cannot serve."""


def grouped(group: int) -> str:
    return f"""g (float[N, 6, 8, 8] x) => (float[N, 5, 8, 8] y) {{
      a = Conv (x, w1, b1)
      b = Conv <group = {group}, pads = [1, 1, 1, 1]> (a, w2)
      y = Conv (b, w3, b3)
    }}"""


def chain(group: int):
    stored = {
        "w1": normal(8, 6, 1, 1) * SPREAD.reshape(-1, 1, 1, 1),
        "b1": normal(8, seed=1) * SPREAD,
        "w2": normal(8, 8 // group, 3, 3, seed=2) * SPREAD[::-1].reshape(-1, 1, 1, 1),
        "w3": normal(5, 8, 1, 1, seed=3),
        "b3": normal(5, seed=4),
    }
    return parse(grouped(group), **stored)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_the_function_stays_and_channels_become_alike(group: int) -> None:
    proto = chain(group)
    feeds = feeds_of(proto, x=(4, 6, 8, 8))
    made = equalized(load(proto), [feeds])
    np.testing.assert_allclose(run(made.proto, feeds)[0], run(proto, feeds)[0], rtol=1e-3, atol=1e-4)
    made.graph.output.add(name="a")
    made.graph.output.add(name="b")
    for value in run(made.proto, feeds, optimize=False)[1:]:
        peaks = np.abs(value).max(axis=(0, 2, 3))
        assert peaks.max() / peaks.min() < 1.01


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Gemm (x, w1, b1)", "Gemm (a, w2, b2)"),
        ("Gemm <transB = 1> (x, w1t, b1)", "Gemm <transB = 1> (a, w2t, b2)"),
        ("MatMul (x, w1)", "MatMul (a, w2)"),
    ],
)
def test_products_are_chains_too(first: str, second: str) -> None:
    stored = {"w1": normal(6, 8) * SPREAD, "b1": normal(8, seed=1) * SPREAD, "w2": normal(8, 5, seed=2)}
    stored |= {"b2": normal(5, seed=3), "w1t": stored["w1"].T.copy(), "w2t": stored["w2"].T.copy()}
    used = {
        name: value for name, value in stored.items() if f"{name}," in first + second or f"{name})" in first + second
    }
    proto = parse(f"g (float[N, 6] x) => (float[N, 5] y) {{ a = {first} y = {second} }}", **used)
    feeds = feeds_of(proto, x=(16, 6))
    made = equalized(load(proto), [feeds])
    np.testing.assert_allclose(run(made.proto, feeds)[0], run(proto, feeds)[0], rtol=1e-3, atol=1e-4)
    made.graph.output.add(name="a")
    peaks = np.abs(run(made.proto, feeds, optimize=False)[1]).max(axis=0)
    assert peaks.max() / peaks.min() < 1.01


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { a = Conv (x, w) r = Relu (a) y = Conv (r, v) }",
        "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y, float[N, 4, 8, 8] a) { a = Conv (x, w) y = Conv (a, v) }",
        "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { a = Conv (x, w) y = Conv (a, w) s = Identity (v) }",
        "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { a = Conv (x, w) b = Conv (a, v) y = Add (a, b) }",
    ],
    ids=["a bend between", "an output", "a kernel that two read", "two readers"],
)
def test_what_anything_else_sees_is_not_scaled(text: str) -> None:
    model = load(parse(text, w=normal(4, 4, 1, 1), v=normal(4, 4, 1, 1, seed=1)))
    assert links(model, plain_graph(model)) == []


def test_a_channel_of_zeros_stays_finite() -> None:
    proto = chain(1)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w1", "b1"):
            value = np.frombuffer(tensor.raw_data, np.float32).reshape(tensor.dims).copy()
            value[3] = 0
            tensor.raw_data = value.tobytes()
    feeds = feeds_of(proto, x=(4, 6, 8, 8))
    made = equalized(load(proto), [feeds])
    np.testing.assert_allclose(run(made.proto, feeds)[0], run(proto, feeds)[0], rtol=1e-3, atol=1e-4)


def test_a_product_of_a_transposed_input_stays() -> None:
    text = "g (float[6, 6] x) => (float[6, 6] y) { a = Gemm <transA = 1> (x, w, b) y = MatMul (a, v) }"
    model = load(parse(text, w=normal(6, 6), b=normal(6), v=normal(6, 6, seed=1)))
    assert links(model, plain_graph(model)) == []


def test_a_bias_that_all_channels_share_stays() -> None:
    text = "g (float[N, 6] x) => (float[N, 6] y) { a = Gemm (x, w, b) y = MatMul (a, v) }"
    model = load(parse(text, w=normal(6, 6), b=normal(1), v=normal(6, 6, seed=1)))
    assert links(model, plain_graph(model)) == []

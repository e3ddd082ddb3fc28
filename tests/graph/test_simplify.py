"""Exact rewrites before a model is quantised: constants stored, shortcuts that slice and pad as convolutions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.simplify import computed_constants, convolve_shortcuts, store_constants
from tests.helpers import feeds_of, normal, parse, run

SHORTCUT = """g (float[N, 4, 9, 8] x) => (float[N, 7, 5, 4] y) {
  a = Slice (x, start, end, two, step)
  b = Slice (a, start, end, three, step)
  y = Pad (b, pads, zero)
}"""


def shortcut(text: str = SHORTCUT, **changed: np.ndarray) -> onnx.ModelProto:
    numbers = {
        "start": [0],
        "end": [2**31 - 1],
        "two": [2],
        "three": [3],
        "step": [2],
        "pads": [0, 1, 0, 0, 0, 2, 0, 0],
    }
    stored = {name: np.array(value, np.int64) for name, value in numbers.items()}
    stored |= {"zero": np.zeros((), np.float32), "w": normal(4, 4, 1, 1)} | changed
    used = {name: value for name, value in stored.items() if f"{name}," in text or f"{name})" in text}
    return parse(text, **used)


def convolved(proto: onnx.ModelProto) -> tuple[tuple[str, ...], onnx.ModelProto]:
    made, model = convolved_unchecked(proto)
    onnx.checker.check_model(model, full_check=True)
    return made, model


def test_a_shortcut_becomes_one_convolution_with_the_same_result() -> None:
    proto = shortcut()
    made, convolution = convolved(proto)
    assert len(made) == 1 and [node.op_type for node in convolution.graph.node] == ["Conv"]
    feeds = feeds_of(proto, x=(2, 4, 9, 8))
    np.testing.assert_array_equal(run(convolution, feeds)[0], run(proto, feeds)[0])
    assert [tensor.name for tensor in convolution.graph.initializer] == ["y_kernel"]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (SHORTCUT, {"zero": np.ones((), np.float32)}),
        (SHORTCUT, {"pads": np.array([0, 1, 1, 0, 0, 2, 0, 0])}),
        (SHORTCUT, {"pads": np.array([0, -1, 0, 0, 0, 2, 0, 0])}),
        (SHORTCUT, {"start": np.array([1])}),
        (SHORTCUT, {"end": np.array([6])}),
        (SHORTCUT, {"two": np.array([1])}),
        (SHORTCUT, {"step": np.array([-1]), "start": np.array([0]), "end": np.array([-(2**31)])}),
        (SHORTCUT.replace("y = Pad (b,", "c = Relu (a) y = Pad (b,"), {}),
        (SHORTCUT.replace("y = Pad", 'y = Pad <mode = "reflect">'), {}),
    ],
    ids=[
        "another value",
        "pixels too",
        "channels cut off",
        "a start",
        "an end",
        "channels",
        "backwards",
        "read",
        "mirrored",
    ],
)
def test_what_is_something_else_stays(text: str, changed: dict[str, np.ndarray]) -> None:
    changed = {name: np.asarray(value, np.float32 if name == "zero" else np.int64) for name, value in changed.items()}
    made, left = convolved_unchecked(shortcut(text, **changed))
    assert made == () and all(node.op_type != "Conv" for node in left.graph.node)


def convolved_unchecked(proto: onnx.ModelProto) -> tuple[tuple[str, ...], onnx.ModelProto]:
    model = load(proto).copy()
    return convolve_shortcuts(model, {"x": 4}, onnx.TensorProto.FLOAT), model.proto


def test_constants_computed_in_every_run_are_stored() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y, float[2] z) {
      s = Shape (w)
      i = Constant <value_ints = [1]> ()
      n = Gather (s, i)
      f = Cast <to = 1> (n)
      y = Mul (x, f)
      z = Cast <to = 1> (s)
      r = RandomNormal <shape = [1]> ()
      t = Shape (x)
    }"""
    proto = parse(text, w=normal(3, 4))
    model = load(proto).copy()
    assert computed_constants(model) == ["f"]
    store_constants(model, {"f": np.array([4], np.float32)})
    assert [node.op_type for node in model.graph.node] == ["Shape", "Mul", "Cast", "RandomNormal", "Shape"]
    feeds = feeds_of(proto, x=(2, 4))
    np.testing.assert_array_equal(run(model.proto, feeds)[0], run(proto, feeds)[0])


def test_what_a_user_may_feed_is_no_constant() -> None:
    proto = parse("g (float[2] x, float[2] w) => (float[2] y) { a = Neg (w) y = Add (x, a) }", w=normal(2))
    assert computed_constants(load(proto)) == []

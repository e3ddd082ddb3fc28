"""Means that BatchNormalization tells: followed through the graph, and kept by the bias of a chain."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_lowrank as lr
from onnx_lowrank.graph.expected import Channels, expected, rectified
from onnx_lowrank.graph.model import load
from tests.helpers import normal, parse, run

TEXT = """g (float[N, 8, 12, 12] x) => (float[N, 8, 12, 12] y) {
  [one] a = Conv <pads = [1,1,1,1]> (x, w1)
  n = BatchNormalization (a, gain, shift, mean, variance)
  r = Relu (n)
  [two] y = Conv <pads = [1,1,1,1]> (r, w2)
}"""


def model(**changed):
    x = normal(256, 8, 12, 12, seed=5)
    stored = {"w1": normal(8, 8, 3, 3), "w2": normal(8, 8, 3, 3, seed=1)} | changed
    before = parse(
        TEXT.split("n =")[0].replace("=> (float[N, 8, 12, 12] y)", "=> (float[N, 8, 12, 12] a)") + "}", w1=stored["w1"]
    )
    a = run(before, {"x": x})[0]
    norm = {"gain": 0.5 + np.abs(normal(8, seed=2)), "shift": 2 * normal(8, seed=3)}
    seen = {"mean": a.mean(axis=(0, 2, 3)), "variance": a.var(axis=(0, 2, 3))}
    return parse(TEXT, **stored, **norm, **seen), x


def test_the_means_expected_are_those_that_come() -> None:
    proto, x = model()
    proto.graph.output.add(name="n")
    proto.graph.output.add(name="r")
    _, n, r = run(proto, {"x": x}, optimize=False)
    known = expected(load(proto))
    assert set(known) == {"n", "r"}
    for name, value in (("n", n), ("r", r)):
        np.testing.assert_allclose(known[name].mean, value.mean(axis=(0, 2, 3)), atol=0.02)
        np.testing.assert_allclose(known[name].variance, value.var(axis=(0, 2, 3)), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("methods", ["channel_svd", "cp3", "spatial_svd"])
def test_a_chain_keeps_the_mean_of_its_output_without_samples(methods: str) -> None:
    proto, x = model()
    result = lr.compress(proto, budget={"macs": 0.6}, methods=methods, include=("two",), align=1)
    assert [layer.name for layer in result.report.layers] == ["two"]
    got, wanted = (run(m, {"x": x})[0][:, :, 1:-1, 1:-1] for m in (result.model, proto))
    missed, spread = np.abs((got - wanted).mean(axis=(0, 2, 3))), (got - wanted).std(axis=(0, 2, 3))
    assert (missed < 0.1 * spread).all()
    (last,) = [node for node in result.model.graph.node if node.output[0] == "y"]
    assert len(last.input) == 3


def test_statistics_go_through_sums_slices_and_channel_padding() -> None:
    text = """g (float[N, 4, 6, 6] x) => (float[N, 6, 3, 3] y, float[N, 4, 6, 6] s, float[N, 4, 6, 6] e) {
      b = BatchNormalization (x, gain, shift, mean, variance)
      s = Add (b, b)
      e = Exp (b)
      c = Slice (s, starts, ends, axes, steps)
      y = Pad (c, pads)
    }"""
    two = np.array([2, 2], "int64")
    stored = {k: np.abs(normal(4, seed=i)) for i, k in enumerate(("gain", "shift", "mean", "variance"))}
    sizes = {"starts": 0 * two, "ends": 3 * two, "axes": np.array([2, 3], "int64"), "steps": two}
    known = expected(load(parse(text, **stored, **sizes, pads=np.array([0, 1, 0, 0, 0, 1, 0, 0], "int64"))))
    np.testing.assert_allclose(known["s"].mean, 2 * stored["shift"])
    np.testing.assert_allclose(known["y"].mean, np.pad(2 * stored["shift"], 1))
    assert "e" not in known


def test_a_rectified_channel_that_never_varies_stays_what_it_is() -> None:
    after = rectified(Channels(np.array([2.0, -2.0]), np.zeros(2)))
    np.testing.assert_allclose(after.mean, [2, 0], atol=1e-12)
    np.testing.assert_allclose(after.variance, 0, atol=1e-12)

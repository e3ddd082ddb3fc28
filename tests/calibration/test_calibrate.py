"""What a layer sees: patches against the layer itself, and a model cut at its layers against the whole."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.calibration.calibrate import (
    Activations,
    collect,
    held_apart,
    input_rows,
    output_rows,
    run_segment,
    sample,
)
from onnx_lowrank.decompositions import lift
from onnx_lowrank.graph.find import find_layers
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.segments import cuts
from onnx_lowrank.graph.shapes import infer, model_inputs, sample_shapes
from onnx_lowrank.types import no_progress
from tests.helpers import normal, parse, run

LAYERS = {
    "plain": ("Conv <pads = [1,1,1,1]>", (6, 4, 3, 3), (2, 4, 7, 8)),
    "uneven": ("Conv <pads = [0,1,2,1], strides = [2,1], dilations = [1,2]>", (6, 4, 3, 2), (2, 4, 9, 8)),
    "groups": ("Conv <group = 2, pads = [1,1,1,1]>", (6, 2, 3, 3), (2, 4, 5, 6)),
    "same upper": ('Conv <auto_pad = "SAME_UPPER", strides = [2,2]>', (6, 4, 3, 3), (2, 4, 8, 7)),
    "same lower": ('Conv <auto_pad = "SAME_LOWER", strides = [2,2]>', (6, 4, 4, 3), (2, 4, 8, 7)),
    "valid": ('Conv <auto_pad = "VALID">', (6, 4, 3, 3), (2, 4, 6, 7)),
    "one axis": ("Conv <pads = [1,2], strides = [2]>", (6, 4, 3), (2, 4, 11)),
    "three axes": ("Conv <pads = [1,1,1,1,1,1]>", (6, 4, 3, 2, 3), (2, 4, 5, 4, 4)),
    "transposed": (
        "ConvTranspose <strides = [2,2], pads = [1,0,2,1], output_padding = [1,0]>",
        (4, 6, 3, 4),
        (2, 4, 5, 6),
    ),
    "transposed, dilated": ("ConvTranspose <dilations = [1,2], strides = [1,3]>", (4, 6, 2, 3), (2, 4, 5, 4)),
    "transposed, groups": ("ConvTranspose <group = 2, strides = [2]>", (4, 3, 5), (2, 4, 7)),
    "transposed, same upper": ('ConvTranspose <auto_pad = "SAME_UPPER", strides = [2,2]>', (4, 6, 3, 5), (2, 4, 5, 6)),
    "transposed, same lower": ('ConvTranspose <auto_pad = "SAME_LOWER", strides = [2,2]>', (4, 6, 3, 5), (2, 4, 5, 6)),
    "gemm": ("Gemm <transB = 1>", (6, 4), (5, 4)),
    "gemm of a transposed input": ("Gemm <transA = 1, transB = 1>", (6, 4), (4, 5)),
}


def opened(model):
    loaded = load(model)
    sizes, _ = sample_shapes(model_inputs(loaded), {})
    return loaded, find_layers(loaded, infer(loaded, sizes))


@pytest.mark.parametrize("label", LAYERS)
def test_patches_times_the_kernel_are_the_output(label: str) -> None:
    node, shape, size = LAYERS[label]
    dims = ", ".join(map(str, size))
    rank = ", ".join("abcdef"[: len(size)])
    weight = normal(*shape)
    text = f"g (float[{dims}] x) => (float[{rank}] y) {{ [layer] y = {node} (x, w) }}"
    model, found = opened(parse(text, w=weight))
    (cut,) = cuts(model, found, ["layer"])
    x = normal(*size, seed=4)
    (y,) = run(model.proto, {"x": x})
    where = sample(cut, y.shape, np.random.default_rng(0), len(y))
    patches, outputs = input_rows(cut, x, where), output_rows(cut, y, where)
    spec = found.layers[0].spec
    kernel = lift.by_output(spec, weight)
    blocks = [
        p @ w.reshape(len(w), -1).T
        for p, w in zip(np.split(patches, spec.group, axis=1), np.split(kernel, spec.group), strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), outputs, rtol=1e-4, atol=1e-5)
    assert len(outputs) > 4


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("g (float[2, 3, 4] x) => (float[a, b, c] y) { [layer] y = MatMul (x, w) }", (2, 3, 4)),
        ("g (float[2, 6, 5] x) => (float[a, b, c] y) { [layer] y = MatMul (w, x) }", (2, 6, 5)),
    ],
)
def test_rows_of_a_product_times_the_matrix_are_its_output(text: str, size: tuple[int, ...]) -> None:
    weight = normal(4, 6)
    model, found = opened(parse(text, w=weight))
    (cut,) = cuts(model, found, ["layer"])
    x = normal(*size, seed=4)
    (y,) = run(model.proto, {"x": x})
    where = sample(cut, y.shape, np.random.default_rng(0), len(y))
    kernel = weight.T if cut.weight_input == 1 else weight
    np.testing.assert_allclose(input_rows(cut, x, where) @ kernel.T, output_rows(cut, y, where), rtol=1e-4, atol=1e-5)


RESIDUAL = """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
  [one] a = Conv <pads = [1,1,1,1]> (x, w1)
  a2 = BatchNormalization (a, gain, shift, mean, variance)
  r = Relu (a2)
  [two] b = Conv <pads = [1,1,1,1]> (r, w2, bias)
  s = Add (b, x)
  shape = Shape (s)
  t = Relu (s)
  u = Reshape (t, shape)
  [three] c = Conv (u, w3)
  y = Add (c, r)
}"""


def residual():
    stored = {"w1": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=1), "w3": normal(4, 4, 1, 1), "bias": normal(4)}
    norm = {"gain": 1 + normal(4, seed=2) ** 2, "shift": normal(4, seed=3), "mean": normal(4, seed=4)}
    return parse(RESIDUAL, **stored, **norm, variance=1 + normal(4, seed=5) ** 2)


def test_a_model_run_in_segments_gives_what_the_whole_gives() -> None:
    model, found = opened(residual())
    x = normal(3, 4, 6, 6, seed=9)
    alive = Activations([{"x": x}])
    seen = {}
    for cut in cuts(model, found, ["one", "two", "three"]):
        for segment in (cut.before, cut.alone):
            if segment:
                run_segment(segment, alive)
        seen[cut.output] = alive.batches[0][cut.output]
        alive.keep(cut.alive)
    proto = load(residual()).proto
    for name in ("a", "b", "c"):
        proto.graph.output.add(name=name)
    _, *wanted = run(proto, {"x": x}, optimize=False)
    for value, name in zip(wanted, ("a", "b", "c"), strict=True):
        np.testing.assert_allclose(seen[name], value, rtol=1e-5, atol=1e-6)
    # what is alive at the end is what the last sum reads
    assert set(alive.batches[0]) == {"r", "c"}


def test_every_node_runs_in_one_segment_only() -> None:
    model, found = opened(residual())
    outputs = []
    for cut in cuts(model, found, ["one", "two", "three"]):
        for segment in (cut.before, cut.alone):
            outputs += [out for node in segment.proto.graph.node for out in node.output] if segment else []
    assert len(outputs) == len(set(outputs))


def test_what_follows_a_layer_is_read_off_the_graph() -> None:
    model, found = opened(residual())
    one, two, three = (cut.follow for cut in cuts(model, found, ["one", "two", "three"]))
    assert (one.low, one.high) == (0, np.inf) and not one.other and one.scale is not None and one.shift is not None
    assert two.other == "x" and two.scale is None  # its sum has two readers: a ReLU behind it is not the whole story
    assert not two.bounded
    assert three.other == "r" and not three.bounded
    gain, shift, mean, variance = (
        next(np.frombuffer(t.raw_data, "float32") for t in model.graph.initializer if t.name == name)
        for name in ("gain", "shift", "mean", "variance")
    )
    np.testing.assert_allclose(one.scale, gain / np.sqrt(variance + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(one.shift, shift - one.scale * mean, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_the_patches() -> None:
    text = "g (float[N, 3, 5, 5] x) => (float[N, 4, 5, 5] y) { [layer] y = Conv <pads = [1,1,1,1]> (x, w) }"
    model, found = opened(parse(text, w=normal(4, 3, 3, 3)))
    batches = [{"x": 1 + normal(8, 3, 5, 5, seed=s)} for s in range(3)]
    stats = collect(model, found, ["layer"], batches, seed=0, progress=no_progress)["layer"]
    padded = np.pad(np.concatenate([b["x"] for b in batches]), [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (N, C, 5, 5, 3, 3)
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    assert stats.samples == len(patches)  # 25 positions are fewer than are sampled, so all are there
    np.testing.assert_allclose(stats.mean, patches.mean(axis=0), rtol=1e-5)
    # Ledoit & Wolf (2004), lemma 3.2 to 3.4, term by term
    covariance = np.cov(patches.T, bias=True)
    scale = np.trace(covariance) / 27
    noise = np.mean([np.square(np.outer(p, p) - patches.T @ patches / len(patches)).sum() for p in patches]) / len(
        patches
    )
    share = min(1.0, noise / np.square(covariance - scale * np.eye(27)).sum())
    assert 0.01 < share < 1
    np.testing.assert_allclose(
        stats.covariance, (1 - share) * covariance + share * scale * np.eye(27), rtol=1e-4, atol=1e-5
    )


def test_few_patches_do_not_make_unseen_directions_free() -> None:
    text = "g (float[N, 40] x) => (float[N, 30] y) { [layer] y = Gemm (x, w) }"
    model, found = opened(parse(text, w=normal(40, 30)))
    stats = collect(model, found, ["layer"], [{"x": normal(10, 40)}], seed=0, progress=no_progress)["layer"]
    assert np.linalg.eigvalsh(stats.covariance)[0] > 0.1 * np.trace(stats.covariance) / 40


def test_held_out_samples_are_one_in_eight_and_in_no_fit() -> None:
    feeds = [{"x": np.arange(i, i + 6)} for i in range(0, 30, 6)]
    fit, held = held_apart(feeds)
    assert np.concatenate([b["x"] for b in held]).tolist() == [7, 15, 23]
    assert sorted(np.concatenate([b["x"] for b in (*fit, *held)])) == list(range(30))
    single = [{"x": np.array([i])} for i in range(16)]
    assert [b["x"][0] for b in held_apart(single)[1]] == [7, 15]
    assert held_apart(feeds[:1]) == (feeds[:1], feeds[:1])  # too few to hold any out


def test_what_reads_a_layer_and_where_it_is_cut_off_are_read_off_the_graph() -> None:
    text = """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
      [one] a = Conv <pads = [1,1,1,1]> (x, w1)
      b = Clip (a, low, high)
      [two] y = Conv <pads = [1,1,1,1], group = 4> (b, w2)
    }"""
    stored = {"w1": normal(4, 4, 3, 3), "w2": normal(4, 1, 3, 3), "low": np.float32(0), "high": np.float32(6)}
    model, found = opened(parse(text, **stored))
    one, two = (cut.follow for cut in cuts(model, found, ["one", "two"]))
    assert (one.low, one.high, one.bounded) == (0, 6, True)
    np.testing.assert_allclose(one.reading, np.linalg.norm(stored["w2"].reshape(4, -1), axis=1), rtol=1e-6)
    assert not two.bounded and two.reading is None  # its output is the model's

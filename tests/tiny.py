"""Models and data of a few hundred numbers, whose answers are known: what the tests of the face are run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.helpers import normal, parse, run

CLASSIFIER = """g (float[N, 16] x) => (float[N, 10] y) {
  [first] h = Gemm <transB = 1> (x, w1, b1)
  [relu] r = Relu (h)
  [second] y = Gemm <transB = 1> (r, w2)
}"""

CLASSIFIER_MACS = 24 * 16 + 10 * 24
CLASSIFIER_PARAMS = CLASSIFIER_MACS + 24


def planted(rows: int, columns: int, rank: int, *, noise: float = 0.01, seed: int = 0) -> np.ndarray:
    """A matrix of `rank`, with a little noise on it."""
    low = normal(rows, rank, seed=seed, dtype="float64") @ normal(columns, rank, seed=seed + 1, dtype="float64").T
    return (low / low.std() / np.sqrt(columns) + noise * normal(rows, columns, seed=seed + 2)).astype("float32")


def classifier() -> onnx.ModelProto:
    """16 numbers to 10 classes by two Gemms, ``first`` of rank 4 and ``second`` of rank 5 but for some noise."""
    return parse(CLASSIFIER, w1=planted(24, 16, 4), b1=normal(24), w2=planted(10, 24, 5))


def fragile() -> onnx.ModelProto:
    """A MatMul by the identity: one class for each input, and every rank below 16 loses some of them."""
    return parse("g (float[N, 16] x) => (float[N, 16] y) { [only] y = MatMul (x, w) }", w=np.eye(16, dtype="float32"))


def too_small() -> onnx.ModelProto:
    """A layer, but of 2 x 2: two of them in its place are never cheaper."""
    return parse("g (float[N, 2] x) => (float[N, 2] y) { [only] y = MatMul (x, w) }", w=normal(2, 2))


def without_layers() -> onnx.ModelProto:
    return parse("g (float[N, 16] x) => (float[N, 16] y) { [relu] y = Relu (x) }")


def strange(operator: str) -> onnx.ModelProto:
    """A model with an operator that nobody knows, after a layer."""
    text = f"g (float[N, 16] x) => (float[N, 8] y) {{ h = MatMul (x, w) y = {operator} (h) }}"
    model = parse(text, w=np.ones((16, 8), "float32"))
    model.opset_import.append(onnx.helper.make_opsetid("strange.domain", 1))
    return model


def pictures() -> onnx.ModelProto:
    """A convolution of pictures of 8 x 8 and their mean: 8 classes."""
    text = """g (float[N, 3, 8, 8] x) => (float[N, 8, 1, 1] y) {
      [conv] h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
      [mean] y = GlobalAveragePool (h)
    }"""
    return parse(text, w=normal(8, 3, 3, 3))


def two_large() -> onnx.ModelProto:
    """Two kernels, in all large enough to be worth a process each."""
    text = """g (float[N, 900] x) => (float[N, 900] y) {
      [first] h = MatMul (x, w1)
      [second] y = MatMul (h, w2)
    }"""
    return parse(text, w1=normal(900, 620), w2=normal(620, 900, seed=1))


def inputs(samples: int, *, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, 16), dtype=np.float32)


def labelled(model: onnx.ModelProto, samples: int = 400) -> dict[str, np.ndarray]:
    """Inputs, and as labels the classes that the model itself gives."""
    x = inputs(samples)
    return {"x": x, "labels": run(model, {"x": x})[0].argmax(axis=1)}


def one_hot(samples: int = 640) -> dict[str, np.ndarray]:
    """Inputs of :func:`fragile`, each class equally often."""
    labels = np.arange(samples) % 16
    return {"x": np.eye(16, dtype="float32")[labels], "labels": labels}


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def save_data(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def count(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> tuple[int, int]:
    """MACs for the feeds of one sample, and parameters: counted from the shapes of a run, not by inference."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
    names = [name for node in model.graph.node for name in node.output]
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = run(watched, feeds, optimize=False)
    shapes = {name: value.shape for name, value in [*zip(names, values, strict=True), *feeds.items()]} | stored
    macs = 0
    for node in model.graph.node:
        out = int(np.prod(shapes[node.output[0]]))
        if node.op_type == "Conv":
            macs += out * int(np.prod(shapes[node.input[1]][1:]))
        elif node.op_type in ("Gemm", "MatMul"):  # none of the models here has transA
            macs += out * shapes[node.input[0]][-1]
    return macs, sum(int(np.prod(shape)) for shape in stored.values())

"""What a model costs and answers, by onnx and onnxruntime alone: none of this package's own counting."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort


def session(model: Path | bytes, *, optimised: bool = True) -> ort.InferenceSession:
    """One thread, CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


def macs(model: onnx.ModelProto, sample: np.ndarray) -> int:
    """Multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for a sample; shapes are read off a run of the model."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    nodes = [node for node in proto.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    fed = proto.graph.input[0].name
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer} | {fed: sample.shape}
    wanted = sorted({name for node in nodes for name in (*node.input[:2], node.output[0])} - set(shapes))
    have = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in have)
    values = session(proto.SerializeToString(), optimised=False).run(wanted, {fed: sample})
    shapes |= {name: np.shape(value) for name, value in zip(wanted, values, strict=True)}
    total = 0
    for node in nodes:
        read, weight, made = (shapes[name] for name in (*node.input[:2], node.output[0]))
        if node.op_type == "Conv":
            total += int(np.prod(made)) * int(np.prod(weight[1:]))
        elif node.op_type == "ConvTranspose":
            total += int(np.prod(read)) * int(np.prod(weight[1:]))
        else:
            flipped = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += int(np.prod(made)) * read[-2 if flipped else -1]
    return total


def params(model: onnx.ModelProto) -> int:
    """Elements that are stored: initializers, and constants of nodes, where some exporters keep kernels."""
    constants = [
        a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"
    ]
    return sum(int(np.prod(tensor.dims)) for tensor in [*model.graph.initializer, *constants])


def answers(path: Path, samples: np.ndarray) -> np.ndarray:
    """The class that the model finds for each sample; in the batches that it takes."""
    model = session(path)
    first = model.get_inputs()[0]
    size = first.shape[0] if isinstance(first.shape[0], int) else 50
    parts = [model.run(None, {first.name: samples[i : i + size]})[0] for i in range(0, len(samples), size)]
    return np.concatenate(parts).argmax(1)


def times(paths: list[Path], sample: np.ndarray, rounds: int) -> np.ndarray:
    """Milliseconds of each model in each round, batch 1, interleaved in an order that changes; (rounds, models)."""
    models = [session(path) for path in paths]
    feeds = [{model.get_inputs()[0].name: sample[:1]} for model in models]
    for model, feed in zip(models, feeds, strict=True):
        for _ in range(5):
            model.run(None, feed)
    found = np.zeros((rounds, len(models)))
    order = np.random.default_rng(0)
    for row in found:
        for place in order.permutation(len(models)):
            models[place].run(
                None, feeds[place]
            )  # its weights are in the cache, as when it is the only model that runs
            start = time.perf_counter()
            models[place].run(None, feeds[place])
            row[place] = time.perf_counter() - start
    return 1e3 * found

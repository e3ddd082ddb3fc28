"""Folding BatchNormalization into the convolution before it, where that is exact.

Decomposing does not need it: a BatchNormalization after the last stage is folded there by the runtime, and a
kernel is better decomposed before its channels are scaled. It is for targets that have no BatchNormalization.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lowrank.graph.constants import Constant, Constants
from onnx_lowrank.graph.model import Model, attributes, readers, tensor_names


def fold_batchnorm(model: Model) -> int:
    """Fold every BatchNormalization that directly follows a convolution, in the graph of `model`, which is changed.

    Exact where the convolution's output has no other reader, its kernel is used nowhere else, and the
    normalisation runs in inference mode with stored statistics.

    Returns
    -------
    int
        How many were folded.
    """
    graph = model.graph
    constants, count, taken = Constants(model), readers(graph), tensor_names(model.proto)
    producers = {out: node for node in graph.node for out in node.output}
    folded = 0
    for norm in [n for n in graph.node if n.op_type == "BatchNormalization" and n.domain in ("", "ai.onnx")]:
        conv = producers.get(norm.input[0])
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or count.get(norm.input[0]) != 1:
            continue
        attrs = attributes(norm)
        if len([o for o in norm.output if o]) != 1 or ("training_mode" in attrs and attrs["training_mode"].i):
            continue
        values = [constants.find(name) for name in norm.input[1:]]
        kernel = _sole(constants, count, conv.input[1])
        has_bias = len(conv.input) > 2 and bool(conv.input[2])
        bias = constants.find(conv.input[2]) if has_bias else None
        if kernel is None or any(v is None or v.overridable for v in values) or (has_bias and bias is None):
            continue
        scale, shift, mean, variance = (v.read().astype(np.float64) for v in values if v)
        weight = kernel.read()
        factor = scale / np.sqrt(variance + (attrs["epsilon"].f if "epsilon" in attrs else 1e-5))
        old_bias = bias.read().astype(np.float64) if bias else 0.0
        scaled = _scale_outputs(weight.astype(np.float64), factor, conv)
        for index, (value, stem) in enumerate(
            [(scaled, conv.input[1]), ((old_bias - mean) * factor + shift, norm.output[0] + "_bias")], 1
        ):
            name = _fresh(f"{stem}_folded", taken)
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value.astype(weight.dtype)), name))
            if model.proto.ir_version < 4:
                graph.input.append(
                    onnx.helper.make_tensor_value_info(name, graph.initializer[-1].data_type, value.shape)
                )
            if index < len(conv.input):
                conv.input[index] = name
            else:
                conv.input.append(name)
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
        folded += 1
    if folded:
        _drop_unread_initializers(graph, count)
    return folded


def _sole(constants: Constants, count: dict[str, int], name: str) -> Constant | None:
    """The kernel, where it is a plain stored tensor with one reader."""
    constant = constants.find(name)
    return constant if constant and constant.root == name and not constant.overridable and count[name] == 1 else None


def _scale_outputs(weight: np.ndarray, factor: np.ndarray, conv: onnx.NodeProto) -> np.ndarray:
    ones = (1,) * (weight.ndim - 2)
    if conv.op_type == "Conv":
        return weight * factor.reshape(-1, 1, *ones)  # (O, I/g, k...)
    group = next((a.i for a in conv.attribute if a.name == "group"), 1)
    blocks = weight.reshape(group, -1, *weight.shape[1:])  # (I, O/g, k...) -> (g, I/g, O/g, k...)
    return (blocks * factor.reshape(group, 1, -1, *ones)).reshape(weight.shape)


def _fresh(stem: str, taken: set[str]) -> str:
    name, number = stem, 1
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name)
    return name


def _drop_unread_initializers(graph: onnx.GraphProto, before: dict[str, int]) -> None:
    """Remove what was read before the folding and is not any more."""
    now = readers(graph)
    for values in (graph.initializer, graph.input, graph.value_info):
        gone = [i for i, v in enumerate(values) if v.name in before and v.name not in now]
        for index in reversed(gone):
            del values[index]

"""Folding BatchNormalization into the convolution before it, where that is exact.

Decomposing does not need it: a BatchNormalization after the last stage is folded there by the runtime, and a
kernel is better decomposed before its channels are scaled. It is for targets that have no BatchNormalization.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lowrank.graph.constants import Constants, add_initializer, drop_unread, lists_all
from onnx_lowrank.graph.model import Model, attributes, fresh_name, readers, tensor_names


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
    constants, count, taken = Constants(model), readers(model.proto), tensor_names(model.proto)
    producers = {out: node for node in graph.node for out in node.output}
    listed = lists_all(model)
    unread: list[str] = []
    folded = 0
    for norm in [n for n in graph.node if _in_inference(n, model.opset)]:
        conv = producers.get(norm.input[0])
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or conv.domain not in ("", "ai.onnx"):
            continue
        if len(conv.input) < 2:
            continue
        old_bias = next((name for name in conv.input[2:3] if name), None)
        sources = [conv.input[1], *norm.input[1:], *([old_bias] if old_bias else [])]
        values = [value for name in sources if (value := _value(constants, name)) is not None]
        read_once = all(count[name] == 1 for name in [norm.input[0], *constants.chain(conv.input[1])])
        if not read_once or len(values) < len(sources):
            continue
        if {value.shape for value in values[1:]} != {(_outputs(values[0], conv),)}:
            continue
        weight, scale, shift, mean, variance, *bias = (value.astype(np.float64) for value in values)
        attrs = attributes(norm)
        factor = scale / np.sqrt(variance + (attrs["epsilon"].f if "epsilon" in attrs else 1e-5))
        with np.errstate(over="ignore"):
            kernel = _scale_outputs(weight, factor, conv).astype(values[0].dtype)
            addend = (((bias[0] if bias else 0.0) - mean) * factor + shift).astype(values[0].dtype)
        if not (np.isfinite(kernel).all() and np.isfinite(addend).all()):
            continue  # it does not fit half precision
        names = [fresh_name(f"{stem}_folded", taken) for stem in (conv.input[1], f"{norm.output[0]}_bias")]
        for name, value in zip(names, (kernel, addend), strict=True):
            add_initializer(model, numpy_helper.from_array(np.ascontiguousarray(value), name), listed=listed)
        unread += [*sources, conv.output[0]]
        conv.input[1:] = names
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
        folded += 1
    drop_unread(model, unread)
    return folded


def _in_inference(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a node is a BatchNormalization that normalises each channel by stored statistics."""
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or opset < 7 or len(node.input) != 5:
        return False
    attrs = attributes(node)
    training = "training_mode" in attrs and attrs["training_mode"].i
    by_element = "spatial" in attrs and not attrs["spatial"].i  # before opset 9
    return len([output for output in node.output if output]) == 1 and not training and not by_element


def _value(constants: Constants, name: str) -> np.ndarray | None:
    """The constant called `name`; None where there is none, or a user may feed another."""
    constant = constants.find(name)
    return constant.read() if constant and not constant.overridable and not constant.quantized else None


def _group(conv: onnx.NodeProto) -> int:
    return next((a.i for a in conv.attribute if a.name == "group"), 1)


def _outputs(weight: np.ndarray, conv: onnx.NodeProto) -> int:
    return weight.shape[0] if conv.op_type == "Conv" else weight.shape[1] * _group(conv)


def _scale_outputs(weight: np.ndarray, factor: np.ndarray, conv: onnx.NodeProto) -> np.ndarray:
    ones = (1,) * (weight.ndim - 2)
    if conv.op_type == "Conv":
        return weight * factor.reshape(-1, 1, *ones)  # (O, I/g, k...)
    group = _group(conv)
    blocks = weight.reshape(group, -1, *weight.shape[1:])  # (I, O/g, k...) -> (g, I/g, O/g, k...)
    return (blocks * factor.reshape(group, 1, -1, *ones)).reshape(weight.shape)

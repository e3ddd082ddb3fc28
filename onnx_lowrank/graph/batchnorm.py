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

    Exact where the convolution's output has no other reader and the normalisation runs in inference mode with stored
    statistics. One after a kernel that is used elsewhere too stays, as a scale and a shift: its mean and variance become
    tensors of 0 and 1 that all such nodes read.

    Returns
    -------
    int
        How many were folded.
    """
    return sum(_Folding(model).run())


class _Folding:
    """The graph, and what is known of it before anything is folded."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._constants, self._count, self._taken = Constants(model), readers(model.proto), tensor_names(model.proto)
        self._producers = {out: node for node in model.graph.node for out in node.output}
        self._listed = lists_all(model)
        self._unread: list[str] = []
        self._same: dict[tuple[object, ...], str] = {}

    def run(self) -> list[bool]:
        """Which of the normalisations were folded."""
        norms = [node for node in self._model.graph.node if in_inference(node, self._model.opset)]
        folded = [self._fold(norm) for norm in norms]
        drop_unread(self._model, self._unread)
        return folded

    def _fold(self, norm: onnx.NodeProto) -> bool:
        conv = self._producers.get(norm.input[0])
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or conv.domain not in ("", "ai.onnx"):
            return False
        if len(conv.input) < 2 or self._count[norm.input[0]] != 1:
            return False
        statistics = [_value(self._constants, name) for name in norm.input[1:]]
        weight, bias = _value(self._constants, conv.input[1]), None
        if len(conv.input) > 2 and conv.input[2]:
            bias = _value(self._constants, conv.input[2])
            if bias is None:
                return False
        known = [value for value in (*statistics, bias) if value is not None]
        channels = known[0].shape if known else ()
        if any(value is None for value in statistics) or any(value.shape != channels for value in known):
            return False
        scale, shift, mean, variance = (value.astype(np.float64) for value in statistics if value is not None)
        attrs = attributes(norm)
        epsilon = attrs["epsilon"].f if "epsilon" in attrs else 1e-5
        factor = scale / np.sqrt(variance + epsilon)
        addend = ((0.0 if bias is None else bias.astype(np.float64)) - mean) * factor + shift
        if weight is None or any(self._count[name] != 1 for name in self._constants.chain(conv.input[1])):
            if bias is None and known[0].dtype == np.float32:
                self._reduce(norm, factor, addend, epsilon)
            return False
        if channels != (_outputs(weight, conv),):
            return False
        with np.errstate(over="ignore"):
            kernel = _scale_outputs(weight.astype(np.float64), factor, conv).astype(weight.dtype)
            moved = addend.astype(weight.dtype)
        if not (np.isfinite(kernel).all() and np.isfinite(moved).all()):
            return False  # it does not fit half precision
        self._unread += [conv.input[1], *norm.input[1:], *([conv.input[2]] if bias is not None else []), conv.output[0]]
        conv.input[1:] = [
            self._stored(f"{conv.input[1]}_folded", kernel),
            self._stored(f"{norm.output[0]}_bias_folded", moved),
        ]
        conv.output[0] = norm.output[0]
        self._model.graph.node.remove(norm)
        return True

    def _reduce(self, norm: onnx.NodeProto, factor: np.ndarray, addend: np.ndarray, epsilon: float) -> None:
        """Put all of a normalisation into its scale and shift."""
        self._unread += norm.input[1:]
        norm.input[1:] = [
            self._stored(f"{norm.output[0]}_scale", factor.astype(np.float32)),
            self._stored(f"{norm.output[0]}_bias", addend.astype(np.float32)),
            self._shared("mean", np.zeros(len(factor), np.float32)),
            self._shared("variance", np.full(len(factor), 1.0 - epsilon, np.float32)),
        ]

    def _shared(self, stem: str, value: np.ndarray) -> str:
        key = stem, value.tobytes()
        if key not in self._same:
            self._same[key] = self._stored(f"no_{stem}", value)
        return self._same[key]

    def _stored(self, stem: str, value: np.ndarray) -> str:
        name = fresh_name(stem, self._taken)
        add_initializer(self._model, numpy_helper.from_array(np.ascontiguousarray(value), name), listed=self._listed)
        return name


def in_inference(node: onnx.NodeProto, opset: int) -> bool:
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
    return constant.read() if constant and constant.fixed else None


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

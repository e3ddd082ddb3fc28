"""What the statistics of BatchNormalization nodes say about activations, where no samples are at hand.

After a normalisation every channel has a known mean and variance. Both follow through the nodes behind it for channels that
are normally distributed and independent, which is near enough for means: from them a bias can be corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from scipy.stats import norm

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.model import Model, attributes

SAME = ("Identity", "Dropout", "AveragePool", "GlobalAveragePool")
"""Nodes that leave the mean of a channel as it is."""


@dataclass(frozen=True)
class Channels:
    """Mean and variance of every channel of an activation, (C,) each."""

    mean: np.ndarray
    variance: np.ndarray


def expected(model: Model) -> dict[str, Channels]:
    """Statistics of the activations for which they follow from BatchNormalization nodes, by name.

    References
    ----------
    Nagel, van Baalen, Blankevoort & Welling (2019), "Data-free quantization through weight equalization and bias
    correction", appendix C: the mean behind a ReLU.
    """
    constants = Constants(model)
    known: dict[str, Channels] = {}
    for node in model.graph.node:
        made = _of(node, known, constants) if node.domain in ("", "ai.onnx") else None
        if made is not None and node.output:
            known[node.output[0]] = made
    return known


def _of(node: onnx.NodeProto, known: Mapping[str, Channels], constants: Constants) -> Channels | None:
    if node.op_type == "BatchNormalization":
        gain, shift = (constants.find(name) for name in node.input[1:3])
        if gain is None or shift is None or gain.overridable or shift.overridable:
            return None
        return Channels(shift.read().astype(np.float64), gain.read().astype(np.float64) ** 2)
    inputs = [known.get(name) for name in node.input]
    first = inputs[0] if inputs else None
    if first is None:
        return None
    if node.op_type == "Add":
        second = inputs[1]
        if second is None or second.mean.shape != first.mean.shape:
            return None
        return Channels(first.mean + second.mean, first.variance + second.variance)
    if node.op_type == "Relu":
        return rectified(first)
    if node.op_type in SAME:
        return first
    if node.op_type == "Slice":
        return first if _spares_channels(node, constants) else None
    return _padded(node, first, constants) if node.op_type == "Pad" else None


def rectified(channels: Channels) -> Channels:
    """What a ReLU makes of normally distributed channels.

    Examples
    --------
    >>> after = rectified(Channels(np.zeros(1), np.ones(1)))
    >>> round(float(after.mean[0]), 4), round(float(after.variance[0]), 4)
    (0.3989, 0.3408)
    """
    mean, variance = channels.mean, channels.variance
    spread = np.sqrt(np.maximum(variance, 1e-12))
    share, density = norm.cdf(mean / spread), norm.pdf(mean / spread)
    first = mean * share + spread * density
    second = (mean**2 + variance) * share + mean * spread * density
    return Channels(first, np.maximum(second - first**2, 0.0))


def _numbers(node: onnx.NodeProto, index: int, key: str, constants: Constants) -> list[int] | None:
    """A list that a node has as an input or, in older operator sets, as an attribute."""
    if len(node.input) > index and node.input[index]:
        constant = constants.find(node.input[index])
        return None if constant is None else [int(value) for value in constant.read().ravel()]
    attrs = attributes(node)
    return [int(value) for value in attrs[key].ints] if key in attrs else None


def _spares_channels(node: onnx.NodeProto, constants: Constants) -> bool:
    axes = _numbers(node, 3, "axes", constants)
    return axes is not None and all(axis > 1 for axis in axes)


def _padded(node: onnx.NodeProto, channels: Channels, constants: Constants) -> Channels | None:
    """Zeros before and after the channels; nothing is said where other axes grow too."""
    pads = _numbers(node, 1, "pads", constants)
    value = node.input[2] if len(node.input) > 2 else ""
    constant = constants.find(value) if value else None
    if pads is None or len(pads) < 6 or len(node.input) > 3 or (value and (constant is None or constant.read().any())):
        return None
    axes = len(pads) // 2
    if min(pads) < 0 or any(pad for i, pad in enumerate(pads) if i % axes != 1):
        return None
    width = pads[1], pads[axes + 1]
    return Channels(np.pad(channels.mean, width), np.pad(channels.variance, width))

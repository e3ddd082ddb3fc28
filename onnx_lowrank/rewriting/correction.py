"""Biases that keep the mean of a layer's output where no samples are at hand, from BatchNormalization statistics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_lowrank.graph.expected import expected
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.segments import cuts
from onnx_lowrank.types import Candidate, Chain, Factorization, Stage


def corrected_biases(model: Model, found: Found, made: Mapping[Candidate, Factorization]) -> dict[str, np.ndarray]:
    """For each convolution whose input has known means, the bias that makes up for what the chain changes in them.

    Parameters
    ----------
    made
        What each choice was factorised into.

    Returns
    -------
    dict
        Biases (O,) by layer. Borders, where padding replaces a mean by zero, are not looked at.
    """
    channels = expected(model)
    if not channels:
        return {}
    by_layer = {name: (choice, i) for choice in made for i, name in enumerate(choice.layers)}
    plain = [layer.name for layer in found.layers if layer.op_type == "Conv" and layer.name in by_layer]
    biases = {}
    for cut in cuts(model, found, plain):
        seen = channels.get(cut.source)
        if seen is None or cut.bias is None:
            continue
        choice, index = by_layer[cut.layer.name]
        kernels = made[choice].of(index)
        wanted = constant_response((Stage(cut.layer.spec),), (cut.layer.read_weight(),), seen.mean)
        biases[cut.layer.name] = cut.bias + wanted - constant_response(choice.chains[index], kernels, seen.mean)
    return biases


def constant_response(chain: Chain, kernels: tuple[np.ndarray, ...], value: np.ndarray) -> np.ndarray:
    """Output (O,) of a chain of plain convolutions for an input that is `value` (I,) everywhere."""
    for stage, kernel in zip(chain, kernels, strict=True):
        group = stage.spec.group
        taps = np.asarray(kernel, np.float64).reshape(group, len(kernel) // group, kernel.shape[1], -1)
        blocks = taps.sum(axis=3)  # (g, O/g, I/g)
        value = (blocks @ value.reshape(group, -1, 1)).ravel()
    return value

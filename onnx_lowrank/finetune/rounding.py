"""Rounding to eight bits as a quantised model does it, with the gradient of what is not rounded.

References
----------
Jacob et al. (2018), "Quantization and training of neural networks for efficient integer-arithmetic-only inference", arXiv 1712.05877.
"""

from __future__ import annotations

import torch

from onnx_lowrank.quantize.rounding import Rounding

LARGEST = 127
"""Of the numbers that hold a kernel, which are as large on either side of zero."""


class Rounder:
    """Rounds tensors by their names; those without a rounding pass as they are."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding

    def activation(self, name: str, value: torch.Tensor) -> torch.Tensor:
        steps = self._rounding.activations.get(name)
        if steps is None or not value.is_floating_point():
            return value
        rounded: torch.Tensor = torch.fake_quantize_per_tensor_affine(
            value.float(), steps.scale, steps.zero, steps.low, steps.high
        )
        return rounded

    def weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self._rounding.weights:
            return value
        axis = self._rounding.weights[name]
        if axis is None:
            scale = float(value.detach().abs().max()) / LARGEST
            whole: torch.Tensor = torch.fake_quantize_per_tensor_affine(value, scale or 1.0, 0, -LARGEST, LARGEST)
            return whole
        axis %= value.ndim
        largest = value.detach().abs().amax(dim=[d for d in range(value.ndim) if d != axis]) / LARGEST
        scales = torch.where(largest > 0, largest, torch.ones_like(largest))
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        rounded: torch.Tensor = torch.fake_quantize_per_channel_affine(value, scales, zeros, axis, -LARGEST, LARGEST)
        return rounded

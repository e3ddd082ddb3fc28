"""Resize and Upsample: along each axis a matrix that interpolates, so that every mode has its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from onnx_lowrank.finetune.ops.node import Node, Op, axes_of

ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@lru_cache(maxsize=256)
def matrix(
    size: int, out: int, scale: float, mode: str, place: str, nearest: str, a: float, exclude: bool
) -> np.ndarray:
    """Weights of the inputs in each output, (out, size), along one axis.

    References
    ----------
    The ONNX operator Resize, versions 11 to 19.
    """
    x = np.arange(out, dtype=np.float64)
    if place == "half_pixel":
        x = (x + 0.5) / scale - 0.5
    elif place == "half_pixel_symmetric":
        adjustment = out / (size * scale)
        x = size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    elif place == "pytorch_half_pixel":
        x = (x + 0.5) / scale - 0.5 if out > 1 else np.zeros(out)
    elif place == "align_corners":
        x = x * (size - 1) / (size * scale - 1) if out > 1 else np.zeros(out)
    else:  # asymmetric
        x = x / scale
    if mode == "nearest":
        taps, weights = ROUND[nearest](x)[:, None], np.ones((out, 1))
    elif mode == "linear":
        x = np.clip(x, 0, size - 1)
        low = np.floor(x)
        taps, weights = np.stack([low, low + 1], 1), np.stack([1 - (x - low), x - low], 1)
    else:
        low = np.floor(x)
        taps = low[:, None] + np.arange(-1, 3)
        weights = _cubic(np.abs(x[:, None] - taps), a)
        if exclude:
            weights = np.where((taps < 0) | (taps >= size), 0.0, weights)
            weights /= weights.sum(1, keepdims=True)
    made = np.zeros((out, size))
    np.add.at(made, (np.arange(out)[:, None], np.clip(taps, 0, size - 1).astype(int)), weights)
    return made


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _resize(node: Node, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    if node.opset < 11:
        scales, sizes = rest[0], None
    else:
        scales, sizes = (rest[i] if len(rest) > i else None for i in (1, 2))
    axes = axes_of(node.ints("axes"), x)
    place = node.get("coordinate_transformation_mode", "half_pixel" if node.opset > 10 else "asymmetric")
    node.expect(place != "tf_crop_and_resize", "tf_crop_and_resize")
    node.expect(not node.get("antialias", 0), "an antialiased Resize")
    shape = [x.shape[axis] for axis in axes]
    factors = None if scales is None or not scales.numel() else [float(s) for s in scales.tolist()]
    if factors is not None:
        wanted = [math.floor(size * factor) for size, factor in zip(shape, factors, strict=True)]
    else:
        wanted = node.ints("sizes", sizes) or []
        node.expect(bool(wanted), "a Resize without scales and sizes")
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratio = (min if policy == "not_larger" else max)(w / s for w, s in zip(wanted, shape, strict=True))
            wanted, factors = [math.floor(ratio * size + 0.5) for size in shape], [ratio] * len(shape)
        else:
            factors = [w / size for w, size in zip(wanted, shape, strict=True)]
    nearest = node.get("nearest_mode", "round_prefer_floor" if node.opset > 10 else "floor")
    return _along(node, x, axes, wanted, factors, place, nearest)


def _along(
    node: Node, x: torch.Tensor, axes: list[int], wanted: list[int], factors: list[float], place: str, nearest: str
) -> torch.Tensor:
    mode = node.get("mode", "nearest")
    mode = "linear" if mode in ("bilinear", "trilinear") else mode
    cubic, exclude = float(node.get("cubic_coeff_a", -0.75)), bool(node.get("exclude_outside", 0))
    for axis, out, factor in zip(axes, wanted, factors, strict=True):
        size = x.shape[axis]
        if factor == 1.0 and out == size:
            continue
        weights = matrix(size, out, factor, mode, place, nearest, cubic, exclude)
        if mode == "nearest":
            x = x.index_select(axis, torch.from_numpy(weights.argmax(1)).to(x.device))
        else:
            by = torch.from_numpy(weights).to(device=x.device, dtype=x.dtype)
            x = torch.matmul(x.movedim(axis, -1), by.T).movedim(-1, axis)
    return x


def _upsample(node: Node, x: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    factors = [float(s) for s in (node.get("scales") if scales is None else scales.tolist())]
    wanted = [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
    return _along(node, x, list(range(x.ndim)), wanted, factors, "asymmetric", "floor")


RESIZE: dict[str, Op] = {"Resize": _resize, "Upsample": _upsample}

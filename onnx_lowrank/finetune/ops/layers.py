"""Convolutions, products, pooling and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from onnx_lowrank.finetune.ops.node import Node, Op, axis_of

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Window = tuple[list[int], list[int], list[int], list[int], list[int]]
"""Kernel, strides, dilations, pads before and after, for each spatial axis."""


def _window(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> Window:
    """The window of a node over axes of these sizes."""
    ndim = len(kernel)
    node.expect(0 < ndim < 4, f"{ndim} spatial axes")
    strides = node.ints("strides") or [1] * ndim
    dilations = node.ints("dilations") or [1] * ndim
    pads = node.ints("pads") or [0] * 2 * ndim
    before, after = pads[:ndim], pads[ndim:]
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
            for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
        if auto == "SAME_LOWER":
            before, after = after, before
    elif auto == "VALID":
        before, after = [0] * ndim, [0] * ndim
    return list(kernel), strides, dilations, before, after


def _padded(x: torch.Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> torch.Tensor:
    flat = [n for first, last in zip(reversed(before), reversed(after), strict=True) for n in (first, last)]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(node: Node, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    _, strides, dilations, before, after = _window(node, x.shape[2:], w.shape[2:])
    padding = before
    if before != after:
        x, padding = _padded(x, before, after), [0] * len(before)
    return CONV[w.ndim - 2](x, w, b, strides, padding, dilations, node.get("group", 1))


def _conv_transpose(node: Node, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    kernel = w.shape[2:]
    ndim = len(kernel)
    node.expect(0 < ndim < 4, f"{ndim} spatial axes")
    strides, dilations = node.ints("strides") or [1] * ndim, node.ints("dilations") or [1] * ndim
    extra, pads = node.ints("output_padding") or [0] * ndim, node.ints("pads") or [0] * 2 * ndim
    before, after = pads[:ndim], pads[ndim:]
    auto, wanted = node.get("auto_pad", "NOTSET"), node.ints("output_shape")
    whole = [
        stride * (size - 1) + (k - 1) * dilation + 1
        for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    if wanted is not None or auto.startswith("SAME"):
        sizes = wanted or [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        total = [full + more - size for full, more, size in zip(whole, extra, sizes, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
        if auto != "SAME_UPPER":
            before, after = after, before
    y = TRANSPOSED[ndim](x, w, None, strides, 0, 0, node.get("group", 1), dilations)
    y = _padded(y, [-n for n in before], [more - n for more, n in zip(extra, after, strict=True)])
    return y if b is None else y + b.reshape(-1, *(1,) * ndim)


def _pool_window(node: Node, x: torch.Tensor) -> tuple[Window, list[int]]:
    """The window of a pooling node, and by how much it sticks out at the end of each axis."""
    window = _window(node, x.shape[2:], node.ints("kernel_shape") or [])
    beyond = [0] * len(window[0])
    if node.get("ceil_mode", 0):
        for i, (k, stride, dilation, first, last) in enumerate(zip(*window, strict=True)):
            size, extent = x.shape[2 + i] + first + last, (k - 1) * dilation + 1
            steps = -(-(size - extent) // stride)
            if steps * stride >= x.shape[2 + i] + first:  # it would begin in the padding
                steps -= 1
            beyond[i] = max(0, steps * stride + extent - size)
    return window, beyond


def _max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    node.expect(len(node.plain.outputs) == 1, "a MaxPool that gives indices")
    (kernel, strides, dilations, before, after), beyond = _pool_window(node, x)
    pool = MAX_POOL[len(kernel)]
    small = all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if before == after and not any(beyond) and small and x.is_floating_point():
        return pool(x, kernel, strides, before, dilations)
    wide = x if x.is_floating_point() else x.double()
    wide = _padded(wide, before, [a + b for a, b in zip(after, beyond, strict=True)], -math.inf)
    return pool(wide, kernel, strides, 0, dilations).to(x.dtype)


def _average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    (kernel, strides, dilations, before, after), beyond = _pool_window(node, x)
    include = bool(node.get("count_include_pad", 0))
    small = all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if before == after and not any(beyond) and small and set(dilations) == {1}:
        return AVERAGE_POOL[len(kernel)](x, kernel, strides, before, False, include)
    ends = [a + b for a, b in zip(after, beyond, strict=True)]
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if include:  # the padding counts, what sticks out beyond it does not
        counted = _padded(_padded(counted, before, after, 1.0), [0] * len(ends), beyond)
    else:
        counted = _padded(counted, before, ends)
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    planes = _padded(x, before, ends).flatten(0, 1).unsqueeze(1)
    total, count = (CONV[len(kernel)](each, ones, None, strides, 0, dilations) for each in (planes, counted))
    return (total / count).reshape(*x.shape[:2], *total.shape[2:])


def _over_space(function: Callable[..., torch.Tensor], node: Node, x: torch.Tensor) -> torch.Tensor:
    return function(x, tuple(range(2, x.ndim)), keepdim=True)


def _gemm(node: Node, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    left = a.transpose(0, 1) if node.get("transA", 0) else a
    right = b.transpose(0, 1) if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = left @ right
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def _batch_norm(
    node: Node, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    """With stored statistics; the batch's are the program's affair, which keeps the stored ones up to date."""
    node.expect(not node.get("training_mode", 0) and bool(node.get("spatial", 1)), "this mode of BatchNormalization")
    epsilon = node.get("epsilon", 1e-5)
    if not (mean.requires_grad or variance.requires_grad):
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, epsilon)
    # a statistic that is a weight elsewhere: torch has no gradient for it
    mean, variance, scale, shift = (v.reshape(-1, *(1,) * (x.ndim - 2)) for v in (mean, variance, scale, shift))
    return (x - mean) * torch.rsqrt(variance + epsilon) * scale + shift


def _layer_norm(
    node: Node, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    axis = axis_of(node.get("axis", -1), x)
    epsilon = node.get("epsilon", 1e-5)
    y = F.layer_norm(x, x.shape[axis:], eps=epsilon) * scale
    y = y if shift is None else y + shift
    if len(node.plain.outputs) == 1:
        return y
    over = tuple(range(axis, x.ndim))
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


def _rms_norm(node: Node, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    axis = axis_of(node.get("axis", -1), x)
    square = x.square().mean(tuple(range(axis, x.ndim)), keepdim=True)
    return x * torch.rsqrt(square + node.get("epsilon", 1e-5)) * scale


def _instance_norm(node: Node, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=shift, eps=node.get("epsilon", 1e-5))


def _group_norm(node: Node, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    groups = node.get("num_groups")
    if node.opset < 21:  # one number for each group, then
        scale, shift = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, shift))
    return F.group_norm(x, groups, scale, shift, node.get("epsilon", 1e-5))


def _lrn(node: Node, x: torch.Tensor) -> torch.Tensor:
    size = node.get("size")
    square = F.pad(x.square().flatten(2).transpose(1, 2), ((size - 1) // 2, size // 2))  # (N, positions, C + size - 1)
    total = square.unfold(2, size, 1).sum(3).transpose(1, 2).reshape(x.shape)
    return x / (node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total) ** node.get("beta", 0.75)


def _lp_norm(node: Node, x: torch.Tensor) -> torch.Tensor:
    size = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / torch.where(size == 0, torch.ones_like(size), size))


def _softmax(function: Callable[..., torch.Tensor], node: Node, x: torch.Tensor) -> torch.Tensor:
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = axis_of(node.get("axis", 1), x)  # all axes from this one on are one, then
    return function(x.reshape(*x.shape[:axis], -1), -1).reshape(x.shape)


def _einsum(node: Node, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.einsum(node.get("equation"), *inputs)


LAYERS: dict[str, Op] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": partial(_over_space, torch.mean),
    "GlobalMaxPool": partial(_over_space, torch.amax),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": partial(_softmax, torch.log_softmax),
    "LpNormalization": _lp_norm,
    "MatMul": lambda node, a, b: torch.matmul(a, b),
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_norm,
    "Softmax": partial(_softmax, torch.softmax),
}

"""Operators that move elements, make them, or tell about their shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from onnx_lowrank.finetune.ops.node import Node, Op, axes_of, axis_of
from onnx_lowrank.graph.plain import numpy_dtype


def _cast(node: Node, x: torch.Tensor) -> torch.Tensor:
    dtype = numpy_dtype(int(node.get("to")))
    node.expect(dtype.kind in "fiub" or dtype.name == "bfloat16", f"a cast to {dtype.name}")
    return x.to(node.tensor(np.zeros((), dtype)).dtype)


def _constant(node: Node) -> torch.Tensor:
    for name, value in node.plain.attributes.items():
        if name == "value":
            return node.tensor(np.asarray(value))
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
    node.expect(False, "a constant of texts or sparse")
    raise AssertionError


def _constant_of_shape(node: Node, shape: torch.Tensor) -> torch.Tensor:
    value = node.get("value")
    fill = torch.zeros(1) if value is None else node.tensor(np.asarray(value))
    return fill.reshape(()).expand(shape.tolist()).clone()


def _reshape(node: Node, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    sizes = shape.tolist()
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node: Node, x: torch.Tensor) -> torch.Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1) if x.numel() else x.reshape(math.prod(x.shape[:axis]), 0)


def _transpose(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.permute(node.ints("perm") or list(range(x.ndim))[::-1])


def _squeeze(node: Node, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    chosen = node.ints("axes", axes)
    for axis in sorted(axes_of(chosen, x) if chosen else range(x.ndim), reverse=True):
        x = x.squeeze(axis) if chosen or x.shape[axis] == 1 else x
    return x


def _unsqueeze(node: Node, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    chosen = node.ints("axes", axes) or []
    for axis in sorted(axis % (x.ndim + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _split(node: Node, x: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    axis = axis_of(node.get("axis", 0), x)
    lengths = node.ints("split", sizes)
    if lengths is None:
        count = node.get("num_outputs", len(node.plain.outputs))
        step = -(-x.shape[axis] // count)
        lengths = [min(step, x.shape[axis] - i * step) for i in range(count)]
    return torch.split(x, lengths, axis)


def _slice(
    node: Node,
    x: torch.Tensor,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    begin, end = node.ints("starts", starts) or [], node.ints("ends", ends) or []
    along = node.ints("axes", axes) or list(range(len(begin)))
    by = [1] * len(begin) if steps is None else steps.tolist()
    index = [slice(None)] * x.ndim
    for a, first, last, step in zip(along, begin, end, by, strict=True):
        axis = axis_of(a, x)
        if step > 0:
            index[axis] = slice(*slice(first, last, step).indices(x.shape[axis]))
            continue
        # torch has no negative steps: the same elements forward, then turned around
        places = range(*slice(first, last, step).indices(x.shape[axis]))
        x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x[tuple(index)]


def _gather(node: Node, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = axis_of(node.get("axis", 0), x)
    index = torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64)
    taken = x.index_select(axis, index.flatten().to(x.device))
    return taken.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _gather_elements(node: Node, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = axis_of(node.get("axis", 0), x)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device, torch.int64))


def _expand(node: Node, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _pad(
    node: Node,
    x: torch.Tensor,
    pads: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
) -> torch.Tensor:
    amounts = node.ints("pads", pads) or []
    along = axes_of(None if axes is None else axes.tolist(), x)
    fill = float(node.get("value", 0.0)) if value is None else value.item()
    mode = node.get("mode", "constant")
    begin, end = [0] * x.ndim, [0] * x.ndim
    for axis, first, last in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        begin[axis], end[axis] = first, last
    if mode == "constant":
        flat = [n for axis in reversed(range(x.ndim)) for n in (begin[axis], end[axis])]
        return F.pad(x, flat, value=fill)
    for axis in range(x.ndim):
        if begin[axis] or end[axis]:
            places = np.pad(np.arange(x.shape[axis]), (begin[axis], end[axis]), mode=mode)  # edge, reflect and wrap
            x = x.index_select(axis, torch.from_numpy(places).to(x.device))
    return x


def _shape(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end", None)], dtype=torch.int64)


def _depth_to_space(node: Node, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(node: Node, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    b = node.get("blocksize")
    x = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 1, 3, 5, 2, 4) if node.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    return x.permute(order).reshape(n, c * b**2, h // b, w // b)


def _range(node: Node, start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _trilu(node: Node, x: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)


def _cum_sum(node: Node, x: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    along, turned = axis_of(int(axis.item()), x), bool(node.get("reverse", 0))
    x = x.flip(along) if turned else x
    total = torch.cumsum(x, along).to(x.dtype)
    total = total - x if node.get("exclusive", 0) else total
    return total.flip(along) if turned else total


def _dropout(node: Node, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    node.expect(not (len(rest) > 1 and rest[1] is not None and bool(rest[1])), "a Dropout that drops")
    return x, torch.ones_like(x, dtype=torch.bool)


SHAPES: dict[str, Op] = {
    "Cast": _cast,
    "CastLike": lambda node, x, like: x.to(like.dtype),
    "Concat": lambda node, *inputs: torch.cat(inputs, dim=axis_of(node.get("axis", 1), inputs[0])),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cum_sum,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Identity": lambda node, x: x,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda node, x: torch.tensor(x.numel(), dtype=torch.int64),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda node, x, repeats: torch.tile(x, tuple(repeats.tolist())),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

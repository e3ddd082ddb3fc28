"""Operators that reduce axes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from onnx_lowrank.finetune.ops.node import Node, Op, axes_of, axis_of

Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _reduce(function: Reduction, node: Node, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    chosen = node.ints("axes", axes)
    if not chosen:
        if node.get("noop_with_empty_axes", 0):
            return function(x.unsqueeze(0), [0], False)
        chosen = None
    along = axes_of(chosen, x)
    return function(x, along, bool(node.get("keepdims", 1))) if along else function(x.unsqueeze(0), [0], False)


def _arg(function: Callable[..., torch.Tensor], node: Node, x: torch.Tensor) -> torch.Tensor:
    axis, keep = axis_of(node.get("axis", 0), x), bool(node.get("keepdims", 1))
    if node.get("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
    return function(x, axis, keepdim=keep)


REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).to(x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).to(x.dtype),
}

REDUCE: dict[str, Op] = {name: functools.partial(_reduce, function) for name, function in REDUCTIONS.items()}
REDUCE |= {"ArgMax": functools.partial(_arg, torch.argmax), "ArgMin": functools.partial(_arg, torch.argmin)}

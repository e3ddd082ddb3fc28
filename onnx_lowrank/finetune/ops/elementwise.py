"""Operators on one element, or on elements that broadcasting brings together."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from onnx_lowrank.finetune.ops.node import Node, Op


def _clip(
    node: Node, x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> torch.Tensor:
    if node.opset < 11:
        low, high = (
            None if (v := node.get(name)) is None else torch.tensor(v, dtype=x.dtype) for name in ("min", "max")
        )
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _div(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.pow(a, b).to(a.dtype)


def _mod(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def _prelu(node: Node, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, slope * x, x)


def _hard_sigmoid(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x * node.get("alpha", 0.2) + node.get("beta", 0.5), 0.0, 1.0)


def _celu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.celu(x, node.get("alpha", 1.0))


def _selu(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0.0)))


def _gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


def _mean(node: Node, *inputs: torch.Tensor) -> torch.Tensor:
    return reduce(torch.add, inputs) / len(inputs)


def _swish(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


ELEMENTWISE: dict[str, Op] = {
    "Abs": lambda node, x: torch.abs(x),
    "Add": lambda node, a, b: a + b,
    "And": lambda node, a, b: a & b,
    "Ceil": lambda node, x: torch.ceil(x),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": lambda node, x: torch.cos(x),
    "Div": _div,
    "Elu": lambda node, x: F.elu(x, node.get("alpha", 1.0)),
    "Equal": lambda node, a, b: a == b,
    "Erf": lambda node, x: torch.erf(x),
    "Exp": lambda node, x: torch.exp(x),
    "Floor": lambda node, x: torch.floor(x),
    "Gelu": _gelu,
    "Greater": lambda node, a, b: a > b,
    "GreaterOrEqual": lambda node, a, b: a >= b,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node, x: x * torch.clamp(x / 6.0 + 0.5, 0.0, 1.0),
    "LeakyRelu": lambda node, x: F.leaky_relu(x, node.get("alpha", 0.01)),
    "Less": lambda node, a, b: a < b,
    "LessOrEqual": lambda node, a, b: a <= b,
    "Log": lambda node, x: torch.log(x),
    "Max": lambda node, *inputs: reduce(torch.maximum, inputs),
    "Mean": _mean,
    "Min": lambda node, *inputs: reduce(torch.minimum, inputs),
    "Mish": lambda node, x: F.mish(x),
    "Mod": _mod,
    "Mul": lambda node, a, b: a * b,
    "Neg": lambda node, x: -x,
    "Not": lambda node, x: ~x,
    "Or": lambda node, a, b: a | b,
    "PRelu": _prelu,
    "Pow": _pow,
    "Reciprocal": lambda node, x: torch.reciprocal(x),
    "Relu": lambda node, x: torch.relu(x),
    "Round": lambda node, x: torch.round(x),
    "Selu": _selu,
    "Sigmoid": lambda node, x: torch.sigmoid(x),
    "Sign": lambda node, x: torch.sign(x),
    "Sin": lambda node, x: torch.sin(x),
    "Softplus": lambda node, x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": lambda node, x: F.softsign(x),
    "Sqrt": lambda node, x: torch.sqrt(x),
    "Sub": lambda node, a, b: a - b,
    "Sum": lambda node, *inputs: reduce(torch.add, inputs),
    "Swish": _swish,
    "Tanh": lambda node, x: torch.tanh(x),
    "ThresholdedRelu": lambda node, x: torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x)),
    "Where": lambda node, condition, a, b: torch.where(condition, a, b),
    "Xor": lambda node, a, b: a ^ b,
}

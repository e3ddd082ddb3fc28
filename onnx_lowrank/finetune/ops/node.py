"""What an operator's function is given beside its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onnx_lowrank.graph.plain import PlainNode
from onnx_lowrank.types import LowRankError

Op = Callable[..., Any]
"""``(node, *inputs) -> output or tuple of outputs``; an absent input is None, and absent ones at the end are not given."""


HALVES = (torch.float16, torch.bfloat16)


class Unsupported(LowRankError):
    """A node that is not run here."""


@dataclass(frozen=True)
class Node:
    """A node of the operator set `opset`."""

    plain: PlainNode
    opset: int
    widen: bool = False
    """Whether half precision is computed as float32."""

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.plain.attributes.get(name, default)

    def tensor(self, value: np.ndarray) -> torch.Tensor:
        """A stored value, in the precision that is computed in."""
        return to_tensor(value, widen=self.widen)

    def ints(self, name: str, given: torch.Tensor | None = None) -> list[int] | None:
        """Whole numbers that were an attribute once and are an input now; None where they are neither."""
        if given is not None:
            return [int(n) for n in given.flatten().tolist()]
        value = self.get(name)
        return None if value is None else [int(n) for n in value]

    def expect(self, condition: bool, what: str) -> None:
        """Refuse what is not run here.

        Raises
        ------
        Unsupported
            Where the condition does not hold.
        """
        if not condition:
            raise Unsupported(f"{self.plain.title}: {what} cannot be trained")


def axis_of(axis: int, x: torch.Tensor) -> int:
    """An axis counted from the front."""
    return axis % x.ndim if x.ndim else 0


def axes_of(axes: Sequence[int] | None, x: torch.Tensor) -> list[int]:
    """Axes counted from the front; all where none are given."""
    return list(range(x.ndim)) if axes is None else [axis_of(axis, x) for axis in axes]


def to_tensor(value: np.ndarray, *, widen: bool = False) -> torch.Tensor:
    """A tensor of its own. Types that torch lacks become the nearest that it has; with `widen` halves become float32."""
    if value.dtype.name == "bfloat16":
        made = torch.from_numpy(np.array(value, dtype=np.float32)).to(torch.bfloat16)
    elif value.dtype.kind == "u" and value.dtype.itemsize > 1:
        made = torch.from_numpy(np.array(value, dtype=np.int64))
    else:
        made = torch.from_numpy(np.array(value, order="C", copy=True))
    return made.float() if widen and made.dtype in HALVES else made

"""Two stages of several layers fitted to what the layers see: linear least squares in whatever part of them is free.

The kernel that two stages make is bilinear in them. With what is shared held fixed it is linear in what is a layer's own, and
the other way round; each is a problem without a closed form, because a tap of the first stage meets every tap of the second, and
conjugate gradients solve it without forming its matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

CONJUGATE_GRADIENTS = 40
"""Iterations of each step of such a fit."""


class SeenKernel:
    """A kernel to be matched in the norm of what its layer sees.

    Parameters
    ----------
    weight
        Kernel in ONNX order.
    moment
        Covariance of the layer's input patches.
    rows
        What each output channel counts for, (O,).
    """

    def __init__(self, weight: np.ndarray, moment: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.target = np.asarray(weight, dtype=np.float64).reshape(len(weight), -1)
        self._moment = moment
        self._rows = np.ones(len(weight)) if rows is None else np.square(rows)
        self.energy = float(np.sum(self.weighted(self.target) * self.target)) or 1.0

    def weighted(self, kernel: np.ndarray) -> np.ndarray:
        """``D W S`` of a kernel (O, D): the inner product with it is that of outputs."""
        product: np.ndarray = self._rows[:, None] * (kernel @ self._moment)
        return product

    def error(self, first: np.ndarray, second: np.ndarray) -> float:
        """Squared relative error of the output."""
        missed = composed(first, second).reshape(self.target.shape) - self.target
        return max(0.0, float(np.sum(self.weighted(missed) * missed)) / self.energy)


def composed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The kernel (O, I, kh, kw...) that two stages make, (r, I, kh, 1...) and (O, r, 1, kw...)."""
    rank, inner = first.shape[:2]
    return np.einsum("rih,orw->oihw", first.reshape(rank, inner, -1), second.reshape(len(second), rank, -1))


def _pulled(gradient: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients in two stages from that in their kernel, (O, I*kh*kw)."""
    rank, inner = first.shape[:2]
    taps, columns = first.reshape(rank, inner, -1), second.reshape(len(second), rank, -1)
    cube = gradient.reshape(len(second), inner, taps.shape[2], columns.shape[2])
    return (
        np.einsum("oihw,orw->rih", cube, columns).reshape(first.shape),
        np.einsum("oihw,rih->orw", cube, taps).reshape(second.shape),
    )


def least_squares(
    seen: Sequence[SeenKernel], made: Sequence[tuple[np.ndarray, np.ndarray]], free: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels with what is `free` (masks over the first and the second stage) at the least error over all layers.

    What is free is the same in all layers, and their kernel is linear in it: a free rank of one stage meets one of the
    other that is not. Solved by conjugate gradients.
    """
    masks = [np.broadcast_to(mask, stage.shape) for mask, stage in zip(free, made[0], strict=True)]
    cuts = int(masks[0].sum())

    def placed(flat: np.ndarray, base: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        stages = [stage.copy() for stage in base]
        for stage, mask, part in zip(stages, masks, (flat[:cuts], flat[cuts:]), strict=True):
            stage[mask] = part
        return stages[0], stages[1]

    def gradient(kernels: Sequence[np.ndarray]) -> np.ndarray:
        total = np.zeros(cuts + int(masks[1].sum()))
        for one, (first, second), kernel in zip(seen, made, kernels, strict=True):
            pulled = _pulled(one.weighted(kernel) / one.energy, first, second)
            total += np.concatenate([part[mask] for part, mask in zip(pulled, masks, strict=True)])
        return total

    def linear(flat: np.ndarray) -> list[np.ndarray]:
        """What the free part alone adds to each kernel."""
        kernels = []
        for first, second in made:
            added_first, added_second = placed(flat, (np.zeros_like(first), np.zeros_like(second)))
            kernel = composed(added_first, np.where(masks[1], 0.0, second))
            kernel += composed(np.where(masks[0], 0.0, first), added_second)
            kernels.append(kernel.reshape(len(second), -1))
        return kernels

    start = np.concatenate([stage[mask] for stage, mask in zip(made[0], masks, strict=True)])
    missed = [one.target - composed(*stages).reshape(one.target.shape) for one, stages in zip(seen, made, strict=True)]
    operator = LinearOperator((len(start),) * 2, matvec=lambda flat: gradient(linear(flat)), dtype=np.float64)
    step, _ = cg(operator, gradient(missed), maxiter=CONJUGATE_GRADIENTS, rtol=1e-8)
    return [placed(start + step, stages) for stages in made]

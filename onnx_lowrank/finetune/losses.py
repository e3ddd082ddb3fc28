"""What training makes small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from onnx_lowrank.types import LowRankError

Tensors = Mapping[str, torch.Tensor]

LabelLoss = Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""``function(outputs, labels) -> scalar``; outputs by name."""

TINY = 1e-12


def distance(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the variance of what is wanted: a share of its energy, whatever its scale."""
    return F.mse_loss(got, wanted) / (wanted.var() + TINY)


def distances(got: Tensors, wanted: Tensors) -> torch.Tensor:
    """The mean of :func:`distance` over all that is wanted."""
    return torch.stack([distance(got[name], value) for name, value in wanted.items()]).mean()


def cross_entropy(outputs: Tensors, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the first output, (N, classes) of logits, or of probabilities where its rows are some.

    Raises
    ------
    LowRankError
        Where labels or outputs have another shape.
    """
    logits = next(iter(outputs.values()))
    if logits.ndim < 2 or labels.ndim != 1 or labels.is_floating_point():
        raise LowRankError(
            f"cross entropy takes an output (N, classes) and whole numbers (N,) as labels, not {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}: give a loss of your own (--loss FILE.py:function)"
        )
    scores = logits.flatten(1)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise LowRankError(
            f"labels from {int(labels.min())} to {int(labels.max())} were given: the model has {scores.shape[1]} classes, from 0 on"
        )
    sums = scores.detach().sum(1)
    probabilities = bool((scores.detach() >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
    return F.nll_loss(torch.log(scores + TINY), labels) if probabilities else F.cross_entropy(scores, labels)


def hits(outputs: Tensors, labels: torch.Tensor) -> torch.Tensor:
    """How many of the first output's rows are largest at their label."""
    return (next(iter(outputs.values())).flatten(1).argmax(1) == labels).sum()


def orthogonality(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far factors are from orthonormal: the sum of ``||G - I||^2 / r^2``, G the (r, r) Gram matrix of the shorter side.

    References
    ----------
    Yang, Tang, Wen, Yan, Hu, Li, Li & Chen (2020), "Learning low-rank deep neural networks via singular vector orthogonality
    regularization and singular value sparsification", equation 4.
    """
    total = []
    for factor in factors:
        matrix = factor.flatten(1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        gram = matrix @ matrix.T
        total.append((gram - torch.eye(len(gram), device=gram.device)).square().sum() / len(gram) ** 2)
    return torch.stack(total).sum()

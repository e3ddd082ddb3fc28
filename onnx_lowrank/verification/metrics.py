"""Metrics of a model beside the original on the same samples, each a score for every sample; higher is better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_lowrank.types import LowRankError

Outputs = list[np.ndarray]


def _samples(outputs: Outputs) -> int:
    """Samples in a batch; one where the model returns a single number."""
    return len(outputs[0]) if outputs[0].ndim else 1


def _classes(outputs: Outputs) -> np.ndarray:
    """Index of the largest score: axis 1 is that of the classes, in a classifier and in a segmentation alike."""
    return outputs[0].argmax(axis=1)


def _per_sample(matches: np.ndarray) -> np.ndarray:
    return matches.reshape(len(matches), -1).mean(axis=1)  # (N, positions...) -> (N,)


def _top1(outputs: Outputs, reference: Outputs, labels: np.ndarray) -> np.ndarray:
    return _per_sample(_classes(outputs) == labels)


def _top5(outputs: Outputs, reference: Outputs, labels: np.ndarray) -> np.ndarray:
    scores = outputs[0]
    if scores.shape[1] <= 5:
        return np.ones(len(scores))
    best = np.argpartition(-scores, 5, axis=1)[:, :5]
    return _per_sample((best == np.expand_dims(labels, 1)).any(axis=1))


def _agreement(outputs: Outputs, reference: Outputs, labels: np.ndarray | None) -> np.ndarray:
    if outputs[0].ndim < 2:
        return np.full(_samples(outputs), np.nan)
    return _per_sample(_classes(outputs) == _classes(reference))


def _rows(outputs: Outputs) -> np.ndarray:
    """All floating-point outputs of each sample, one after the other; those of other numbers where there are none."""
    rows = _samples(outputs)
    kinds = "f" if any(o.dtype.kind == "f" for o in outputs) else "biu"
    parts = [
        o.reshape(rows, -1).astype(np.float64)
        for o in outputs
        if o.dtype.kind in kinds and o.size and o.size % rows == 0
    ]
    return np.concatenate(parts, axis=1) if parts else np.zeros((rows, 1))


def _pair(outputs: Outputs, reference: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both models, with zeros where one of them is not finite: :func:`is_broken` sees to those."""
    a, b = _rows(outputs), _rows(reference)
    comparable = np.isfinite(a) & np.isfinite(b)
    return np.where(comparable, a, 0.0), np.where(comparable, b, 0.0)


def is_broken(outputs: Outputs, reference: Outputs) -> np.ndarray:
    """Which samples are NaN or infinite somewhere where the original is finite."""
    return (~np.isfinite(_rows(outputs)) & np.isfinite(_rows(reference))).any(axis=1)


def _cosine(outputs: Outputs, reference: Outputs, labels: np.ndarray | None) -> np.ndarray:
    a, b = _pair(outputs, reference)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1), (a == b).all(axis=1))


CAP_DB = 200.0
"""What equal outputs count as in decibels: beyond float32, and finite, so that means and JSON stay meaningful."""


def _decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.nan_to_num(10 * np.log10(signal / noise), nan=CAP_DB, posinf=CAP_DB), -CAP_DB, CAP_DB)


def _sqnr(outputs: Outputs, reference: Outputs, labels: np.ndarray | None) -> np.ndarray:
    a, b = _pair(outputs, reference)
    return _decibels(np.square(b).sum(axis=1), np.square(a - b).sum(axis=1))


def _psnr(outputs: Outputs, reference: Outputs, labels: np.ndarray | None) -> np.ndarray:
    a, b = _pair(outputs, reference)
    return _decibels(np.square(np.ptp(b, axis=1)), np.square(a - b).mean(axis=1))


Metric = Callable[[Outputs, Outputs, "np.ndarray | None"], np.ndarray]

METRICS: dict[str, Metric] = {
    "top1": _top1,  # type: ignore[dict-item]
    "top5": _top5,  # type: ignore[dict-item]
    "agreement": _agreement,
    "cosine": _cosine,
    "sqnr": _sqnr,
    "psnr": _psnr,
}
"""Scores of each sample from (outputs, the original's outputs, labels)."""

WORST = {"cosine": -1.0, "sqnr": -CAP_DB, "psnr": -CAP_DB}
"""What a broken sample counts as; 0 for the others. Its scores would be those of a class, or of no noise at all."""

NEED_LABELS = ("top1", "top5")

DECIBELS = ("sqnr", "psnr")
"""Against the original, which has no finite value of its own: what is lost is the share of noise, 0.01 for 20 dB, 1 at most."""

CustomMetric = Callable[[Outputs, "np.ndarray | None"], float]


def find_metric(name: str) -> Metric:
    """The metric called `name`.

    Raises
    ------
    LowRankError
        For a name that is not in the table.
    """
    if name not in METRICS:
        raise LowRankError(
            f"no metric is called '{name}': one of {', '.join(METRICS)} or FILE.py:function was expected"
        )
    return METRICS[name]

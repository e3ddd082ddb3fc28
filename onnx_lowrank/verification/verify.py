"""Two models side by side on the same feeds: accuracy with its confidence, and latency with its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from onnx_lowrank.runtime import AnySession, Feeds, MNNSession, RunSettings, needs, time_pair
from onnx_lowrank.types import LowRankError
from onnx_lowrank.verification.metrics import (
    DECIBELS,
    METRICS,
    NEED_LABELS,
    WORST,
    CustomMetric,
    Outputs,
    _samples,
    find_metric,
    is_broken,
)
from onnx_lowrank.verification.parts import AT_ONCE, PartSession, time_in_parts

CONFIDENCE = 0.95
"""Of the upper bound on a drop, one-sided: what a promise is held with."""

LEAST_SECONDS = 1.0
"""That two models are timed for: 50 runs of a small one are over in the moment that something else takes the machine."""

GUESSING = 0.01
"""A model is no better than guessing where guessing alone would be right as often with at least this probability."""

FEWEST_GUESSES = 20
"""Samples below which nothing is said about guessing."""

Batches = Iterable[tuple[Feeds, "np.ndarray | None"]]


Runnable = AnySession | PartSession
"""A model on ONNX Runtime, whole or in parts."""


@dataclass(frozen=True)
class Accuracy:
    """A metric of both models on the same samples; higher is better.

    Parameters
    ----------
    metric
        Its name.
    original, compressed
        Its mean over the samples.
    drop
        What was lost; negative where the compressed model is better. Of ``sqnr`` and ``psnr`` the share of noise in the
        power of the original (in the square of its range), of each sample at most 1: 0.01 is 20 dB.
    drop_upper_95
        The drop is at most this with 95 % confidence; NaN where a single figure for all samples leaves no way to tell,
        and infinite where a sample is broken.
    samples
        How many.
    others
        Further figures of the same run that need no labels: how near the outputs are to the original's.
    broken
        Samples for which the compressed model returns NaN or infinity where the original does not. They count as the
        worst that the metric knows.
    classes
        Of ``top1`` and ``top5`` with one label for each sample, how many there are to guess among; 0 otherwise.
    """

    metric: str
    original: float
    compressed: float
    drop: float
    drop_upper_95: float
    samples: int
    others: dict[str, float]
    broken: int = 0
    classes: int = 0

    @property
    def guesswork(self) -> str:
        """Why nothing is learnt from these samples: the original is no better than guessing on them; otherwise empty.

        By the exact one-sided test of the binomial distribution.

        Examples
        --------
        >>> Accuracy("top1", 62 / 600, 0.1, 0.0033, 0.01, 600, {}, classes=10).guesswork.partition(":")[0]
        'the original itself answers 62 of 600 right, no better than guessing among 10 classes'
        >>> Accuracy("top1", 93 / 600, 0.1, 0.0033, 0.01, 600, {}, classes=10).guesswork
        ''
        """
        if not self.classes or self.samples < FEWEST_GUESSES:
            return ""
        chance = min(1.0, (5 if self.metric == "top5" else 1) / self.classes)
        right = round(self.original * self.samples)
        # with few classes and samples not even a model that is always right could be told from luck
        if chance**self.samples >= GUESSING or stats.binom.sf(right - 1, self.samples, chance) < GUESSING:
            return ""
        return (
            f"the original itself answers {right} of {self.samples} right, no better than guessing among {self.classes} "
            f"classes: labels, preprocess or the order of classes are wrong"
        )


@dataclass(frozen=True)
class Latency:
    """Median times of both models, run in turn on the same feeds.

    Every figure is NaN where a session does not say that the provider runs a part of its model: what ran was the CPU.

    Parameters
    ----------
    provider, threads, batch
        What the models ran on, and with how many threads and samples.
    original_ms, compressed_ms
        Median milliseconds of a run.
    original_p90_ms, compressed_p90_ms
        The same, of which one run in ten takes longer.
    speedup
        Median over runs in turn of the original's time over the other's.
    speedup_low_95, speedup_high_95
        Where the median lies with 95 % confidence.
    placement, original_placement
        Nodes that each provider runs of the compressed model and of the original, as their sessions say.
    fallback
        What of either model the provider left to others, and what it would need; empty where it runs all.
    """

    provider: str
    threads: int
    batch: int
    original_ms: float
    compressed_ms: float
    original_p90_ms: float
    compressed_p90_ms: float
    speedup: float
    speedup_low_95: float
    speedup_high_95: float
    placement: dict[str, int]
    original_placement: dict[str, int] = field(default_factory=dict)
    fallback: str = ""


def check_accuracy(
    original: Runnable,
    compressed: Runnable,
    batches: Batches,
    metric: str | None = None,
    custom: CustomMetric | None = None,
    source: str = "",
) -> Accuracy:
    """Run both models over `batches` and compare them sample by sample.

    Parameters
    ----------
    batches
        Feeds and labels; read once.
    metric
        Key of ``METRICS``; by default ``top1`` with labels and ``cosine`` without.
    custom
        A figure from all outputs and all labels at once, in the place of `metric`, which then only names it.
    source
        Where the samples are from, for messages.

    Raises
    ------
    LowRankError
        Where labels are needed and missing, or do not fit, there is no sample, or the models return different shapes.
    """
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    near: dict[str, list[np.ndarray]] = {name: [] for name in ("agreement", "cosine", "sqnr")}
    kept = _Kept()
    samples = broken = classes = 0
    for reference, outputs, labels in _run_both(original, compressed, batches):
        _check_shapes(reference, outputs)
        spoiled = is_broken(outputs, reference)
        broken += int(spoiled.sum())
        metric = metric or ("top1" if labels is not None else "cosine")
        samples += _samples(reference)
        for name, scores in near.items():
            scores.append(np.where(spoiled, WORST.get(name, 0.0), METRICS[name](outputs, reference, labels)))
        if custom:
            kept.add(reference, outputs, labels)
            continue
        score = find_metric(metric)
        if metric in NEED_LABELS:
            _check_labels(metric, reference[0], labels, f"{source}: " if source else "")
            classes = reference[0].shape[1] if reference[0].ndim == 2 else 0  # neighbouring positions are no samples
        before.append(score(reference, reference, labels))
        after.append(np.where(spoiled, WORST.get(metric, 0.0), score(outputs, reference, labels)))
    if not samples or metric is None:
        raise LowRankError("the evaluation data holds no sample: at least one was expected")
    others = {name: float(np.mean(np.concatenate(scores))) for name, scores in near.items() if name != metric}
    others = {name: value for name, value in others.items() if np.isfinite(value)}
    if custom:
        first, second, upper = kept.figure(custom, 0), kept.figure(custom, 1), float("nan")
        drop = first - second
        if np.isnan(first):
            raise LowRankError("the metric returned nan for the original model: a number was expected")
    else:
        each, others_each = np.concatenate(before), np.concatenate(after)
        first, second = float(each.mean()), float(others_each.mean())
        if metric in DECIBELS:
            each, others_each = (-np.minimum(10 ** (-scores / 10), 1.0) for scores in (each, others_each))
        drop, upper = float(each.mean() - others_each.mean()), drop_upper(each, others_each)
    # of a model that returns NaN nothing can be promised, not even where the original is wrong as well
    return Accuracy(metric, first, second, drop, float("inf") if broken else upper, samples, others, broken, classes)


def _run_both(
    original: Runnable, compressed: Runnable, batches: Batches
) -> Iterator[tuple[Outputs, Outputs, np.ndarray | None]]:
    """Outputs of both models and labels, batch by batch; several batches at once where parts have to be loaded for them."""
    if not (isinstance(original, PartSession) and isinstance(compressed, PartSession)):
        for feeds, labels in batches:
            yield original.run(feeds), compressed.run(feeds), labels
        return
    rest = iter(batches)
    while some := list(itertools.islice(rest, AT_ONCE)):
        together = [feeds for feeds, _ in some]
        yield from zip(
            original.run_all(together), compressed.run_all(together), [labels for _, labels in some], strict=True
        )


class _Kept:
    """Outputs of all batches, for a metric that wants them at once."""

    def __init__(self) -> None:
        self._batches: list[tuple[Outputs, Outputs, np.ndarray | None]] = []

    def add(self, reference: Outputs, outputs: Outputs, labels: np.ndarray | None) -> None:
        self._batches.append((reference, outputs, labels))

    def figure(self, custom: CustomMetric, which: int) -> float:
        outputs = [_joined(parts) for parts in zip(*(batch[which] for batch in self._batches), strict=True)]
        labels = [batch[2] for batch in self._batches if batch[2] is not None]
        value = custom(outputs, np.concatenate(labels) if labels else None)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise LowRankError(f"the metric returned {value!r}: one number was expected") from error


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One output of all batches, along the samples."""
    if len({part.shape[1:] for part in parts}) > 1:
        raise LowRankError(
            "a metric of one's own gets all outputs at once, and they differ in size: evaluate on inputs of one size"
        )
    return np.concatenate([np.atleast_1d(part) for part in parts])


def check_outputs(outputs: Sequence[object]) -> None:
    """See that what a model returns can be compared.

    Raises
    ------
    LowRankError
        Where it returns something that is no tensor.
    """
    for index, value in enumerate(outputs):
        if not isinstance(value, np.ndarray):
            raise LowRankError(
                f"output {index} is a sequence, a map or nothing: only models whose outputs are tensors can be compared; "
                f"take it out of the outputs"
            )


def _check_shapes(reference: Outputs, outputs: Outputs) -> None:
    for index, (first, second) in enumerate(zip(reference, outputs, strict=True)):
        if first.shape != second.shape:
            raise LowRankError(
                f"output {index} has shape {list(first.shape)} from the original and {list(second.shape)} from the "
                f"other: two versions of one model were expected, whose sizes do not follow from values (NonZero, "
                f"NonMaxSuppression); take such outputs out"
            )


def _check_labels(metric: str, scores: np.ndarray, labels: np.ndarray | None, where: str) -> None:
    if labels is None:
        raise LowRankError(
            f"{where}metric {metric} needs labels, and the evaluation data has none: use agreement or cosine"
        )
    if scores.ndim < 2:
        raise LowRankError(
            f"metric {metric} needs scores of classes: the model's first output has shape {list(scores.shape)}"
        )
    if labels.shape != (scores.shape[0], *scores.shape[2:]):
        hint = "; if they are one-hot, store labels.argmax(axis=1)" if labels.shape == scores.shape else ""
        raise LowRankError(
            f"{where}labels of shape {list(labels.shape)} do not fit the first output {list(scores.shape)}: one class for "
            f"each sample (and position) was expected{hint}"
        )
    if labels.dtype.kind not in "iu":
        hint = ": store labels.astype('int64')" if labels.dtype.kind in "bf" else ""
        raise LowRankError(
            f"{where}labels of dtype {labels.dtype} were given: integers were expected, numbers of classes from 0 to "
            f"{scores.shape[1] - 1}{hint}"
        )
    # in a segmentation some classes stand for "do not count", by a number beyond the scores
    if labels.ndim == 1 and not ((labels >= 0) & (labels < scores.shape[1])).all():
        raise LowRankError(
            f"{where}labels must be numbers of classes from 0 to {scores.shape[1] - 1}, the places in the model's scores: "
            f"{labels.min()} to {labels.max()} were given"
        )


def drop_upper(before: np.ndarray, after: np.ndarray) -> float:
    """Upper bound of the mean of (before - after), one-sided, at 95 %, from paired scores.

    For scores that are right or wrong, from the exact limits of the shares that were lost and gained, which stays
    honest where hardly any sample differs: of n samples that all agree, about 3 / n. Otherwise the paired t interval.

    References
    ----------
    Clopper & Pearson (1934), "The use of confidence or fiducial limits illustrated in the case of the binomial": the
    limits. Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17, method 10: how they and their correlation make a limit of the difference.

    Examples
    --------
    >>> same = np.ones(598)
    >>> round(drop_upper(same, same), 4)
    0.005
    """
    n = len(before)
    difference = before - after
    if np.isin(difference, (-1, 0, 1)).all() and np.isin(before, (0, 1)).all():
        return _paired_upper(int(np.sum(difference > 0)), int(np.sum(difference < 0)), n)
    if n < 2:
        return float("nan")
    return float(difference.mean() + stats.t.ppf(CONFIDENCE, n - 1) * difference.std(ddof=1) / np.sqrt(n))


def _paired_upper(lost: int, gained: int, n: int) -> float:
    """Upper limit of the share lost minus the share gained."""
    p, q = lost / n, gained / n
    above = (stats.beta.ppf(CONFIDENCE, lost + 1, n - lost) if lost < n else 1.0) - p
    below = q - (stats.beta.ppf(1 - CONFIDENCE, gained, n - gained + 1) if gained else 0.0)
    # no sample is both lost and gained: the more of one, the fewer of the other
    correlation = -np.sqrt(p * q / ((1 - p) * (1 - q))) if max(p, q) < 1 else 0.0
    return float(p - q + np.sqrt(above**2 - 2 * correlation * above * below + below**2))


def check_latency(
    original: Runnable | MNNSession,
    compressed: Runnable | MNNSession,
    feeds: Feeds,
    settings: RunSettings,
    rounds: int = 50,
) -> Latency:
    """Time both models in turn on `feeds`; a provider that left a whole model to the CPU is given no figure."""
    medians = ninetieths = ratios = [math.nan, math.nan, math.nan]
    if original.runs_there and compressed.runs_there:
        if isinstance(original, PartSession) and isinstance(compressed, PartSession):
            timing = time_in_parts(original, compressed, feeds)
        else:
            timing = time_pair(original, compressed, feeds, rounds=rounds, least=LEAST_SECONDS)
        times = timing.first_ms, timing.second_ms
        medians, ninetieths = ([float(np.percentile(ms, share)) for ms in times] for share in (50, 90))
        ratios = [timing.speedup, *timing.speedup_interval]
    sessions = {"original": original, "compressed": compressed}
    said = [f"{which}: {session.fallback}" for which, session in sessions.items() if session.fallback]
    if not (original.runs_there and compressed.runs_there):
        said.append(f"no time is given for {original.provider}{needs(original.provider)}")
    return Latency(
        provider=original.provider,
        threads=settings.threads,
        batch=next((len(v) for v in feeds.values() if np.ndim(v)), 1),
        original_ms=medians[0],
        compressed_ms=medians[1],
        original_p90_ms=ninetieths[0],
        compressed_p90_ms=ninetieths[1],
        speedup=ratios[0],
        speedup_low_95=ratios[1],
        speedup_high_95=ratios[2],
        placement=compressed.placement,
        original_placement=original.placement,
        fallback="; ".join(said),
    )

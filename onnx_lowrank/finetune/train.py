"""The loop: batches, steps, a look at the samples held out, a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnx_lowrank.finetune.augment import varied
from onnx_lowrank.finetune.losses import LabelLoss, cross_entropy, distances, hits
from onnx_lowrank.finetune.program import Program
from onnx_lowrank.finetune.samples import Samples, batches_of, shuffled
from onnx_lowrank.types import LowRankError, Progress

logger = logging.getLogger(__name__)

STEPS = 3000
"""Steps where no number of epochs is given."""

LOOKS = 25
"""How often the samples held out are looked at, about."""

PATIENCE = 0.5
"""Training ends where the samples held out saw nothing better for this share of it; the start apart, which a high rate upsets."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

LARGEST_STEP = 5.0
"""Gradients of a larger norm are scaled down to it: chains of factors have steep walls."""

KEPT = 64
"""Checkpoints of other trainings that stay."""

HASHED = 256
"""Samples that go into a checkpoint's name at a time."""

PRECISION = {"cuda": "bfloat16"}
"""Of products, by kind of device, where nothing is said; otherwise float32."""

Regularizer = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""``function(parameters) -> scalar`` that is added to the loss."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Parameters
    ----------
    labels
        Learn labels; otherwise the outputs of the original.
    epochs, steps
        None for as many epochs as make so many steps.
    batch, part
        Samples of a step, and how many of them run at a time (a model may fix that).
    distill
        Weight of the distance to the original's outputs where labels are learnt.
    features
        Weight of the distances at the ends of blocks, in distillation.
    blockwise
        Share of the epochs in which blocks learn one by one, each from the original's activations.
    batch_statistics
        BatchNormalization follows the batches.
    """

    labels: bool = False
    epochs: int | None = None
    steps: int = STEPS
    batch: int = 64
    part: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    distill: float = 1.0
    features: float = 0.5
    blockwise: float = 0.2
    augment: tuple[str, ...] = ()
    batch_statistics: bool = False
    precision: str | None = None
    """``float32`` or ``bfloat16`` products; None for the latter on cuda. Weights and sums are float32."""
    seed: int = 0
    keep_last: bool = False
    """End with the last weights, not with the best that the samples held out saw."""


@dataclass(frozen=True, order=True)
class Score:
    """What the samples held out say: the lower the better; `errors` first, the share of wrong labels, where there are any."""

    errors: float
    loss: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}" + (f", accuracy {1 - self.errors:.2%}" if self.errors else "")


@dataclass
class Run:
    """Where training is; what a checkpoint holds beside the tensors."""

    epoch: int = 0
    best_epoch: int = 0
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    """What `watch` gave at each look."""
    checkpoint: Path | None = None
    """The file that was kept."""
    skipped: int = 0
    """Steps whose gradient was not finite, and which were not taken."""

    @property
    def best(self) -> Score:
        return min(Score(errors, loss) for _, errors, loss in self.scores)


def train(
    student: Program,
    teacher: Program | None,
    samples: Samples,
    settings: Settings,
    *,
    ends: Sequence[str] = (),
    label_loss: LabelLoss = cross_entropy,
    regularizer: Regularizer | None = None,
    watch: Callable[[], float] | None = None,
    checkpoints: Path | None = None,
    salt: str = "",
    keep: bool = False,
    progress: Progress,
) -> Run:
    """Train the parameters of `student` in place, and leave it at the best that the samples held out saw, the start included.

    Parameters
    ----------
    student, teacher
        The compressed and the original network; no teacher where labels alone are learnt.
    samples
        One in eight is held out.
    ends
        Tensors of both networks at the ends of blocks.
    label_loss
        What is made small where labels are learnt.
    regularizer, watch
        Added to the loss; and a figure to note at each look.
    checkpoints
        A folder with a file for each training that was interrupted, which goes on from its last look at the samples held
        out. The file goes at the end unless it is to be kept for a longer work to go on from; the latest ``KEPT`` stay.
    salt
        Whatever else decides about the course of this training than weights, samples and settings.

    Returns
    -------
    Run
        The scores of every look; the first is that of the start.

    Raises
    ------
    LowRankError
        Where there are too few samples, or labels are missing.
    """
    trainer = _Trainer(student, teacher, samples, settings, tuple(ends), label_loss, regularizer, watch)
    key = trainer.key(salt) if checkpoints else ""
    checkpoint = checkpoints / f"{key[:24]}.pt" if checkpoints else None
    run = trainer.run(checkpoint, key, progress)
    if checkpoint is not None:
        if keep:
            run.checkpoint = checkpoint
        else:
            forget(checkpoint)
        _prune(checkpoint.parent)
    return run


def look(student: Program, teacher: Program, samples: Samples, part: int | None = None) -> Score:
    """How far a network is from the original on the samples held out, `part` of them at a time."""
    return _Trainer(student, teacher, samples, Settings(part=part), (), cross_entropy, None, None).score()


class _Trainer:
    def __init__(
        self,
        student: Program,
        teacher: Program | None,
        samples: Samples,
        settings: Settings,
        ends: tuple[str, ...],
        label_loss: LabelLoss,
        regularizer: Regularizer | None,
        watch: Callable[[], float] | None,
    ) -> None:
        if settings.labels:
            samples.require_labels()
        self._student, self._teacher, self._samples, self._settings = student, teacher, samples, settings
        self._ends, self._label_loss, self._regularizer, self._watch = ends, label_loss, regularizer, watch
        unit = settings.part or 1
        self._rows, self._held = (rows[: len(rows) // unit * unit] for rows in samples.split())
        if not len(self._rows) or not len(self._held):
            raise LowRankError(f"{len(samples)} samples are too few to train on: the model takes {unit} at a time")
        self._batch = min(max(settings.batch // unit, 1) * unit, len(self._rows))
        self._steps = batches_of(len(self._rows), self._batch)
        self._epochs = settings.epochs or max(1, math.ceil(settings.steps / self._steps))
        kernels = [p for p in student.parameters.values() if p.ndim > 1]
        vectors = [p for p in student.parameters.values() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        self._halved = (settings.precision or PRECISION.get(student.device.type)) == "bfloat16"
        # labels are judged by themselves
        self._wanted = [self._original(rows) for rows in self._looks()] if teacher and not settings.labels else []

    # --- what is looked at -------------------------------------------------------------------------------------------

    def _looks(self) -> list[np.ndarray]:
        size = self._settings.part or self._batch
        return [self._held[first : first + size] for first in range(0, len(self._held), size)]

    def _original(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        assert self._teacher is not None
        with torch.no_grad():
            made = self._teacher(self._teacher.tensors(self._samples.at(rows)[0]))
        return {name: value for name, value in made.items() if value.is_floating_point()}

    def score(self) -> Score:
        """The student on the samples held out."""
        total, wrong, count = 0.0, 0, 0
        with torch.no_grad():
            for index, rows in enumerate(self._looks()):
                feeds, labels = self._samples.at(rows)
                got = {name: value.float() for name, value in self._student(self._student.tensors(feeds)).items()}
                if self._settings.labels:
                    assert labels is not None
                    marks = torch.from_numpy(labels).to(self._student.device)
                    loss = self._label_loss(got, marks)
                    if self._label_loss is cross_entropy:
                        wrong += len(rows) - int(hits(got, marks))
                else:
                    loss = distances(got, self._wanted[index])
                total += float(loss) * len(rows)
                count += len(rows)
        mean = total / count
        return Score(wrong / count, mean if math.isfinite(mean) else math.inf)

    # --- steps -------------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Path | None, key: str, progress: Progress) -> Run:
        """All epochs that are left."""
        best, run = self._student.state(), Run()
        resumed = _load(checkpoint, key) if checkpoint else None
        if resumed is None:
            start = self.score()
            self._note(run, start)
        else:
            scores = [tuple(score) for score in resumed["scores"]]
            run = Run(resumed["epoch"], resumed["best_epoch"], scores, resumed["watched"], None, resumed["skipped"])
            best = resumed["best"]
            self._student.restore(resumed["student"])
            self._optimizer.load_state_dict(resumed["optimizer"])
            logger.info("training goes on after epoch %d", run.epoch)
        every = max(1, self._epochs // LOOKS)
        total = self._epochs * self._steps
        for epoch in range(run.epoch, self._epochs):
            if self._over(run):
                break
            rows = shuffled(self._rows, self._batch, [self._settings.seed, 1, epoch])
            for number, batch in enumerate(rows):
                run.skipped += not self._step(epoch, epoch * self._steps + number, total, batch)
                progress(f"finetune: {run.best}", epoch * self._steps + number + 1, total)
            run.epoch = epoch + 1
            if run.epoch % every and run.epoch != self._epochs:
                continue
            score, previous = self.score(), run.best
            self._note(run, score)
            logger.info("epoch %d of %d: %s", run.epoch, self._epochs, score)
            if score < previous or self._settings.keep_last:
                best, run.best_epoch = self._student.state(), run.epoch
            if checkpoint:
                _save(checkpoint, key, run, best, self._student.state(), self._optimizer.state_dict())
        self._student.restore(best)
        progress("finetune", total, total)
        return run

    def _over(self, run: Run) -> bool:
        """Whether nothing got better for too long; the start apart."""
        if len(run.scores) < 2:
            return False
        latest, *_ = min(run.scores[1:], key=lambda look: look[1:])
        return run.scores[-1][2] == math.inf or run.epoch - latest > PATIENCE * self._epochs

    def _note(self, run: Run, score: Score) -> None:
        run.scores.append((run.epoch, score.errors, score.loss))
        if self._watch is not None:
            run.watched.append(self._watch())

    def _step(self, epoch: int, number: int, total: int, rows: np.ndarray) -> bool:
        """One step; False where its gradient is not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * _schedule(number / total)
        self._optimizer.zero_grad(set_to_none=True)
        size = self._settings.part or len(rows)
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        rng = np.random.default_rng([self._settings.seed, 2, number])
        for part in parts:
            (self._loss(part, epoch, rng) / len(parts)).backward()
        if self._regularizer is not None:
            self._regularizer(self._student.parameters).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._student.parameters.values(), LARGEST_STEP)
        finite = bool(torch.isfinite(norm))
        if finite:
            self._optimizer.step()
        return finite

    def _loss(self, rows: np.ndarray, epoch: int, rng: np.random.Generator) -> torch.Tensor:
        settings, student = self._settings, self._student
        feeds, labels = self._samples.at(rows)
        given = varied(student.tensors(feeds, channels_last=self._halved), settings.augment, rng)
        blockwise = not settings.labels and bool(self._ends) and epoch < settings.blockwise * self._epochs
        wanted: dict[str, torch.Tensor] = {}
        with self._precision():
            if self._teacher is not None:
                with torch.no_grad():
                    wanted = self._teacher(given, keep=self._ends)
            features = {name: wanted[name] for name in self._ends if name in wanted}
            got = student(
                given,
                keep=() if blockwise else tuple(features),
                instead=features if blockwise else None,
                batch_statistics=settings.batch_statistics,
            )
        outputs = {n: wanted[n].float() for n in student.outputs if n in wanted and wanted[n].is_floating_point()}
        loss = torch.zeros((), device=student.device)
        if settings.labels:
            assert labels is not None
            marks = torch.from_numpy(labels).to(student.device)
            loss = self._label_loss({name: got[name].float() for name in student.outputs}, marks)
            return loss + settings.distill * distances(got, outputs) if outputs else loss
        if blockwise:
            return distances(got, {**features, **outputs})
        loss = distances(got, outputs)
        return loss + settings.features * distances(got, features) if features else loss

    def _precision(self) -> Any:
        return torch.autocast(self._student.device.type, dtype=torch.bfloat16) if self._halved else nullcontext()

    def key(self, salt: str) -> str:
        """Names all that decides about the course of this training."""
        digest = hashlib.sha256(repr((self._settings, self._epochs, self._ends, torch.__version__, salt)).encode())
        arrays = {**self._student.values(), **self._samples.arrays}
        for name, array in arrays.items():
            digest.update(name.encode() + repr((array.dtype.str, array.shape)).encode())
            for first in range(0, max(len(array) if array.ndim else 1, 1), HASHED):
                part = array[first : first + HASHED] if array.ndim else array
                digest.update(np.ascontiguousarray(part).tobytes())
        if self._samples.labels is not None:
            digest.update(np.ascontiguousarray(self._samples.labels).tobytes())
        return digest.hexdigest()


def _schedule(share: float) -> float:
    """Of the learning rate: a rise, then half a cosine down to nothing."""
    if share < WARM_UP:
        return (share + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _save(
    path: Path,
    key: str,
    run: Run,
    best: Mapping[str, torch.Tensor],
    student: Mapping[str, torch.Tensor],
    optimizer: Any,
) -> None:
    """Write a checkpoint whole or not at all; where it cannot be written, training goes on without."""
    held = {
        "key": key,
        "epoch": run.epoch,
        "best_epoch": run.best_epoch,
        "scores": run.scores,
        "watched": run.watched,
        "skipped": run.skipped,
        "best": dict(best),
        "student": dict(student),
        "optimizer": optimizer,
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(held, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        logger.warning("no checkpoint can be written to %s (%s): an interrupted run begins anew", path.parent, error)


def _load(path: Path, key: str) -> dict[str, Any] | None:
    """A checkpoint of this very training; None where there is none. Only tensors and numbers are read, no code."""
    if not path.is_file():
        return None
    try:
        held: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:
        logger.warning("%s is no checkpoint (%s): training begins anew", path, error)
        return None
    return held if held.get("key") == key else None


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint, where it is there."""
    with suppress(OSError):
        checkpoint.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    """Remove all but the latest checkpoints."""
    with suppress(OSError):  # another run may remove them too
        for path in sorted(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
            forget(path)

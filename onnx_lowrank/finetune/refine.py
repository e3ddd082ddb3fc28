"""A compressed model trained towards the original, or towards labels, as the user's options say."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onnx_lowrank.config import Config
from onnx_lowrank.data import load_function
from onnx_lowrank.data.dataset import Dataset, fixed_batch
from onnx_lowrank.finetune.augment import augmentations
from onnx_lowrank.finetune.blocks import block_ends
from onnx_lowrank.finetune.losses import LabelLoss, cross_entropy, orthogonality
from onnx_lowrank.finetune.program import Program, weights_of
from onnx_lowrank.finetune.samples import read_samples
from onnx_lowrank.finetune.train import Run, Settings, forget, look, train
from onnx_lowrank.graph.model import Model, serialize
from onnx_lowrank.graph.plain import PlainGraph, plain_graph, with_values
from onnx_lowrank.quantize.rounding import Rounding
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.types import LowRankError, Progress

AGREEMENT = 1e-2
"""Largest difference to ONNX Runtime, relative to the largest output, with which a program is taken for the model."""

FEW = 8
"""Samples that a normalisation takes its statistics from at least, where nothing was said."""

DISTILL_RATE, LABELS_RATE = 3e-4, 1e-3
"""Highest learning rates where none is given. Chains that were fitted to data are near an optimum, which a high one upsets."""


@dataclass(frozen=True)
class Refined:
    """A trained model, and what the samples held out said on the way."""

    model: Model
    run: Run

    @property
    def note(self) -> str:
        """What came of it, in a line."""
        (_, *start), best = self.run.scores[0], self.run.best
        skipped = f"; {self.run.skipped} step(s) were not taken: no finite gradient" if self.run.skipped else ""
        if not self.run.best_epoch:
            return f"training made nothing better on the samples held out: the model is as it was before{skipped}"
        was = f", accuracy from {1 - start[0]:.4f} to {1 - best.errors:.4f}" if start[0] else ""
        epochs = f"{self.run.epoch} epoch{'s' * (self.run.epoch > 1)}"
        return (
            f"trained for {epochs}: loss on the samples held out from {start[1]:.4g} to {best.loss:.4g}{was}{skipped}"
        )


def _guarded(name: str) -> LabelLoss:
    """The user's own loss, whose errors are told as such."""
    function = load_function(name)

    def guarded(outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        try:
            loss = function(outputs, labels)
        except Exception as error:
            raise LowRankError(f"loss {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise LowRankError(
                f"loss {name} returned {type(loss).__name__}: a torch tensor with one number was expected"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise LowRankError(
                f"loss {name} has no gradient: it has to be computed by torch from the outputs, smoothly"
            )
        return loss

    return guarded


def _text_of(loss: str | None) -> str:
    """What the user's own loss says, and not only what it is called."""
    return "" if loss is None else Path(loss.rpartition(":")[0]).read_text(encoding="utf-8")


class Refiner:
    """Trains models with one set of samples, which is read once.

    Parameters
    ----------
    original
        What is learnt from.
    data
        Samples; with labels where those are learnt.
    config
        See :class:`~onnx_lowrank.config.Config`.
    folder
        For samples that do not fit into memory.
    checkpoints
        Where an interrupted run leaves what it had; None for nowhere.
    fitted
        Whether models come fitted to samples, layer after layer: their blocks need not learn one by one then.

    Raises
    ------
    LowRankError
        For data or options that cannot be used, and models that cannot be trained.
    """

    def __init__(
        self,
        original: Model,
        data: Dataset,
        config: Config,
        folder: Path,
        checkpoints: Path | None,
        progress: Progress,
        *,
        fitted: bool = False,
    ) -> None:
        if config.device != "cpu" and not torch.cuda.is_available():
            raise LowRankError(f"device {config.device} was given: torch finds no such device here; leave out --device")
        self._config, self._progress, self._checkpoints = config, progress, checkpoints
        self._fitted = fitted
        self._labels = config.finetune == "labels"
        self._samples = read_samples(data, folder)
        self._part = fixed_batch(data.inputs)
        self._graph = plain_graph(original)
        self._teacher = Program(self._graph, device=config.device)
        if self._labels:
            self._samples.require_labels()
        self.settings()  # names that are none are told before the work
        content = serialize(original)
        self._check(self._teacher, content, original.folder)
        words = repr((config.loss, _text_of(config.loss), config.finetune, config.device))
        self._salt = hashlib.sha256(content + words.encode()).hexdigest()
        self._left: set[Path] = set()
        self._loss: LabelLoss = cross_entropy if config.loss is None else _guarded(config.loss)

    def refine(
        self,
        model: Model,
        touched: Collection[str],
        *,
        settings: Settings | None = None,
        orthogonal: Collection[str] = (),
        weight: float = 0.0,
        rounding: Rounding | None = None,
    ) -> Refined:
        """Train `model`, whose nodes called `touched` are new.

        The result is never worse on the samples held out than what was given, unless the settings keep the last weights.

        Parameters
        ----------
        orthogonal, weight
            Names of factors to keep orthogonal, and what their distance from it counts; see
            :func:`onnx_lowrank.finetune.losses.orthogonality`.
        rounding
            What the quantised form of `model` rounds: it is trained as if it were that.
        """
        graph = plain_graph(model)
        # rounding changes everything, and names with it
        trained = weights_of(graph) if rounding else self._trained(graph, touched)
        student = Program(graph, trained, device=self._config.device)
        content = serialize(model)
        self._check(student, content, model.folder)
        if rounding:
            student = Program(graph, student.parameters, device=self._config.device, rounding=rounding)
        settings = settings or self.settings()
        factors = [student.parameters[name] for name in orthogonal]
        run = train(
            student,
            self._teacher if not settings.labels or settings.distill else None,
            self._samples,
            settings,
            ends=() if settings.labels else block_ends(self._graph, graph),
            label_loss=self._loss,
            regularizer=(lambda parameters: weight * orthogonality(factors)) if factors and weight else None,
            watch=(lambda: float(orthogonality(factors).detach())) if factors else None,
            checkpoints=self._checkpoints,
            salt=f"{self._salt} {hashlib.sha256(content).hexdigest()} {sorted(orthogonal)} {weight} {rounding}",
            keep=True,
            progress=self._progress,
        )
        if run.checkpoint:
            self._left.add(run.checkpoint)
        return Refined(with_values(model, student.values()) if run.best_epoch else model, run)

    def distance(self, model: Model) -> float:
        """How far the outputs of `model` are from the original's, as a share of their energy, on the samples held out."""
        program = Program(plain_graph(model), device=self._config.device)
        return look(program, self._teacher, self._samples, self._part).loss

    def close(self) -> None:
        """Let go of what an interrupted run would have gone on from."""
        for path in self._left:
            forget(path)

    def settings(self) -> Settings:
        """What the options say; pictures are not varied where labels cannot follow, nor few samples normalised together."""
        config = self._config
        labels = self._samples.labels
        names = config.augment
        if names is None and self._labels and (config.loss is not None or labels is None or labels.ndim != 1):
            names = ("none",)
        enough = self._part is None or self._part >= FEW
        return Settings(
            labels=self._labels,
            epochs=config.epochs,
            batch=config.train_batch,
            part=self._part,
            learning_rate=config.learning_rate or (LABELS_RATE if self._labels else DISTILL_RATE),
            blockwise=0.0 if self._fitted else Settings.blockwise,
            augment=augmentations(names, labelled=self._labels),
            batch_statistics=(self._labels and enough) if config.batch_statistics is None else config.batch_statistics,
            precision=config.precision,
            seed=config.seed,
        )

    def _trained(self, graph: PlainGraph, touched: Collection[str]) -> Sequence[str]:
        """Names of the tensors to train: all weights, those of new nodes, or those that a pattern names."""
        chosen: dict[str, None] = {}
        for pattern in self._config.trained:
            if pattern in ("all", "touched"):
                found: Sequence[str] = weights_of(graph, None if pattern == "all" else touched)
            else:
                found = [name for name in weights_of(graph) if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                raise LowRankError(f"nothing to train: '{pattern}' names no weight of the compressed model")
            chosen |= dict.fromkeys(found)
        return tuple(chosen)

    def _check(self, program: Program, content: bytes, folder: Path) -> None:
        """See that the program is the serialised model: nothing is trained that ONNX Runtime runs otherwise."""
        feeds, _ = self._samples.at(np.arange(self._part or min(2, len(self._samples))))
        expected = Session(content, RunSettings(optimize=False), folder=folder).run(feeds)
        with torch.no_grad():
            got = program(program.tensors(feeds))
        if not self._labels and not any(got[name].is_floating_point() for name in program.outputs):
            raise LowRankError(
                "no output of the model is of floating point: there is nothing to distill, give --finetune labels"
            )
        for name, value in zip(program.outputs, expected, strict=True):
            mine = got[name].cpu().numpy()
            size = np.abs(value.astype(np.float64)).max() if value.size else 0.0
            same = mine.shape == value.shape and np.allclose(mine, value, rtol=0, atol=AGREEMENT * size + 1e-6)
            if not same:
                raise LowRankError(
                    f"output '{name}' comes out otherwise than in ONNX Runtime: please report this; leave out --finetune"
                )

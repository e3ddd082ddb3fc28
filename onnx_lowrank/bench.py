"""Where plans are carried out and measured: files in a scratch folder, the original beside each attempt."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_lowrank.calibrate import Batch
from onnx_lowrank.config import Config
from onnx_lowrank.data import load_function
from onnx_lowrank.finetune import require_torch
from onnx_lowrank.graph.check import check_model
from onnx_lowrank.graph.constants import external_place
from onnx_lowrank.graph.find import model_cost
from onnx_lowrank.graph.model import Model, all_graphs, load
from onnx_lowrank.graph.save import save
from onnx_lowrank.planner import Planner
from onnx_lowrank.report.data import Size
from onnx_lowrank.rewrite import LayerReport
from onnx_lowrank.runtime import RunSettings, Session, give_back_memory
from onnx_lowrank.sensitivity import difference
from onnx_lowrank.subject import open_config_data, shapes_of
from onnx_lowrank.timings import cache_folder
from onnx_lowrank.types import LowRankError, Plan
from onnx_lowrank.verify import (
    Accuracy,
    Batches,
    CustomMetric,
    Latency,
    Outputs,
    check_accuracy,
    check_latency,
    check_outputs,
    find_metric,
    first_feeds,
)

if TYPE_CHECKING:
    from onnx_lowrank.finetune.refine import Refiner

EVALUATION_BATCH = 32
"""Samples run at a time; no figure depends on it."""

RANDOM_SAMPLES = 8
"""Made up where no data is given, to see at least that the result runs and stays near the original."""

UNFITTED = (
    "on the samples held out, layers fitted to the others did worse than the weights alone, which were kept: give more "
    "calibration samples"
)

LARGE = 1 << 26
"""Models of more bytes than this wait on disk while they are measured, not in memory."""


@dataclass(frozen=True)
class _Placed:
    """A model where a session can load it; in memory too where it is small."""

    path: Path
    size: Size
    model: Model | None


@dataclass(frozen=True)
class Attempt:
    """One plan carried out and measured; `model` is None where it is only at `path`."""

    plan: Plan
    model: Model | None
    path: Path
    layers: tuple[LayerReport, ...]
    size: Size
    accuracy: Accuracy


class Bench:
    """Measures attempts against the original, which stays in a session all along."""

    def __init__(self, planner: Planner, folder: Path) -> None:
        self.planner = planner
        self._folder = folder
        self._settings = RunSettings(planner.config.provider, planner.config.threads)
        self._count = 0
        subject = planner.subject
        # the file as given where there is one: what users run, and read from disk only once
        given = subject.model.path
        self._path = given or self._write(subject.model)
        self._original: Session | None = None
        self._tested: tuple[Path, Session] | None = None
        self._latencies: dict[Path, Latency] = {}
        self._held: tuple[list[Batch], list[Outputs]] | None = None
        # what ONNX Runtime cannot load or run is told before the work; this session goes again, for its memory
        check_outputs(Session(self._path, self._settings).run(subject.feeds()))
        self._objection = check_model(self._path)
        files = {given, *_data_files(subject.model)} if given else self._path.parent.iterdir()
        self.original = Size(subject.cost.macs, subject.cost.params, _bytes(files))
        self._data = open_config_data("evaluate", subject.inputs, planner.config) or open_config_data(
            "calibrate", subject.inputs, planner.config
        )
        self.notes: tuple[str, ...] = ()
        if self._data is None:
            self.notes += (
                "no data was given: outputs were compared on random inputs, which says little about accuracy; "
                "give --evaluate DATA",
            )
        self._metric = _metric(planner.config)
        self.refiner = self._open_refiner()

    def _open_refiner(self) -> Refiner | None:
        """What trains attempts, where they are to be trained: bad samples are told before the work."""
        config, subject = self.planner.config, self.planner.subject
        if config.finetune == "none":
            return None
        require_torch()
        from onnx_lowrank.finetune.refine import Refiner

        data = open_config_data("train", subject.inputs, config) or open_config_data(
            "calibrate", subject.inputs, config
        )
        assert data is not None  # the options say so
        cache = cache_folder()
        checkpoints = cache / "training" if cache else None
        with self.planner.stage("finetune"):
            fitted, progress = self.planner.fits, self.planner.progress
            return Refiner(subject.model, data, config, self._folder, checkpoints, progress, fitted=fitted)

    @property
    def _session(self) -> Session:
        """The original, from the first measurement on."""
        if self._original is None:
            self._original = Session(self._path, self._settings)
        return self._original

    def _session_of(self, path: Path) -> Session:
        """A model under test; the one before it goes."""
        if path == self._path:
            return self._session
        if self._tested is None or self._tested[0] != path:
            self._tested = None
            give_back_memory()
            self._tested = path, Session(path, self._settings)
        return self._tested[1]

    def attempt(self, plan: Plan, *others: Plan) -> Attempt:
        """Carry out `plan` and measure what comes out; of several, what stays nearest to the original.

        With calibration samples, the plan by the weights alone is one of them: no fit makes a model worse than that on
        the samples held out.
        """
        fitted = self.planner.fits and any(not choice.dense for choice in plan.choices)
        variants = [(each, self.planner.fits) for each in (plan, *others)] + (
            [(plan.with_notes(UNFITTED), False)] if fitted else []
        )
        made = []
        for each, fit in variants:
            model, layers = self.planner.carry_out(each, fit=fit)
            placed = self._place(model)
            del model  # a large one is on disk now, and two sessions are about to need the memory
            made.append((self._difference(placed.path) if len(variants) > 1 else 0.0, placed, each, layers))
        _, placed, chosen, layers = min(made, key=lambda item: item[0])
        return self._measure(placed, chosen, layers)

    def tuned(self, attempt: Attempt) -> Attempt:
        """`attempt` trained as the options say, and measured again; its time is that of the same nodes before.

        Raises
        ------
        LowRankError
            For samples that cannot be trained on, or a model without gradients.
        """
        if self.refiner is None or not attempt.layers:
            return attempt
        touched = [node for layer in attempt.layers for node in layer.nodes]
        with self.planner.stage("finetune"):
            refined = self.refiner.refine(attempt.model or load(attempt.path), touched)
        placed = self._place(self.planner.finished(refined.model))
        if attempt.path in self._latencies:
            self._latencies[placed.path] = self._latencies[attempt.path]
        return self._measure(placed, attempt.plan.with_notes(refined.note), attempt.layers)

    def _difference(self, path: Path) -> float:
        """How far the outputs of a model are from the original's, on the samples that no layer was fitted to."""
        with self.planner.stage("verify"):
            if self._held is None:
                held = self.planner.apart()
                self._held = held, [self._session.run(batch) for batch in held]
            held, reference = self._held
            session = self._session_of(path)
            return difference([session.run(batch) for batch in held], reference)

    def measure(self, model: Model, plan: Plan, layers: tuple[LayerReport, ...]) -> Attempt:
        """Check a model against the original.

        Raises
        ------
        LowRankError
            Where ONNX or ONNX Runtime refuses it, or it returns something else than the original.
        """
        return self._measure(self._place(model), plan, layers)

    def _place(self, model: Model) -> _Placed:
        subject = self.planner.subject
        path = self._path if model is subject.model else self._write(model)
        with self.planner.stage("verify"):
            objection = check_model(path)
        if objection and not self._objection:
            raise LowRankError(f"the rewritten model is not valid, please report this: {objection}")
        cost, _ = model_cost(model, shapes_of(model, subject.inputs, subject.sample_shapes))
        size = self.original.size_bytes if path == self._path else _bytes(path.parent.iterdir())
        keep = size < LARGE or path == self._path or bool(_data_files(model))
        return _Placed(path, Size(cost.macs, cost.params, size), model if keep else None)

    def _measure(self, placed: _Placed, plan: Plan, layers: tuple[LayerReport, ...]) -> Attempt:
        path = placed.path
        give_back_memory()
        with self.planner.stage("verify"):
            original, session = self._session, self._session_of(path)
            if session.outputs != original.outputs:
                raise LowRankError("the two models have different outputs: two versions of one model were expected")
            name, metric = self._metric
            accuracy = check_accuracy(original, session, self._batches(), name, metric)
        return Attempt(plan, placed.model, path, layers, placed.size, accuracy)

    def model_of(self, attempt: Attempt) -> Model:
        """The model of an attempt, after which nothing more is measured: the sessions make room for it."""
        self._original = self._tested = None
        if attempt.model is not None:
            return attempt.model
        return replace(load(attempt.path), path=self.planner.subject.model.path)

    def latency(self, attempt: Attempt) -> Latency:
        """Time an attempt against the original, once."""
        if attempt.path not in self._latencies:
            self._latencies[attempt.path] = self._time(attempt)
        return self._latencies[attempt.path]

    def _time(self, attempt: Attempt) -> Latency:
        config, subject = self.planner.config, self.planner.subject
        feeds = (
            subject.feeds(config.batch_size)
            if self._data is None
            else first_feeds(self._data.batches(config.batch_size))
        )
        with self.planner.stage("latency"):
            return check_latency(self._session, self._session_of(attempt.path), feeds, self._settings)

    def _batches(self) -> Batches:
        progress = self.planner.progress
        if self._data is None:
            for number in range(RANDOM_SAMPLES):
                yield self.planner.subject.feeds(1, seed=number), None
            return
        total, done = self._data.samples or 0, 0
        for feeds, labels in self._data.batches(EVALUATION_BATCH):
            yield feeds, labels
            done += EVALUATION_BATCH
            progress("verify", min(done, total or done), total or done)

    def _write(self, model: Model) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        save(model, folder / "model.onnx")
        return folder / "model.onnx"


@contextmanager
def open_bench(planner: Planner) -> Iterator[Bench]:
    """A bench with a scratch folder, which goes when the work is done."""
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        bench = Bench(planner, Path(folder))
        yield bench
        if bench.refiner is not None:  # all is done: nothing to go on from
            bench.refiner.close()


def _metric(config: Config) -> tuple[str | None, CustomMetric | None]:
    """Name of the metric, and the function where it is the user's own."""
    if config.metric is None:
        return None, None
    if ".py:" not in config.metric:
        find_metric(config.metric)
        return config.metric, None
    name, function = config.metric, load_function(config.metric)

    def guarded(outputs: Outputs, labels: np.ndarray | None) -> float:
        try:
            figure: float = function(outputs, labels)
            return figure
        except Exception as error:
            raise LowRankError(f"metric {name} raised {type(error).__name__}: {error}") from error

    return name, guarded


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _data_files(model: Model) -> set[Path]:
    """The files that a model's external tensors are in."""
    tensors = (tensor for graph in all_graphs(model.graph) for tensor in graph.initializer)
    return {external_place(tensor, model.folder)[0] for tensor in tensors if tensor.data_location}

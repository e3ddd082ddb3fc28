"""Where plans are carried out and measured: files in a scratch folder, the original beside each attempt."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_lowrank.cache import cache_folder
from onnx_lowrank.calibration.calibrate import Batch
from onnx_lowrank.calibration.sensitivity import difference
from onnx_lowrank.config import Config
from onnx_lowrank.data import load_function
from onnx_lowrank.data.feeds import first_feeds
from onnx_lowrank.files import scratch_folder
from onnx_lowrank.finetune import require_torch
from onnx_lowrank.graph.check import check_model
from onnx_lowrank.graph.constants import external_place
from onnx_lowrank.graph.datafile import is_large
from onnx_lowrank.graph.find import model_cost
from onnx_lowrank.graph.model import Model, all_graphs, load
from onnx_lowrank.graph.save import save
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.quantize import Choice, choose, measure_ranges, prepared
from onnx_lowrank.quantize.rounding import rounding_of
from onnx_lowrank.report.data import Size, Step, TargetResult
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.runtime import RunSettings, Session, open_session, time_pair
from onnx_lowrank.subject import open_config_data, shapes_of
from onnx_lowrank.targets import Target
from onnx_lowrank.types import LowRankError, Plan
from onnx_lowrank.verification.metrics import CustomMetric, Outputs, find_metric
from onnx_lowrank.verification.parts import PART_BYTES, PartSession
from onnx_lowrank.verification.verify import (
    Accuracy,
    Batches,
    Latency,
    Runnable,
    check_accuracy,
    check_latency,
    check_outputs,
)
from onnx_lowrank.work.memory import give_back_memory
from onnx_lowrank.work.parallel import end_processes

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

ROUNDED_SHARE = 0.25
"""Of the training of a model, that it gets once more through the rounding of its quantised form."""

QUICK_SECONDS, QUICK_LEAST = 2.0, 0.5
"""That one way to quantise a model is timed for, at most and at least."""

IN_PARTS = (
    f"the model is too large to be in memory: it was run and timed in parts of up to {PART_BYTES >> 20} MB of weights, or one "
    f"node; accuracy is that of the whole, times are sums over the parts, without what a runtime fuses across their ends"
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
    source: _Placed | None = None
    """What it was before it was quantised."""
    choice: Choice | None = None
    """How it was quantised."""


class Bench:
    """Measures attempts against the original, which stays in a session all along."""

    def __init__(self, planner: Planner, folder: Path) -> None:
        self.planner = planner
        self._folder = folder
        self._count = 0
        subject, config = planner.subject, planner.config
        self._settings = subject.settings(config)
        # the file as given where there is one: what users run, and read from disk only once
        given = subject.given.path
        self._path = given or self._write(subject.given)
        self._original: Runnable | None = None
        self._tested: tuple[Path, Runnable] | None = None
        self._latencies: dict[Path, Latency] = {}
        self._steps: list[tuple[Path, Step]] = []
        self._held: tuple[list[Batch], list[Outputs]] | None = None
        # what ONNX Runtime cannot load or run is told before the work; this session goes again, for its memory
        self._batch = config.batch_size if config.accelerated else 1
        self._in_parts = is_large(subject.model) and not _needs_whole(config, planner.target)
        first = self._open(self._path)
        check_outputs(first.run(subject.feeds(self._batch)))
        if config.needs_latency and not isinstance(first, PartSession):
            first.check_times()
        del first
        self._engine = planner.engine
        self._objection = check_model(self._path)
        files = {given, *_data_files(subject.given)} if given else self._path.parent.iterdir()
        self.original = Size(subject.cost.macs, subject.cost.params, _bytes(files))
        inputs = subject.measured_inputs(config)
        self._data = open_config_data("evaluate", inputs, config) or open_config_data("calibrate", inputs, config)
        self.notes: tuple[str, ...] = ()
        if self._data is None:
            self.notes += (
                "no data was given: outputs were compared on random inputs, which says little about accuracy; "
                "give --evaluate DATA",
            )
        if self._data is not None and self._data.left_out:
            self.notes += (
                f"the last {self._data.left_out} samples of {self._data.name} fill no batch and were left out",
            )
        if self._in_parts:
            self.notes += (IN_PARTS,)
        self._metric = _metric(config)
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
            fitted, progress = self.planner.fitting.wanted, self.planner.progress
            return Refiner(subject.model, data, config, self._folder, checkpoints, progress, fitted=fitted)

    def _open(self, path: Path) -> Runnable:
        """A model ready to run, in parts where it is not to be in memory."""
        return PartSession(load(path), self._settings) if self._in_parts else open_session(path, self._settings)

    @property
    def _session(self) -> Runnable:
        """The original, from the first measurement on."""
        if self._original is None:
            self._original = self._open(self._path)
        return self._original

    def _session_of(self, path: Path) -> Runnable:
        """A model under test; the one before it goes."""
        if path == self._path:
            return self._session
        if self._tested is None or self._tested[0] != path:
            self._tested = None
            give_back_memory()
            self._tested = path, self._open(path)
        return self._tested[1]

    def attempt(self, plan: Plan, *others: Plan) -> Attempt:
        """Carry out `plan` and measure what comes out; of several, what stays nearest to the original.

        With calibration samples, the plan by the weights alone is one of them: no fit makes a model worse than that on
        the samples held out.

        Raises
        ------
        LowRankError
            Where a drop is to be held on samples that the original itself only guesses on.
        """
        plans = [self.planner.on_target(each) for each in (plan, *others)]
        plan = plans[0]
        fitting = self.planner.fitting
        fitted = fitting.wanted and any(fitting.fits(c.decomposition, c.layers) for c in plan.choices if not c.dense)
        variants = [(each, fitting.wanted) for each in plans] + ([(plan.with_notes(UNFITTED), False)] if fitted else [])
        made = []
        for each, fit in variants:
            model, layers = self.planner.carry_out(each, fit=fit)
            placed = self._place(model)
            del model  # a large one is on disk now, and two sessions are about to need the memory
            made.append((self._difference(placed.path) if len(variants) > 1 else 0.0, placed, each, layers))
        _, placed, chosen, layers = min(made, key=lambda item: item[0])
        attempt = self._measure(placed, chosen, layers)
        if self.planner.config.max_drop is not None and attempt.accuracy.guesswork:
            raise LowRankError(
                f"max_drop cannot be held on these samples: {attempt.accuracy.guesswork}; mend them, or hold it on "
                f"--metric agreement, which needs no labels"
            )
        return attempt

    def parts(self, attempt: Attempt) -> tuple[TargetResult, ...]:
        """How the target would cut the original and an attempt; nothing where that cannot be told without it."""
        target, placement = self.planner.target, self.planner.placement
        if target.ops is None:
            return ()
        with self.planner.stage("partitions"):
            before, after = placement.before, placement.of(self._loaded(attempt))
        return (TargetResult(target.name, {"before": before, "after": after}),) if before and after else ()

    def tuned(self, attempt: Attempt) -> Attempt:
        """`attempt` trained as the options say, and measured again; its time is that of the same nodes before.

        Raises
        ------
        LowRankError
            For samples that cannot be trained on, or a model without gradients.
        """
        if self.refiner is None:
            return attempt
        if not attempt.layers:
            return self._rounded(attempt) if attempt.choice else attempt
        touched = [node for layer in attempt.layers for node in layer.nodes]
        given = attempt.source or attempt
        with self.planner.stage("finetune"):
            refined = self.refiner.refine(self._loaded(given), touched)
        placed = self._place(self.planner.finished(refined.model))
        if attempt.path in self._latencies:
            self._latencies[placed.path] = self._latencies[attempt.path]
        tuned = self._measure(placed, attempt.plan.with_notes(refined.note), attempt.layers)
        return self._rounded(tuned) if tuned.choice else tuned

    def _rounded(self, attempt: Attempt) -> Attempt:
        """A quantised `attempt` trained once more, through its rounding; the better of both."""
        assert self.refiner is not None and attempt.choice is not None
        choice, settings = attempt.choice, self.refiner.settings()
        few = max(1, round(ROUNDED_SHARE * settings.epochs)) if settings.epochs else None
        settings = replace(settings, epochs=few, steps=round(ROUNDED_SHARE * settings.steps), batch_statistics=False)
        with self.planner.stage("finetune"):
            rounding = rounding_of(choice.given, choice.model)
            refined = self.refiner.refine(choice.given, (), settings=settings, rounding=rounding)
        better = choice.of(refined.model)
        path = self._write(better.model)
        size = replace(attempt.size, size_bytes=_bytes(path.parent.iterdir()))
        plan = attempt.plan.with_notes(f"through the rounding of INT8, {refined.note}")
        made = self._measured(_Placed(path, size, better.model), plan, attempt.layers)
        return replace(made, source=attempt.source, choice=better)

    def _difference(self, path: Path) -> float:
        """How far the outputs of a model are from the original's, on the samples that no layer was fitted to."""
        with self.planner.stage("verify"):
            if self._held is None:
                held = self.planner.fitting.apart()
                original = self._any_size(self._path)
                self._held = held, [original.run(batch) for batch in held]
            held, reference = self._held
            session = self._any_size(path)
            return difference([session.run(batch) for batch in held], reference)

    def _any_size(self, path: Path) -> Runnable:
        """A model in a session that takes batches of any size."""
        return (
            Session(path, RunSettings(threads=self._settings.threads))
            if self._settings.sizes
            else self._session_of(path)
        )

    def measure(self, model: Model, plan: Plan, layers: tuple[LayerReport, ...], path: Path | None = None) -> Attempt:
        """Check a model against the original.

        Parameters
        ----------
        path
            The file that it is in already, where it is in one.

        Raises
        ------
        LowRankError
            Where ONNX or ONNX Runtime refuses it, or it returns something else than the original.
        """
        return self._measure(self._place(model, path), plan, layers)

    def _place(self, model: Model, given: Path | None = None) -> _Placed:
        subject = self.planner.subject
        path = given or (self._path if model is subject.given else self._write(model))
        with self.planner.stage("verify"):
            objection = check_model(path)
        if objection and not self._objection:
            raise LowRankError(f"the rewritten model is not valid, please report this: {objection}")
        if path == self._path:
            return _Placed(path, self.original, model)
        cost, _ = model_cost(model, shapes_of(model, subject.inputs, subject.sample_shapes))
        size = _bytes({path, *_data_files(model)} if given else path.parent.iterdir())
        keep = size < LARGE or bool(_data_files(model))
        if self._folder in model.folder.parents:  # its data are in the file that was just written, as they are to be
            shutil.rmtree(model.folder)
            keep = False
        return _Placed(path, Size(cost.macs, cost.params, size), model if keep else None)

    def _measure(self, placed: _Placed, plan: Plan, layers: tuple[LayerReport, ...]) -> Attempt:
        if self.planner.config.quantize == "none":
            return self._measured(placed, plan, layers)
        choice, quantized = self._quantized(placed)
        made = self._measured(quantized, plan.with_notes(choice.note), layers)
        return replace(made, source=placed, choice=choice)

    def _measured(self, placed: _Placed, plan: Plan, layers: tuple[LayerReport, ...]) -> Attempt:
        path = placed.path
        if self._in_parts:
            end_processes()
        give_back_memory()
        with self.planner.stage("verify"):
            original, session = self._session, self._session_of(path)
            if session.outputs != original.outputs:
                raise LowRankError("the two models have different outputs: two versions of one model were expected")
            name, metric = self._metric
            source = self._data.name if self._data else ""
            accuracy = check_accuracy(original, session, self._batches(), name, metric, source)
        if accuracy.guesswork and accuracy.guesswork not in self.notes:
            self.notes += (accuracy.guesswork,)
        self._steps.append((path, self._step(placed.size, plan, accuracy)))
        return Attempt(plan, placed.model, path, layers, placed.size, accuracy)

    def _step(self, size: Size, plan: Plan, accuracy: Accuracy) -> Step:
        before = self.original
        latency = plan.ratio("latency") if plan.original.latency_ms else None
        return Step(
            size.macs / (before.macs or 1),
            size.params / (before.params or 1),
            size.size_bytes / before.size_bytes,
            latency,
            accuracy.compressed,
            accuracy.drop,
            accuracy.drop_upper_95,
        )

    def search(self, best: Attempt) -> tuple[Step, ...]:
        """What was measured so far, in its order; `best` is the result."""
        last = max((i for i, (path, _) in enumerate(self._steps) if path == best.path), default=None)
        return tuple(replace(step, chosen=i == last) for i, (_, step) in enumerate(self._steps))

    def _quantized(self, placed: _Placed) -> tuple[Choice, _Placed]:
        """A model in eight bits, as it measures best."""
        planner = self.planner
        model = self._loaded(placed)
        with planner.stage("quantize"):
            feeds = planner.fitting.feeds
            assert feeds is not None  # the options say so
            ready = prepared(model, feeds)
            shapes = shapes_of(ready, planner.subject.inputs, planner.subject.sample_shapes)
            asked = (b.ratio for b in planner.config.budget if b.metric == "size")
            most = next(asked, math.inf) * self.original.size_bytes
            ranges = measure_ranges(ready, feeds)
            choice = choose(ready, shapes, ranges, planner.fitting.apart(), self._share_of_time, most)
        path = self._write(choice.model)
        if objection := check_model(path):
            raise LowRankError(f"the quantised model is not valid, please report this: {objection}")
        size = replace(placed.size, size_bytes=_bytes(path.parent.iterdir()))
        return choice, _Placed(path, size, choice.model)

    def _share_of_time(self, model: Model) -> float:
        """What a model takes, as a share of what the original does."""
        path = self._write(model)
        feeds = self.planner.subject.feeds(self.planner.config.batch_size)
        timing = time_pair(self._session, self._session_of(path), feeds, seconds=QUICK_SECONDS, least=QUICK_LEAST)
        shutil.rmtree(path.parent)
        return 1 / timing.speedup

    def is_original(self, attempt: Attempt) -> bool:
        """Whether an attempt is the model that was given."""
        return attempt.path == self._path

    def model_of(self, attempt: Attempt) -> Model:
        """The model of an attempt, after which nothing more is measured: the sessions make room for it."""
        self._original = self._tested = None
        return self._loaded(attempt)

    def release(self, model: Model) -> tuple[Model, Path | None]:
        """A model that outlives the bench, and the folder of its external data, which goes with whoever holds it."""
        if self._folder not in model.folder.parents:
            return model, None
        kept = Path(tempfile.mkdtemp(prefix="onnx-lowrank-"))
        folder = model.folder.rename(kept / "result")
        return replace(model, folder=folder), kept

    def _loaded(self, held: Attempt | _Placed) -> Model:
        """A model in memory; it is not saved over the files that the original came from."""
        given = self.planner.subject.model
        return held.model or replace(load(held.path), path=given.path, data_files=given.data_files)

    def latency(self, attempt: Attempt) -> Latency:
        """Time an attempt against the original, once."""
        if attempt.path not in self._latencies:
            self._latencies[attempt.path] = self._time(attempt)
        return self._latencies[attempt.path]

    def latency_again(self, attempt: Attempt) -> Latency:
        """Time an attempt once more, and take whichever measurement was disturbed less."""
        first, second = self.latency(attempt), self._time(attempt)
        self._latencies[attempt.path] = min(first, second, key=_unsure)
        return self._latencies[attempt.path]

    def _time(self, attempt: Attempt) -> Latency:
        config, subject = self.planner.config, self.planner.subject
        if self._engine is not None:
            with self.planner.stage("latency"):
                return self._engine.latency(attempt.path)
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
                yield self.planner.subject.feeds(self._batch, seed=number), None
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
    with scratch_folder(Path(tempfile.gettempdir()), "onnx-lowrank-") as folder:
        planner.scratch = folder
        bench = Bench(planner, folder)
        yield bench
        if bench.refiner is not None:  # all is done: nothing to go on from
            bench.refiner.close()


def _unsure(latency: Latency) -> float:
    """How far apart the bounds of a speedup are, as a share of it."""
    spread = (latency.speedup_high_95 - latency.speedup_low_95) / latency.speedup
    return math.inf if math.isnan(spread) else spread


def _needs_whole(config: Config, target: Target) -> bool:
    """Whether something that is asked for takes a whole model in memory anyway."""
    return (
        config.needs_latency
        or config.accelerated
        or target.engine
        or config.quantize != "none"
        or config.finetune != "none"
    )


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

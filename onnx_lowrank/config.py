"""Every option, in the shell and in Python alike: one frozen dataclass, read from keywords, JSON or TOML."""

from __future__ import annotations

import fnmatch
import math
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from onnx_lowrank.types import Budget, LowRankError
from onnx_lowrank.verification.metrics import DECIBELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLANNED = ("macs", "params")
"""Metrics that a plan knows exactly before anything is written."""

MEASURED = {"size": "params", "latency": "macs"}
"""Metrics that are measured on the result, and the planned one that stands for each where nothing nearer is known."""

METHODS = ("svd", "tucker2", "spatial_svd", "channel_svd", "channel_svd_in", "cp3")
"""Decompositions used where the user names none; with a rank estimator, the first that applies to a layer."""


DAMAGES = ("output", "weights", "energy", "accuracy", "combined")
"""What a plan may count as the damage that a candidate does."""

QUANTIZATIONS = ("none", "int8")
"""What `quantize` may be."""

TRAINING = ("none", "distill", "labels")
"""What `finetune` may be."""

PRECISIONS = ("float32", "bfloat16")
"""What products may be computed in when a model is trained."""

MOST_DROP = 0.5
"""From here on a `max_drop` is taken for a mistake: the model would be ruined."""

CALIBRATE = "calibrate (--calibrate DATA)"
"""What brings samples, in the words of Python and of the shell."""

CPU = "CPUExecutionProvider"

CHANGED_FIRST = ("dequantize", "fold_shortcuts", "drop_dead_channels")
"""Options that make another model of the one that was given, before anything is decided."""

TRAINING_ONLY = ("train", "epochs", "learning_rate", "augment", "loss", "batch_statistics", "precision")
"""Options that say nothing where nothing is trained."""


@dataclass(frozen=True)
class Config:
    """What is asked for. Names are those of the command line's options.

    Parameters
    ----------
    calibrate
        Unlabelled samples, in any form that :func:`onnx_lowrank.data.open_data` reads.
    evaluate
        Samples for the accuracy check, with labels or without.
    preprocess
        TOML file that says how pictures become inputs.
    metric
        ``top1``, ``top5``, ``agreement``, ``cosine``, ``sqnr``, ``psnr`` or ``FILE.py:function``.
    budget
        Fractions of the original to stay within, 0.5 or ``"50%"``: ``macs``, ``params``, ``size`` or ``latency``.
    max_drop
        Largest loss of the metric that is accepted, with 95 % confidence: 0.01 or ``"1%"`` for one point, less than 0.5; of
        ``sqnr`` and ``psnr`` the largest share of noise: 0.01 is 20 dB.
    objective
        What to make small under `max_drop`.
    methods
        Decompositions that may be used.
    recipe
        Key of ``RECIPES``: a pipeline as it was published, whole.
    solver
        Key of ``BUDGET_SOLVERS``: what chooses among candidates within the budgets.
    damage
        What a solver adds up: ``output``, what errors of a layer do to the outputs (of the weights, without samples);
        ``weights``, relative errors of the kernels (of the layers' outputs, with samples); ``energy``, ``accuracy`` or
        ``combined``, the metrics of ENC.
    rank
        A rank estimator in the place of an allocation: ``vbmf``, ``energy=0.95``, ``ratio=0.5``...
    include, exclude
        Patterns of node names: only layers that match one of `include` (all, where it is empty) and none of
        `exclude` are changed.
    group
        Patterns of node names by a name of one's own: layers that may share a factor; otherwise found from the graph.
    fold_batchnorm
        Fold BatchNormalization into the convolution before it, at the end: a kernel is better decomposed before its
        channels are scaled.
    fold_shortcuts
        Write shortcuts that slice and pad (ResNets without convolutions there) as 1x1 convolutions of zeros and ones, first:
        the tensors around them then stay in the layout of convolutions. The same function, but for NaN and infinity.
    drop_dead_channels
        Leave out the channels that carry nothing on any sample of `calibrate`, with all that is computed for them, first: what is
        left is kept to the multiple that ranks are kept to. Of layers that may be changed only.
    quantize
        ``int8``: the result is quantised at the end (QDQ, static, a scale for each channel of a kernel), on samples of
        `calibrate`; all that was asked for is held by the quantised model, and latency is planned in eight bits.
    dequantize
        Bring a model that is in eight bits already (QDQ) back to floating point first; figures are beside that.
    finetune, train, epochs
        ``distill`` trains the compressed graph towards the original's outputs, ``labels`` towards labels, on the samples of
        `train` (for ``distill`` those of `calibrate`, where it is not given). None of `epochs` takes as many as make 3,000
        steps.
    device
        What torch trains on: ``cpu``, ``cuda``...
    precision
        Of the products in training: ``float32`` or ``bfloat16``; None takes float32 on the CPU, bfloat16 on cuda.
    augment
        How pictures are varied: ``flip``, ``crop``, ``mixup``, ``none``; None for flips and shifts.
    learning_rate, train_batch
        The highest rate of AdamW, and samples of a step; None takes 0.0003 to distill and 0.001 for labels.
    trained
        Which tensors train: ``all`` weights, those that were ``touched``, or patterns of names.
    loss
        ``FILE.py:function(outputs, labels)`` in the place of cross entropy; torch tensors, outputs by name.
    batch_statistics
        Whether BatchNormalization follows the batches; None where labels are learnt.
    orthogonality
        What the distance of factors from orthogonal ones counts in the recipe ``orthogonal``; None for 1.
    align
        Multiple that ranks are kept to; None takes the block size of this machine's kernels.
    target
        Key of ``TARGETS``, or a JSON file of times that ``bench.py`` of a bundle measured on a device: what the result is to
        run on. It says which formats a layer may take and what ranks are kept
        to, and where it is told without the device, the result is not cut into more parts than the original.
    provider, threads, batch_size, input_shape
        What the models are run and timed on; `input_shape` maps input names to sizes.
    provider_option, provider_library
        Options of the provider by their names, and libraries of providers by the names they are registered under.
    exact
        Every singular value decomposition in double precision and without random numbers, those of kernels from 4096 x 4096 on
        too: slower there, and no other kernel changes.
    jobs
        Processes; 0 takes one for each core.
    cluster
        Address of a Dask scheduler, whose workers do the work on layers instead.
    seed
        Of every random choice.
    """

    calibrate: Any = None
    evaluate: Any = None
    preprocess: str | None = None
    metric: str | None = None
    budget: tuple[Budget, ...] = ()
    max_drop: float | None = None
    objective: str = "latency"
    methods: tuple[str, ...] = METHODS
    recipe: str = "default"
    solver: str = "knapsack"
    damage: str = "output"
    rank: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    group: Mapping[str, str] = field(default_factory=dict)
    fold_batchnorm: bool = False
    fold_shortcuts: bool = False
    drop_dead_channels: bool = False
    quantize: str = "none"
    dequantize: bool = False
    finetune: str = "none"
    train: Any = None
    epochs: int | None = None
    device: str = "cpu"
    precision: str | None = None
    augment: tuple[str, ...] | None = None
    learning_rate: float | None = None
    train_batch: int = 64
    trained: tuple[str, ...] = ("all",)
    loss: str | None = None
    batch_statistics: bool | None = None
    orthogonality: float | None = None
    align: int | None = None
    target: str = "cpu"
    provider: str = CPU
    provider_option: Mapping[str, str] = field(default_factory=dict)
    provider_library: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    batch_size: int = 1
    input_shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    exact: bool = False
    jobs: int = 0
    cluster: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        metrics = (*PLANNED, *MEASURED)
        for budget in self.budget:
            _expect(
                budget.metric in metrics, f"budget {budget.metric}={budget.ratio:g}", f"one of {', '.join(metrics)}"
            )
        _expect(self.damage in DAMAGES, f"damage '{self.damage}'", f"one of {', '.join(DAMAGES)}")
        sampled = self.calibrate is not None or (
            self.damage in ("output", "weights", "energy") and self.solver != "enc_inf"
        )
        _needs(sampled, f"damage {self.damage} with solver {self.solver} needs samples", CALIBRATE)
        names = [budget.metric for budget in self.budget]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise LowRankError(f"{names.count(twice)} budgets on {twice} were given: one for each metric was expected")
        _expect(self.objective in metrics, f"objective '{self.objective}'", f"one of {', '.join(metrics)}")
        _expect(self.quantize in QUANTIZATIONS, f"quantize '{self.quantize}'", f"one of {', '.join(QUANTIZATIONS)}")
        sampled = self.quantize == "none" or self.calibrate is not None
        _needs(sampled, f"quantize {self.quantize} needs samples", CALIBRATE)
        held = self.max_drop is None or 0 <= self.max_drop < math.inf
        _expect(held, f"max_drop {self.max_drop}", "a number of at least 0")
        # whoever writes 1 means one percent; of decibels all noise is 1, and a metric of one's own has any range
        ranged = self.metric not in DECIBELS and ".py:" not in (self.metric or "")
        meant = self.max_drop is None or not ranged or self.max_drop < MOST_DROP
        _expect(meant, f"max_drop {self.max_drop or 0:g}", f"a share below {MOST_DROP:g} (0.01 or 1% for one point)")
        _expect(bool(self.methods), "an empty list of methods", "at least one decomposition")
        _expect(self.finetune in TRAINING, f"finetune '{self.finetune}'", f"one of {', '.join(TRAINING)}")
        fed = self.train is not None or (self.finetune == "distill" and self.calibrate is not None)
        what, other = ("samples", f"{CALIBRATE} or ") if self.finetune == "distill" else ("samples with labels", "")
        _needs(self.finetune == "none" or fed, f"finetune {self.finetune} needs {what}", f"{other}train (--train DATA)")
        rate = self.learning_rate
        _expect(rate is None or 0 < rate < math.inf, f"learning_rate {rate}", "a number above 0")
        _expect(self.epochs is None or self.epochs >= 1, f"epochs {self.epochs}", "a whole number of at least 1")
        weight = self.orthogonality
        _expect(weight is None or 0 <= weight < math.inf, f"orthogonality {weight}", "a number of at least 0")
        _expect(weight is None or self.recipe == "orthogonal", f"orthogonality {weight}", "recipe orthogonal")
        named = self.precision is None or self.precision in PRECISIONS
        _expect(named, f"precision '{self.precision}'", f"one of {', '.join(PRECISIONS)}")
        looked = not self.drop_dead_channels or self.calibrate is not None
        _needs(looked, "drop_dead_channels looks at what channels carry on samples", CALIBRATE)
        idle = [name for name in TRAINING_ONLY if self.finetune == "none" and getattr(self, name) is not None]
        _needs(not idle, f"nothing is trained that {', '.join(idle)} could be of", "finetune distill or labels")
        labelled = self.loss is None or self.finetune == "labels"
        _needs(labelled, "a loss of one's own takes labels", "finetune labels, or leave loss out")
        _expect(bool(self.trained), "an empty list of tensors to train", "all, touched or patterns")
        for name, least in (("train_batch", 1), ("threads", 0), ("batch_size", 1), ("jobs", 0), ("seed", 0)):
            _expect(
                getattr(self, name) >= least, f"{name} {getattr(self, name)}", f"a whole number of at least {least}"
            )
        alone = self.cluster is None or not self.jobs
        _needs(alone, f"jobs {self.jobs} and cluster {self.cluster} exclude each other", "one of them")
        _expect("://" in (self.cluster or "://"), f"cluster '{self.cluster}'", "an address such as tcp://10.0.0.1:8786")
        known = self.accelerated or not self.provider_option
        _needs(known, "provider_option is for a provider beside the CPU", "provider (--provider NAME)")
        _expect(self.align is None or self.align >= 1, f"align {self.align}", "a whole number of at least 1")

    @property
    def needs_latency(self) -> bool:
        """Whether plans go by the time that layers take."""
        goals = [b.metric for b in self.budget] or ([self.objective] if self.max_drop is not None else [])
        return "latency" in goals

    @property
    def changes_first(self) -> tuple[str, ...]:
        """What is asked for that makes another model of the one that was given, before anything is decided."""
        return tuple(name for name in CHANGED_FIRST if getattr(self, name))

    @property
    def foretold(self) -> bool:
        """Whether latency is that of a device that is not here: `target` is a file of times."""
        return self.target.endswith(".json")

    @property
    def accelerated(self) -> bool:
        """Whether another execution provider than the CPU is asked for."""
        return self.provider.lower() not in (CPU.lower(), "cpu")

    @property
    def workers(self) -> int:
        """Processes to use."""
        return self.jobs or os.cpu_count() or 1

    def selects(self, layer: str) -> bool:
        """Whether the layer of this name may be changed."""
        return (not self.include or _matches(layer, self.include)) and not _matches(layer, self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; data given as Python objects are named by their type."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("calibrate", "evaluate", "train"):
            value = plain[name]
            plain[name] = (
                value if value is None else str(value) if isinstance(value, (str, Path)) else type(value).__name__
            )
        for name in ("group", "provider_option", "provider_library"):
            plain[name] = dict(plain[name])
        plain["budget"] = {b.metric: b.ratio for b in self.budget}
        plain["input_shape"] = {name: list(shape) for name, shape in self.input_shape.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _expect(condition: bool, given: str, expected: str) -> None:
    if not condition:
        raise LowRankError(f"{given} was given: {expected} was expected")


def _needs(condition: bool, why: str, give: str) -> None:
    if not condition:
        raise LowRankError(f"{why}: give {give}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def make_config(**options: Any) -> Config:
    """A Config from keywords in their everyday forms: ``budget={"macs": 0.5}``, ``methods="svd,tucker2"``.

    Raises
    ------
    LowRankError
        For an unknown option or a value that makes no sense.

    Examples
    --------
    >>> make_config(budget={"macs": 0.5}, methods="svd,cp3").methods
    ('svd', 'cp3')
    """
    known = {f.name for f in fields(Config)}
    for name in options:
        _expect(name in known, f"option '{name}'", f"one of {', '.join(sorted(known))}")
    values = {name: value for name, value in options.items() if value is not None}
    return Config(**{name: READERS[name](name, value) if name in READERS else value for name, value in values.items()})


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise LowRankError(f"{name} '{value}' was given: a number was expected") from error


def _share(name: str, value: Any) -> float:
    """A number; a text may say it in percent."""
    if not (isinstance(value, str) and value.rstrip().endswith("%")):
        return _number(name, value)
    try:
        return float(value.rstrip()[:-1]) / 100
    except ValueError as error:
        raise LowRankError(f"{name} '{value}' was given: a number was expected") from error


def _whole(name: str, value: Any) -> int:
    _expect(hasattr(value, "__index__") and not isinstance(value, bool), f"{name} {value!r}", "a whole number")
    return operator.index(value)


def _truth(name: str, value: Any) -> bool:
    _expect(isinstance(value, bool), f"{name} {value!r}", "true or false")
    return bool(value)


def _text(name: str, value: Any) -> str:
    _expect(isinstance(value, (str, os.PathLike)), f"{name} {value!r}", "text")
    return os.fspath(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """From a list, or from one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    listed = isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts)
    _expect(listed, f"{name} {value!r}", "a list of names")
    return tuple(part.strip() for part in parts if part.strip())


def _budgets(name: str, value: Any) -> tuple[Budget, ...]:
    """From a mapping, or from one or more Budgets and texts."""
    if isinstance(value, Mapping):
        return tuple(Budget(metric, _share(f"budget {metric}", ratio)) for metric, ratio in value.items())
    items = value if isinstance(value, (list, tuple)) else [value]
    known = all(isinstance(item, (str, Budget)) for item in items)
    _expect(known, f"{name} {value!r}", "METRIC=RATIO, for example macs=0.5,")
    return tuple(b for item in items for b in ([item] if isinstance(item, Budget) else parse_budgets([item])))


def _pairs(name: str, value: Any) -> dict[str, str]:
    """From a mapping, or from one or more texts KEY=VALUE."""
    if isinstance(value, Mapping):
        return {str(key): _text(name, text) for key, text in value.items()}
    pairs = [text.partition("=") for text in _texts(name, value)]
    for key, found, text in pairs:
        _expect(bool(key and found and text), f"{name} '{key}{found}{text}'", PAIRS[name])
    _expect(len({key for key, *_ in pairs}) == len(pairs), f"{name} {value}", "a name for each")
    return {key: text for key, _, text in pairs}


PAIRS = {
    "group": "NAME=GLOB, for example two=layer2.*.conv1,",
    "provider_option": "KEY=VALUE, for example backend_type=htp,",
    "provider_library": "NAME=PATH, for example QNNExecutionProvider=libonnxruntime_providers_qnn.so,",
}
"""What pairs of texts look like."""


def _shapes(name: str, value: Any) -> dict[str, tuple[int, ...]]:
    """From a mapping, or from one or more texts."""
    if not isinstance(value, Mapping):
        return parse_input_shapes(_texts(name, [value] if isinstance(value, str) else value))
    for shape in value.values():
        sizes = isinstance(shape, (list, tuple)) and all(hasattr(n, "__index__") and n > 0 for n in shape)
        _expect(sizes, f"{name} {dict(value)}", "sizes of at least 1 for each input")
    return {key: tuple(map(operator.index, shape)) for key, shape in value.items()}


READERS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("preprocess", "metric", "objective", "recipe", "solver", "damage", "rank", "provider"), _text),
    **dict.fromkeys(("finetune", "device", "precision", "loss", "quantize", "target", "cluster"), _text),
    **dict.fromkeys(("methods", "include", "exclude", "augment", "trained"), _texts),
    **dict.fromkeys(("threads", "batch_size", "jobs", "seed", "align", "epochs", "train_batch"), _whole),
    "budget": _budgets,
    **dict.fromkeys(PAIRS, _pairs),
    "max_drop": _share,
    **dict.fromkeys(("learning_rate", "orthogonality"), _number),
    **dict.fromkeys(
        ("fold_batchnorm", "fold_shortcuts", "drop_dead_channels", "dequantize", "batch_statistics", "exact"), _truth
    ),
    "input_shape": _shapes,
}
"""What makes an option's value from its everyday forms; the others are taken as they are."""


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets from ``METRIC=RATIO``.

    Examples
    --------
    >>> parse_budgets(["macs=0.5", "params=40%"])
    (Budget(metric='macs', ratio=0.5), Budget(metric='params', ratio=0.4))
    """
    budgets = []
    for text in texts:
        metric, found, ratio = text.partition("=")
        _expect(bool(found), f"budget '{text}'", "METRIC=RATIO, for example macs=0.5,")
        if "," in ratio:
            raise LowRankError(f"budget '{text}' was given: one METRIC=RATIO was expected, repeat --budget for another")
        budgets.append(Budget(metric, _share(f"budget {metric}", ratio)))
    return tuple(budgets)


def parse_input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Sizes of inputs from ``NAME:1,3,224,224``.

    Examples
    --------
    >>> parse_input_shapes(["x:1,3,224,224"])
    {'x': (1, 3, 224, 224)}
    """
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        numbers = sizes.split(",")
        _expect(
            bool(name) and all(n.strip().isdigit() and int(n) > 0 for n in numbers),
            f"input shape '{text}'",
            "NAME:SIZES, for example x:1,3,224,224,",
        )
        shapes[name] = tuple(int(n) for n in numbers)
    return shapes


def read_config(path: str | Path) -> dict[str, Any]:
    """Options from a TOML file whose keys are their names.

    Raises
    ------
    LowRankError
        Where the file cannot be read, is no TOML, or names code to execute: that is only taken from the command line.
    """
    try:
        options = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LowRankError(f"{path} cannot be read ({error.strerror}): a TOML file was expected") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LowRankError(f"{path} is not TOML ({error}): KEY = VALUE lines were expected") from error
    options = {key.replace("-", "_"): value for key, value in options.items()}
    for key, value in options.items():
        if key in ("calibrate", "evaluate", "train", "metric", "loss") and ".py:" in str(value):
            raise LowRankError(f"{path}: {key} = '{value}' would execute a file: give it on the command line instead")
    loaded = (
        ("provider_library", "a file"),
        ("provider_option", "libraries that it names"),
        ("cluster", "what comes from there"),
    )
    for key, what in loaded:
        if key in options:
            raise LowRankError(f"{path}: {key} would execute {what}: give it on the command line instead")
    return options

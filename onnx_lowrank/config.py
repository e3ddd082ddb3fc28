"""Every option, in the shell and in Python alike: one frozen dataclass, read from keywords, JSON or TOML."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from onnx_lowrank.types import Budget, LowRankError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLANNED = ("macs", "params")
"""Metrics that a plan knows exactly before anything is written."""

MEASURED = {"size": "params", "latency": "macs"}
"""Metrics that are measured on the result, and the planned one that stands for each until then."""

METHODS = ("svd", "tucker2", "spatial_svd", "channel_svd", "channel_svd_in", "cp3")
"""Decompositions used where the user names none; with a rank estimator, the first that applies to a layer."""


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
        Fractions of the original to stay within: ``macs``, ``params``, ``size`` or ``latency``.
    max_drop
        Largest loss of the metric that is accepted, with 95 % confidence.
    objective
        What to make small under `max_drop`.
    methods
        Decompositions that may be used.
    rank
        A rank estimator in the place of an allocation: ``vbmf``, ``energy=0.95``, ``ratio=0.5``...
    include, exclude
        Patterns of node names: only layers that match one of `include` (all, where it is empty) and none of
        `exclude` are changed.
    fold_batchnorm
        Fold BatchNormalization into the convolution before it first.
    align
        Multiple that ranks are kept to; None takes the block size of this machine's kernels.
    provider, threads, batch_size, input_shape
        What latency is measured on; `input_shape` maps input names to sizes.
    jobs
        Processes; 0 takes one for each core.
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
    rank: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fold_batchnorm: bool = False
    align: int | None = None
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    batch_size: int = 1
    input_shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    jobs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        metrics = (*PLANNED, *MEASURED)
        for budget in self.budget:
            _expect(
                budget.metric in metrics, f"budget {budget.metric}={budget.ratio:g}", f"one of {', '.join(metrics)}"
            )
        names = [budget.metric for budget in self.budget]
        _expect(len(set(names)) == len(names), f"two budgets for {names}", "one for each metric")
        _expect(self.objective in metrics, f"objective '{self.objective}'", f"one of {', '.join(metrics)}")
        _expect(self.max_drop is None or self.max_drop >= 0, f"max_drop {self.max_drop}", "a number of at least 0")
        _expect(bool(self.methods), "an empty list of methods", "at least one decomposition")
        for name, least in (("threads", 0), ("batch_size", 1), ("jobs", 0), ("seed", 0)):
            _expect(
                getattr(self, name) >= least, f"{name} {getattr(self, name)}", f"a whole number of at least {least}"
            )
        _expect(self.align is None or self.align >= 1, f"align {self.align}", "a whole number of at least 1")

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
        for name in ("calibrate", "evaluate"):
            value = plain[name]
            plain[name] = (
                value if value is None else str(value) if isinstance(value, (str, Path)) else type(value).__name__
            )
        plain["budget"] = {b.metric: b.ratio for b in self.budget}
        plain["input_shape"] = {name: list(shape) for name, shape in self.input_shape.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _expect(condition: bool, given: str, expected: str) -> None:
    if not condition:
        raise LowRankError(f"{given} was given: {expected} was expected")


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
    if isinstance(budget := values.get("budget"), Mapping):
        values["budget"] = tuple(Budget(metric, _number(f"budget {metric}", ratio)) for metric, ratio in budget.items())
    elif isinstance(budget, str):
        values["budget"] = parse_budgets([budget])
    for name in ("methods", "include", "exclude"):
        if name in values:
            given = values[name]
            values[name] = tuple(part for part in given.split(",") if part) if isinstance(given, str) else tuple(given)
    if isinstance(shapes := values.get("input_shape"), Mapping):
        values["input_shape"] = {name: tuple(int(n) for n in shape) for name, shape in shapes.items()}
    for name in ("threads", "batch_size", "jobs", "seed", "align"):
        if name in values:
            _expect(
                isinstance(values[name], int) and not isinstance(values[name], bool),
                f"{name} {values[name]!r}",
                "a whole number",
            )
    if "max_drop" in values:
        values["max_drop"] = _number("max_drop", values["max_drop"])
    return Config(**values)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise LowRankError(f"{name} '{value}' was given: a number was expected") from error


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets from ``METRIC=RATIO``.

    Examples
    --------
    >>> parse_budgets(["macs=0.5"])
    (Budget(metric='macs', ratio=0.5),)
    """
    budgets = []
    for text in texts:
        metric, found, ratio = text.partition("=")
        _expect(bool(found), f"budget '{text}'", "METRIC=RATIO, for example macs=0.5,")
        budgets.append(Budget(metric, _number(f"budget {metric}", ratio)))
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
        options = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise LowRankError(f"{path} cannot be read ({error.strerror}): a TOML file was expected") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LowRankError(f"{path} is not TOML ({error}): KEY = VALUE lines were expected") from error
    options = {key.replace("-", "_"): value for key, value in options.items()}
    for key, value in options.items():
        if key in ("calibrate", "evaluate", "metric") and ".py:" in str(value):
            raise LowRankError(f"{path}: {key} = '{value}' would execute a file: give it on the command line instead")
    return options

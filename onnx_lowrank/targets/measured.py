"""A target that is a file: the times that ``bench.py`` of a bundle measured on a device."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lowrank.runtime import simulated
from onnx_lowrank.types import LowRankError, Rank

SUFFIX = ".json"
"""What a name of a target ends in that is a file."""

FORMAT = 1
"""Of bundles and of results; ``bench.py`` has the same."""


@dataclass(frozen=True)
class MeasuredModel:
    """What one model took over the original.

    Parameters
    ----------
    parts
        Kind of layer, method, rank, and number of groups changed.
    ratio
        Of the times.
    error
        Standard error of that.
    """

    parts: tuple[tuple[str, str, Rank, int], ...]
    ratio: float
    error: float


@dataclass(frozen=True)
class Results:
    """What came back from a device.

    Parameters
    ----------
    model, name
        Hash of the layers of the model, and its file's name.
    target
        Key of ``TARGETS`` that the bundle was made for.
    align
        What its ranks were kept to.
    where
        Provider, machine and so on, in words.
    original_ms
        Of the original there.
    batch
        Samples of a run.
    missing
        Models of the bundle that were not timed, or not on the provider.
    """

    model: str
    name: str
    target: str
    align: int
    where: str
    original_ms: float
    batch: int
    models: tuple[MeasuredModel, ...]
    missing: int


def read_results(path: Path) -> Results:
    """What ``bench.py`` wrote.

    Raises
    ------
    LowRankError
        Where the file cannot be read, holds something else, or no time at all.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowRankError(
            f"{path} cannot be read ({error.strerror}): results of a bundle's bench.py were expected"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LowRankError(f"{path} is not JSON ({error}): results of a bundle's bench.py were expected") from error
    if not isinstance(data, dict) or data.get("results") != "onnx-lowrank":
        raise LowRankError(f"{path} holds no times: results of a bundle's bench.py were expected")
    if data.get("format") != FORMAT:
        raise LowRankError(f"{path} is of format {data.get('format')!r}: {FORMAT} was expected, make a new bundle")
    try:
        place: Mapping[str, Any] = data["environment"]
        timed = [entry for entry in data["timed"] if "ratio" in entry]
        # a time of the CPU is not one of the provider, nor is one beside an original that was on the CPU
        beside = _ran(data.get("placement"), place["provider"])
        there = [entry for entry in timed if beside and _ran(entry.get("placement"), place["provider"])]
        models = tuple(map(_model, there))
        where = f"{place['provider']}, {place['processor']}, {place['threads']} thread(s), ONNX Runtime {place['onnxruntime']}"
        results = Results(
            str(data["model"]),
            str(data["name"]),
            str(data["target"]),
            operator.index(data["align"]),
            where,
            _time(data["original_ms"]),
            operator.index(data["batch"]),
            models,
            operator.index(data["models"]) - len(models),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise LowRankError(
            f"{path} is damaged ({problem!r}): results of a bundle's bench.py were expected"
        ) from problem
    if timed and not models:
        raise LowRankError(
            f"{path}: {place['provider']} ran nothing of the models there: times of another are no times of it"
        )
    if why := simulated(str(place["provider"]), f"{place.get('system')} {place.get('machine')}"):
        raise LowRankError(f"{path}: {why}")
    if not models:
        raise LowRankError(f"{path} holds no time yet: let bench.py run on")
    return results


def _ran(placement: Mapping[str, int] | None, provider: str) -> bool:
    """Whether a provider ran a node, as far as the session said where they run."""
    return not placement or placement.get(provider, 0) > 0


def _model(entry: Mapping[str, Any]) -> MeasuredModel:
    parts = tuple(_part(part) for part in entry["parts"])
    if not parts:
        raise ValueError("a model without parts")
    low, high = _time(entry["low_95"]), _time(entry["high_95"])
    return MeasuredModel(parts, _time(entry["ratio"]), abs(high - low) / (2 * 1.96))


def _part(part: Mapping[str, Any]) -> tuple[str, str, Rank, int]:
    rank, groups = tuple(map(operator.index, part["rank"])), operator.index(part["groups"])
    if not rank or min(rank) < 1 or groups < 1:
        raise ValueError(f"rank {rank} of {groups} layers")
    return str(part["layer"]), str(part["method"]), rank, groups


def _time(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"a time of {number:g}")
    return number

"""Times measured on this machine, kept in a file: what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.files import write_whole
from onnx_lowrank.types import Rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A layer and what it becomes: `layer` says all that its time depends on, the machine apart."""

    layer: str
    method: str


class Timings:
    """Times of chains as shares of the time of the layer that they stand for, so that they outlive a busy hour.

    Parameters
    ----------
    environment
        All that a time depends on besides the layer: provider, version of the runtime, processor, threads. Each has a
        file of its own, and a file that says otherwise is not used.
    folder
        Where that file is; None keeps nothing.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path | None) -> None:
        self._environment = dict(environment)
        name = hashlib.sha256(json.dumps(self._environment, sort_keys=True).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"latency-{name}.json"
        self._shares: dict[str, dict[str, dict[str, list[float]]]] = self._read()

    def of(self, place: Place) -> dict[Rank, float]:
        """Shares by rank: the mean of what was measured for each."""
        found = self._shares.get(place.layer, {}).get(place.method, {})
        return {tuple(map(int, rank.split("x"))): sum(each) / len(each) for rank, each in found.items()}

    def places(self) -> list[tuple[Place, dict[Rank, float]]]:
        """All that is known: shares by rank, for each layer and method."""
        each = [Place(layer, method) for layer, methods in self._shares.items() for method in methods]
        return [(place, self.of(place)) for place in each]

    def add(self, place: Place, rank: Rank, share: float) -> None:
        """Take in one measurement; the last ``KEPT`` of each rank count."""
        ranks = self._shares.setdefault(place.layer, {}).setdefault(place.method, {})
        known = ranks.setdefault("x".join(map(str, rank)), [])
        known.append(round(share, 5))
        del known[:-KEPT]

    def save(self) -> None:
        """Write the file, whole or not at all; where that is not possible, the next run measures again."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            data = json.dumps({"environment": self._environment, "shares": self._shares})
            write_whole(self._path, [data.encode()])
        except OSError as error:
            logger.warning("measured times cannot be kept in %s: %s", self._path, error)

    def _read(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            if data["environment"] != self._environment:
                return {}
            return {
                layer: {
                    method: {rank: [float(share) for share in each] for rank, each in ranks.items()}
                    for method, ranks in methods.items()
                }
                for layer, methods in data["shares"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is not read: %s", self._path, error)
            return {}


KEPT = 9
"""Measurements kept of each rank."""

"""What the public functions give back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.save import save
from onnx_lowrank.graph.shapes import Tensor
from onnx_lowrank.report.data import Report, Size, TargetResult, environment, package_version, plain
from onnx_lowrank.report.details import LayerDetails
from onnx_lowrank.runtime import Feeds
from onnx_lowrank.runtime.ort_format import SUFFIX, save_ort
from onnx_lowrank.types import Candidate, Cost, Plan, Skip
from onnx_lowrank.verification.verify import Accuracy, Latency


@dataclass(frozen=True)
class Result:
    """What `compress` and `apply` give back.

    Parameters
    ----------
    model
        Of the kind that was given: a ModelProto (also for a path), a graphsurgeon Graph or an onnx-ir Model. The tensors of
        one with more than 1 GB of external data stay outside, in `folder`, for as long as the result is alive: `save` it.
    plan, report
        What was decided, and what came of it.
    details
        What the page of a report shows of each layer; empty where it was not asked for.
    """

    model: Any
    plan: Plan
    report: Report
    _written: Model = field(repr=False)
    _feeds: Feeds = field(repr=False)
    _compiled: bool = field(repr=False)
    details: tuple[LayerDetails, ...] = field(default=(), repr=False)

    @property
    def folder(self) -> Path:
        """What the places of external data in `model` are relative to."""
        return self._written.folder

    @property
    def met(self) -> bool:
        """Whether everything asked for was reached."""
        return self.report.met

    def save(self, path: str | Path) -> None:
        """Write the model, in the format of mobile builds where `path` ends in ``.ort``.

        See :func:`onnx_lowrank.graph.save.save` and :func:`onnx_lowrank.runtime.ort_format.save_ort`.
        """
        if Path(path).suffix == SUFFIX:
            save_ort(self._written, Path(path), self._feeds, compiled=self._compiled)
        else:
            save(self._written, path)


@dataclass(frozen=True)
class Verification:
    """Two models side by side.

    Parameters
    ----------
    original, compressed
        Counted on the two models themselves.
    accuracy, latency
        Measured on the same samples, and in turn.
    notes
        What the user should know.
    environment
        Versions and machine.
    targets
        How the target asked for would cut both models, where that can be told without it.
    """

    original: Size
    compressed: Size
    accuracy: Accuracy
    latency: tuple[Latency, ...]
    notes: tuple[str, ...]
    environment: dict[str, str]
    targets: tuple[TargetResult, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the provider asked for ran a part of both models at least, and the target takes the second no worse."""
        timed = not any(math.isnan(latency.speedup) for latency in self.latency)
        return timed and all(target.met for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return plain({"version": package_version(), **asdict(self), "met": self.met})


@dataclass(frozen=True)
class LayerView:
    """A layer as `inspect` shows it: `half` is its best candidate at no more than half of its MACs and parameters."""

    name: str
    op_type: str
    weight_shape: tuple[int, ...]
    macs: int
    params: int
    half: Candidate | None


@dataclass(frozen=True)
class Inspection:
    """What is in a model and what each layer could become."""

    cost: Cost
    layers: tuple[LayerView, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    sections: tuple[tuple[str, ...], ...] = ()
    """Layers that repeat, and may share a factor of their kernels (``joint_*``)."""
    details: tuple[LayerDetails, ...] = field(default=(), repr=False)
    """What a page shows of each layer; empty where it was not asked for."""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    """What a user feeds, and what comes of it."""
    error_of: str = "kernel"
    """What the errors of candidates are of: the ``kernel``, or with samples an ``output``."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; of a layer's best candidate at half of its cost, what it is and what it costs."""
        layers = [asdict(replace(layer, half=None)) | {"half": _shown(layer.half)} for layer in self.layers]
        return plain(
            {
                "version": package_version(),
                "environment": environment(),
                "original": {"macs": self.cost.macs, "params": self.cost.params},
                "inputs": [asdict(each) for each in self.inputs],
                "outputs": [asdict(each) for each in self.outputs],
                "layers": layers,
                "skips": [asdict(skip) for skip in self.skips],
                "sections": self.sections,
                "notes": self.notes,
            }
        )


def _shown(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    cost = {"macs": candidate.cost.macs, "params": candidate.cost.params}
    return {"decomposition": candidate.decomposition, "rank": candidate.rank, **cost, "error": candidate.error}

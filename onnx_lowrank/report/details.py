"""What is known of each layer beyond the plan: the spectrum of its kernel, and what every method would lose at every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_lowrank.candidates import Group, Refuses, group_candidates, loaded_task
from onnx_lowrank.decompositions import find_decomposition, is_joint
from onnx_lowrank.decompositions.matrix import MatrixDecomposition
from onnx_lowrank.linalg import unfold
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.ranks import evbmf
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.types import DENSE, Candidate, Plan, Rank
from onnx_lowrank.work.parallel import run_all
from onnx_lowrank.work.tasks import Task

THINNED = 64
"""Points of a spectrum that are kept."""

CURVE = 24
"""Points of an error curve that are kept."""

ITERATIVE = ("cp3", "cp4")
"""Methods without a closed form: their errors are shown where a plan needed them, and not worked out for a picture."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a kernel read as a matrix.

    Parameters
    ----------
    shape
        Of the matrix.
    places, values
        Some of the singular values, at most ``THINNED``: their places from 1 on, and their sizes over the largest.
    threshold
        Of VBMF, over the largest singular value: what lies below is noise.
    vbmf_rank
        Singular values above it.
    rank
        What the layer was cut to along this matrix; None where it was not.
    """

    shape: tuple[int, int]
    places: tuple[int, ...]
    values: tuple[float, ...]
    threshold: float
    vbmf_rank: int
    rank: int | None


@dataclass(frozen=True)
class Curve:
    """What a method loses, by what it costs.

    Parameters
    ----------
    points
        Rank, share of the layer's MACs, and error as the plan counts it (squared); only what no other point of the
        curve beats, at most ``CURVE`` of them.
    """

    decomposition: str
    points: tuple[tuple[Rank, float, float], ...]


@dataclass(frozen=True)
class LayerDetails:
    """A layer, what it became, and what it could have become.

    Parameters
    ----------
    macs_before, macs_after, params_before, params_after
        For one sample; equal where the layer is as it was.
    report
        What became of it; None where the layer is as it was.
    spectra
        Of the matrices that the chosen decomposition cuts: one, or one for each mode.
    curves
        Of each method that applies.
    error_kind
        Key of ``ERROR_KINDS``: what the errors of the curves are of.
    """

    name: str
    op_type: str
    weight_shape: tuple[int, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    report: LayerReport | None
    spectra: tuple[Spectrum, ...]
    curves: tuple[Curve, ...]
    error_kind: str

    @property
    def decomposition(self) -> str:
        """What was chosen, ``dense`` where nothing was."""
        return self.report.decomposition if self.report else DENSE

    @property
    def rank(self) -> Rank:
        """Of the decomposition; empty where there is none."""
        return self.report.rank if self.report else ()


ERROR_KINDS = {
    "kernel": "relative error of the kernel",
    "layer": "relative error of the layer's output",
    "model": "relative error of the model's outputs, this layer changed alone",
    "energy": "-log of the PCA energy kept",
    "accuracy": "-log of the accuracy left, this layer changed alone",
}
"""What the error of a candidate is of, by the damage that the plan adds up. All but the logarithms are stored squared."""


def layer_details(
    planner: Planner, plan: Plan | None = None, layers: Sequence[LayerReport] = ()
) -> tuple[LayerDetails, ...]:
    """The layers of a planner's subject in the order of the graph, under `plan` (as they were, without one).

    Parameters
    ----------
    layers
        What became of those that were decomposed.
    """
    subject = planner.subject
    groups = subject.groups
    choices = {name: choice for choice in (plan.choices if plan else ()) for name in choice.layers}
    known = planner.sets.known
    kind = _error_kind(planner) if known else "kernel"
    # what no plan asked for is worked out here, where that takes no iterations
    methods = () if known else tuple(m for m in planner.config.methods if m not in ITERATIVE and not is_joint(m))
    with planner.stage("report"):
        seen = run_all(
            partial(_seen, methods=methods, block=planner.block, refuses=planner.target.refuses),
            [Task((group, choices.get(group.names[0])), group.dense.cost.params) for group in groups],
            loaded_task,
            work=planner.work,
            progress=planner.progress,
            stage="report",
        )
    reports = {layer.name: layer for layer in layers}
    macs = {layer.name: layer.macs for group in groups for layer in group.layers}
    details = {}
    for group, (spectra, made) in zip(groups, seen, strict=True):
        seen_by_plan = [c for each in known for c in each if group.names[0] in c.layers] or made
        first = reports.get(group.names[0])
        curves = _curves(seen_by_plan, macs, first, kind == "kernel")
        for index, layer in enumerate(group.layers):
            report = reports.get(layer.name)
            params = 0 if index else layer.spec.params  # of a kernel that several layers read: once
            details[layer.name] = LayerDetails(
                layer.name,
                layer.op_type,
                layer.spec.weight_shape,
                layer.macs,
                report.macs_after if report else layer.macs,
                params,
                report.params_after if report else params,
                report,
                spectra,
                curves,
                kind,
            )
    return tuple(details[layer.name] for layer in subject.found.layers if layer.name in details)


def _error_kind(planner: Planner) -> str:
    """What the errors of a planner's candidates are of."""
    damage = planner.config.damage
    if damage in ("energy", "accuracy", "combined"):
        return "energy" if damage == "energy" else "accuracy"
    return "kernel" if not planner.fitting.wanted else "layer" if damage == "weights" else "model"


_Task = tuple[Group, "Candidate | None"]


def _seen(
    task: _Task, methods: tuple[str, ...], block: int, refuses: Refuses
) -> tuple[tuple[Spectrum, ...], tuple[Candidate, ...]]:
    """Spectra of a group's kernel, and its candidates by `methods`."""
    group, choice = task
    made = group_candidates(group, methods, block, refuses=refuses)[0] if methods else ()
    return _spectra(group, choice), made


def _spectra(group: Group, choice: Candidate | None) -> tuple[Spectrum, ...]:
    """Of the matrices that a choice cuts, of the first group of channels; of the kernel's rows where it cuts none.

    A depthwise kernel has none worth showing: each of its channels is one row.
    """
    spec = group.layers[0].spec
    if spec.depthwise:
        return ()
    kernel = np.split(group.layers[0].read_weight(), spec.group)[0]
    cuts: list[tuple[np.ndarray, int | None]] = [(unfold(kernel, 0), None)]
    if choice is not None and not choice.dense:
        decomposition = find_decomposition(choice.decomposition)
        if isinstance(decomposition, MatrixDecomposition):
            cuts = [(decomposition.matricize(kernel), choice.rank[0])]
        elif len(choice.rank) == 2:  # (out, in) of Tucker-2
            cuts = [(unfold(kernel, mode), rank) for mode, rank in enumerate(choice.rank)]
    return tuple(spectrum(matrix, rank) for matrix, rank in cuts)


def spectrum(matrix: np.ndarray, rank: int | None = None) -> Spectrum:
    """Singular values of a matrix (m, n), thinned, and what VBMF makes of them.

    Examples
    --------
    >>> spectrum(np.diag([4.0, 2.0, 1.0]), 2).values
    (1.0, 0.5, 0.25)
    """
    found = evbmf(matrix)
    values = found.singular_values
    scale = float(values[0]) if len(values) and values[0] > 0 else 1.0
    picks = _picks(len(values), THINNED)
    return Spectrum(
        (int(matrix.shape[0]), int(matrix.shape[1])),
        tuple(i + 1 for i in picks),
        tuple(float(values[i]) / scale for i in picks),
        found.threshold / scale,
        found.rank,
        rank,
    )


_Point = tuple[Rank, float, float]


def _curves(
    candidates: Sequence[Candidate], macs: Mapping[str, int], report: LayerReport | None, squared: bool
) -> tuple[Curve, ...]:
    """Candidates by method, with what was chosen; what several layers share is told for one of them.

    Where no candidate is what was chosen (a rank by an estimator, or of one's own), the error of the fit stands for its own,
    if that is of the same kind (`squared`).
    """
    points: dict[str, list[_Point]] = {}
    for c in candidates:
        if not c.dense:
            whole = sum(macs[name] for name in c.layers) or 1
            each = len(c.layers) if is_joint(c.decomposition) else 1
            points.setdefault(c.decomposition, []).append((c.rank, c.cost.macs / whole, c.error / each))
    curves = {name: _thinned(_front(each)) for name, each in points.items()}
    if report is not None:
        name, own = report.decomposition, [p for p in points.get(report.decomposition, ()) if p[0] == report.rank]
        if not own and squared and not report.fitted and report.macs_before:
            own = [(report.rank, report.macs_after / report.macs_before, report.relative_error**2)]
        curves[name] = tuple(sorted({*curves.get(name, ()), *own[:1]}, key=lambda p: p[1:]))
    return tuple(Curve(name, each) for name, each in curves.items())


def _front(points: Sequence[_Point]) -> list[_Point]:
    """The points that no cheaper one is as good as, the cheapest first."""
    kept: list[_Point] = []
    for point in sorted(points, key=lambda p: (p[1], p[2])):
        if not kept or point[2] < kept[-1][2]:
            kept.append(point)
    return kept


def _thinned(points: Sequence[_Point]) -> tuple[_Point, ...]:
    return tuple(points[i] for i in _picks(len(points), CURVE))


def _picks(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spaced, both ends among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})

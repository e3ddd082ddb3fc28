"""What is known of each layer beyond the plan: the spectrum of its kernel, and what every method would lose at every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_lowrank.decompositions import is_joint
from onnx_lowrank.layer_tasks import loaded_task
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.report.spectra import Spectrum, evenly, look_at
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.types import DENSE, Candidate, Plan, Rank
from onnx_lowrank.work.parallel import run_all
from onnx_lowrank.work.tasks import Task

CURVE = 24
"""Points of an error curve that are kept."""

ITERATIVE = ("cp3", "cp4")
"""Methods without a closed form: their errors are shown where a plan needed them, and not worked out for a picture."""


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
    settings = methods, planner.block, planner.target.formats.refuses
    with planner.stage("report"):
        seen = run_all(
            look_at,
            [Task((group, choices.get(group.names[0]), *settings), group.dense.cost.params) for group in groups],
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
    return tuple(points[i] for i in evenly(len(points), CURVE))

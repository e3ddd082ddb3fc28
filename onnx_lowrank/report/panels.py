"""What the page shows of layers and of a search: charts, and the same in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.candidates import show_rank
from onnx_lowrank.report.charts import Axis, Chart, ceiling
from onnx_lowrank.report.data import Report, Step
from onnx_lowrank.report.details import ERROR_KINDS, Curve, LayerDetails
from onnx_lowrank.report.numbers import PERCENT, TIMES, difference, digits, figure, percent
from onnx_lowrank.report.spectra import Spectrum
from onnx_lowrank.types import Rank, Skip

FLOOR = 1e-3
"""Of the largest singular value: what is smaller is drawn here."""

LOGARITHMS = ("energy", "accuracy")
"""Kinds of error that are no squares."""

FAR = 5
"""Times the accepted drop: what lost more is drawn at the bottom of a search."""

HALF = 0.5
"""Share of its MACs at which what a dense layer could become is compared."""


@dataclass(frozen=True)
class Alternative:
    """The least error of a method within some cost: rank, share of the layer's MACs, error."""

    decomposition: str
    rank: str
    macs: str
    error: str
    chosen: bool


@dataclass(frozen=True)
class Panel:
    """A layer on the page."""

    number: int
    details: LayerDetails
    charts: tuple[Chart, ...]
    spectra: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    within: str
    error: str
    """What the errors of the charts are of."""
    reason: str = ""
    """Why the layer is as it was."""

    @property
    def rank(self) -> str:
        return show_rank(self.details.rank)

    @property
    def kernel(self) -> str:
        return TIMES.join(map(str, self.details.weight_shape))

    @property
    def share(self) -> float:
        """Of the layer's MACs that are left."""
        return self.details.macs_after / self.details.macs_before if self.details.macs_before else 1.0


def panels(details: Sequence[LayerDetails], skips: Sequence[Skip] = ()) -> tuple[Panel, ...]:
    """The layers in their order; `skips` say why some are as they were."""
    reasons = {skip.layer: skip.reason for skip in skips}
    return tuple(_panel(number, layer, reasons.get(layer.name, "")) for number, layer in enumerate(details, 1))


def _panel(number: int, layer: LayerDetails, reason: str) -> Panel:
    charts = [spectrum_chart(layer)] if layer.spectra else []
    charts += [error_chart(layer, by_rank=True), error_chart(layer, by_rank=False)] if layer.curves else []
    share = layer.macs_after / layer.macs_before if layer.report and layer.macs_before else HALF
    return Panel(
        number,
        layer,
        tuple(charts),
        tuple(_in_words(spectrum, name) for spectrum, name in zip(layer.spectra, _modes(layer), strict=True)),
        tuple(_alternatives(layer, share)),
        percent(share),
        ERROR_KINDS[layer.error_kind],
        reason,
    )


def _modes(layer: LayerDetails) -> tuple[str, ...]:
    return ("output channels", "input channels") if len(layer.spectra) > 1 else ("",) * len(layer.spectra)


def _in_words(spectrum: Spectrum, mode: str) -> str:
    what = f"{mode}: " if mode else ""
    kept = "nothing above the noise" if spectrum.vbmf_rank == 0 else f"{spectrum.vbmf_rank} above the noise"
    cut = "" if spectrum.rank is None else f"; cut to {spectrum.rank}"
    rows, columns = spectrum.shape
    return f"{what}{min(spectrum.shape)} singular values of a {rows} {TIMES} {columns} matrix, by VBMF {kept}{cut}"


def spectrum_chart(layer: LayerDetails) -> Chart:
    """Singular values, VBMF's threshold and the chosen rank; a second mode is dashed."""
    high = max([1.0, *(s.threshold for s in layer.spectra)])
    smallest = min(s.values[-1] if s.values else 1.0 for s in layer.spectra)
    low = max(FLOOR, min(smallest, 0.5))
    most = max(max(s.places, default=1) for s in layer.spectra)
    words = "; ".join(_in_words(s, mode) for s, mode in zip(layer.spectra, _modes(layer), strict=True))
    chart = Chart(
        "Spectrum of the kernel",
        f"{layer.name}: {words}.",
        Axis("singular value, by size", 0, most),
        Axis("relative to the largest", 0.8 * low, 1.25 * high, logarithmic=True),
    )
    two = len(layer.spectra) > 1
    for row, (seen, mode) in enumerate(zip(layer.spectra, ("out ", "in ") if two else ("",), strict=True)):
        chart.line("spectrum", list(zip(seen.places, seen.values, strict=True)), f"{mode}spectrum", dashed=bool(row))
        if seen.threshold > 0:
            label = f"VBMF: {_ranks(layer.spectra) if two else f'rank {seen.vbmf_rank}'}" if not row else ""
            chart.across("threshold", seen.threshold, label)
        if seen.rank is not None:
            chart.upright("chosen", seen.rank, f"{mode}rank {seen.rank}", row)
    return chart


def _ranks(spectra: Sequence[Spectrum]) -> str:
    return ", ".join(f"{mode} {s.vbmf_rank}" for mode, s in zip(("out", "in"), spectra, strict=True))


def error_chart(layer: LayerDetails, *, by_rank: bool) -> Chart:
    """Error of every method, against its rank or against what it costs; a point at what was chosen."""
    curves = [
        (curve, _front_by_rank(curve) if by_rank else [(p[1], p) for p in curve.points]) for curve in layer.curves
    ]
    most = max((_root(layer, p[2]) for curve in layer.curves for p in curve.points), default=1.0)
    most = min(most, 1.0) if layer.error_kind not in LOGARITHMS else most
    y = Axis("-log" if layer.error_kind in LOGARITHMS else "relative error", 0, ceiling(most))
    if by_rank:
        widest = max((x for _, points in curves for x, _ in points), default=1.0)
        two = any(len(p[0]) > 1 for curve in layer.curves for p in curve.points)
        x = Axis("rank (of two: √(r₁·r₂))" if two else "rank", 0, widest)
    else:
        x = Axis("MACs left of the layer", 0, 1, percent=True)
    against = "rank" if by_rank else "cost"
    words = f"{layer.name}: {_best(layer)}." if by_rank else f"{layer.name}: the same errors, by MACs."
    chart = Chart(f"Error against {against}", words, x, y)
    for curve, points in curves:
        places = [(place, _root(layer, point[2])) for place, point in points]
        chart.line(curve.decomposition, places, curve.decomposition)
        if layer.report and layer.decomposition == curve.decomposition:
            near = min(curve.points, key=lambda p: (p[0] != layer.rank, abs(p[1] - _share(layer))))
            place = _one_rank(layer.rank) if by_rank else _share(layer)
            said = f"chosen: {curve.decomposition} {show_rank(layer.rank)}, predicted error {digits(_root(layer, near[2]))}"
            chart.mark(curve.decomposition, place, _root(layer, near[2]), said, chosen=True)
    return chart


def _share(layer: LayerDetails) -> float:
    return layer.macs_after / layer.macs_before if layer.macs_before else 1.0


def _one_rank(rank: Rank) -> float:
    return math.prod(rank) ** (1 / len(rank)) if rank else 0.0


def _root(layer: LayerDetails, error: float) -> float:
    """What is stored squared, as the plain error."""
    return error if layer.error_kind in LOGARITHMS else math.sqrt(max(error, 0.0))


def _front_by_rank(curve: Curve) -> list[tuple[float, tuple[Rank, float, float]]]:
    """Points by rank, without those of a pair of ranks that a smaller one is as good as."""
    kept: list[tuple[float, tuple[Rank, float, float]]] = []
    for place, point in sorted((_one_rank(p[0]), p) for p in curve.points):
        if not kept or point[2] < kept[-1][1][2]:
            kept.append((place, point))
    return kept


def _best(layer: LayerDetails) -> str:
    found = [a for a in _alternatives(layer, _share(layer) if layer.report else HALF) if a.rank]
    listed = "; ".join(f"{a.decomposition} {a.rank} {a.error}" for a in found)
    return f"least {ERROR_KINDS[layer.error_kind]} at the same cost: {listed}" if found else "nothing as cheap"


def _alternatives(layer: LayerDetails, share: float) -> list[Alternative]:
    """The best of each method that costs no more than `share` of the layer; the chosen one as it was chosen."""
    rows: list[tuple[float, Alternative]] = []
    for curve in layer.curves:
        chosen = bool(layer.report) and curve.decomposition == layer.decomposition
        exact = [p for p in curve.points if chosen and p[0] == layer.rank]
        within = exact or [p for p in curve.points if p[1] <= share * 1.001]
        if not within:
            rows.append((math.inf, Alternative(curve.decomposition, "", "no rank is as cheap", "", False)))
            continue
        rank, macs, error = min(within, key=lambda p: p[2])
        rows.append(
            (
                error,
                Alternative(curve.decomposition, show_rank(rank), percent(macs), digits(_root(layer, error)), chosen),
            )
        )
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


METRIC_OF = {"macs": "MACs", "params": "parameters", "size": "bytes on disk", "latency": "predicted latency"}
"""What a step of a search costs, in words."""


def search_metric(report: Report) -> str:
    """What a search went down in: the objective of a promise, or the first budget."""
    budgets = [b.metric for b in report.budgets if b.metric != "drop"]
    wanted = budgets[0] if budgets else str(report.config.get("objective", "macs"))
    timed = wanted != "latency" or any(step.latency is not None for step in report.search)
    return wanted if wanted in METRIC_OF and timed else "macs"


def step_cost(step: Step, metric: str) -> float | None:
    """Share of the original's `metric` that a step has left."""
    cost: float | None = getattr(step, {"size": "size_bytes"}.get(metric, metric))
    return cost


def search_chart(report: Report) -> Chart | None:
    """Accuracy against cost, of every plan that was measured; None where nothing was."""
    accuracy = report.accuracy
    if accuracy is None or not report.search:
        return None
    metric = search_metric(report)
    steps = [(cost, step) for step in report.search if (cost := step_cost(step, metric)) is not None]
    limit = report.config.get("max_drop")
    values = [accuracy.original, *(step.accuracy for _, step in steps)]
    values += [_lower(accuracy.original, step) for _, step in steps]
    values += [accuracy.original - limit] if limit is not None else []
    finite = [v for v in values if math.isfinite(v)]
    if not finite or not steps:
        return None
    # what is far below what was accepted is drawn at the bottom, so that the rest can be told apart
    low = max(min(finite), accuracy.original - FAR * limit) if limit else min(finite)
    room = 0.08 * (max(finite) - low) or 0.05
    high = min(max(finite) + room, 1.0) if max(finite) <= 1 else max(finite) + room
    chart = Chart(
        "Accuracy against cost",
        f"{len(steps)} plan{'s were' if len(steps) != 1 else ' was'} measured; {METRIC_OF[metric]} left against {accuracy.metric}.",
        Axis(f"{METRIC_OF[metric]} left", 0, max(1.0, *(cost for cost, _ in steps)), percent=True),
        Axis(accuracy.metric, low - room, high, percent=accuracy.metric in PERCENT),
        width=460,
        height=260,
    )
    if limit is not None:
        chart.across("threshold", accuracy.original - limit, f"least accepted: a drop of {limit:g}")
    chart.mark("original", 1.0, accuracy.original, f"original: {figure(accuracy.metric, accuracy.original)}")
    for number, (cost, step) in enumerate(steps, 1):
        bound = _lower(accuracy.original, step)
        chart.mark(
            "step",
            cost,
            step.accuracy,
            step_text(report, number, cost, step),
            down_to=bound if math.isfinite(bound) else None,
            chosen=step.chosen,
        )
    return chart


def _lower(original: float, step: Step) -> float:
    """What the accuracy is at least, with 95 % confidence."""
    return original - step.drop_upper_95


def step_text(report: Report, number: int, cost: float, step: Step) -> str:
    """A step in words."""
    assert report.accuracy is not None
    name, metric = report.accuracy.metric, search_metric(report)
    text = f"plan {number}: {percent(cost)} of the {METRIC_OF[metric]}, {name} {figure(name, step.accuracy)}, drop {difference(name, step.drop)}"
    if math.isfinite(step.drop_upper_95):
        text += f", at most {difference(name, step.drop_upper_95)} with 95 % confidence"
    return text + (" (the result)" if step.chosen else "")

"""The report as a page: one HTML file that needs nothing beside it, neither a network nor a server.

Names of models and layers come from others. They reach the page through the template alone, which escapes everything;
and the page's own policy lets a browser run no script but the one whose hash it names, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from onnx_lowrank.files import write_whole
from onnx_lowrank.report import numbers
from onnx_lowrank.report.data import BudgetResult, Report, Size, TargetResult, by_reason, environment, package_version
from onnx_lowrank.report.details import LayerDetails
from onnx_lowrank.report.panels import (
    METRIC_OF,
    Panel,
    panels,
    search_chart,
    search_metric,
    step_cost,
)
from onnx_lowrank.report.results import Inspection, Result, Verification
from onnx_lowrank.runtime import simulated
from onnx_lowrank.types import DENSE, Cost, LowRankError, printable
from onnx_lowrank.verification.verify import Accuracy, Latency

HASHED_BYTES = 1 << 20
"""Read at a time to tell a model's hash."""


@dataclass(frozen=True)
class Origin:
    """Where a page comes from.

    Parameters
    ----------
    model
        The model that was given: its path, or a name.
    command
        The command line, to be given again; empty where there was none.
    other
        A second model, or the result.
    """

    model: str
    command: str = ""
    other: str = ""


def require_jinja() -> None:
    """See that pages can be made.

    Raises
    ------
    LowRankError
        Where the extra is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise LowRankError("a report as a page needs Jinja: pip install 'onnx-lowrank[report]'") from error


def result_page(result: Result, origin: Origin) -> str:
    """The page of what `compress` or `apply` did, as HTML; `result` made with ``details=True`` has its layers too."""
    report = result.report
    return _render(
        origin,
        kind="Compression",
        verdict=("met", "Everything asked for was met")
        if report.met
        else ("unmet", "Not met: " + "; ".join(report.unmet)),
        cards=_cards(report.original, report.compressed, report.accuracy, report.latency),
        budgets=[_budget(budget, report.accuracy) for budget in report.budgets],
        notes=report.notes,
        layers=panels(result.details, report.skips),
        error_of=report.error_of,
        network=_network(result.details, report.original, report.compressed),
        search=_search(report),
        latency=_latencies(report.latency),
        skips=by_reason(report.skips),
        placement=_placement(report.latency, report.targets),
        accuracy=report.accuracy,
        seconds=report.seconds,
        options={key: value if isinstance(value, str) else json.dumps(value) for key, value in report.config.items()},
        machine=report.environment,
    )


def verification_page(check: Verification, origin: Origin) -> str:
    """The page of two models side by side, as HTML."""
    said = (
        "The provider asked for ran both models" if check.met else "The provider or the target does not take the model"
    )
    return _render(
        origin,
        kind="Verification",
        verdict=("met" if check.met else "unmet", said),
        cards=_cards(check.original, check.compressed, check.accuracy, check.latency),
        notes=check.notes,
        latency=_latencies(check.latency),
        placement=_placement(check.latency, check.targets),
        accuracy=check.accuracy,
        machine=check.environment,
    )


def inspection_page(view: Inspection, origin: Origin) -> str:
    """The page of what is in a model and what it could become, as HTML; `view` made with ``details=True`` has its layers."""
    return _render(
        origin,
        kind="Inspection",
        verdict=("plain", f"{len(view.layers)} layers that can be decomposed"),
        cards=_counts(view.cost, len(view.layers)),
        notes=view.notes,
        layers=panels(view.details, view.skips),
        network=_network(view.details, Size(view.cost.macs, view.cost.params, 0), None),
        skips=by_reason(view.skips),
        sections=view.sections,
        machine=environment(),
    )


def write_page(path: str | Path, text: str) -> None:
    """Write a page: the old file or the whole new one, never a part.

    Raises
    ------
    LowRankError
        Where it cannot be written.
    """
    path = Path(path)
    try:
        write_whole(path, [text.encode()])
    except OSError as error:
        raise LowRankError(f"{path} cannot be written ({error.strerror or error}): nothing was changed") from error


def _render(origin: Origin, **parts: Any) -> str:
    require_jinja()
    from jinja2 import Environment, StrictUndefined

    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {
        "short": numbers.short,
        "percent": numbers.percent,
        "digits": numbers.digits,
        "ms": numbers.milliseconds,
        "printable": printable,
    }
    script = _asset("page.js")
    shown = {
        "name": Path(origin.model).name,
        "origin": origin,
        "digest": _digest(origin.model),
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": package_version(),
        "style": _asset("page.css"),
        "dense": DENSE,
        "script": script,
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return engine.from_string(_asset("page.html")).render(DEFAULTS | parts | shown)


DEFAULTS: dict[str, Any] = {
    "budgets": (),
    "notes": (),
    "layers": (),
    "error_of": "kernel",
    "network": None,
    "search": None,
    "latency": (),
    "skips": (),
    "placement": None,
    "sections": (),
    "accuracy": None,
    "seconds": {},
    "options": {},
}
"""Parts of a page that not every kind has."""


def _asset(name: str) -> str:
    return files("onnx_lowrank.report").joinpath(name).read_text(encoding="utf-8")


def _digest(model: str) -> str:
    """SHA-256 of the model's file; empty where there is none."""
    digest = hashlib.sha256()
    try:
        with open(model, "rb") as file:
            while block := file.read(HASHED_BYTES):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


@dataclass(frozen=True)
class Card:
    """A figure before and after; `left` is the share that is left, where it is one to draw."""

    name: str
    headline: str
    before: str
    after: str
    note: str = ""
    left: float | None = None


def _cards(
    original: Size, compressed: Size, accuracy: Accuracy | None, latencies: Sequence[Latency]
) -> tuple[Card, ...]:
    cards = []
    for latency in latencies[:1]:
        provider = latency.provider.removesuffix("ExecutionProvider")
        on = f"{provider}, batch {latency.batch}, {latency.threads} thread{'s' if latency.threads != 1 else ''}"
        if math.isnan(latency.speedup):
            cards.append(Card("Speedup", "not run", "", "", f"not run on {on}"))
            continue
        interval = f"{latency.speedup_low_95:.2f} to {latency.speedup_high_95:.2f} with 95 % confidence"
        before, after = numbers.pair(latency.original_ms, latency.compressed_ms, numbers.milliseconds)
        cards.append(
            Card(
                "Speedup",
                f"{latency.speedup:.2f}{numbers.TIMES}",
                before,
                after,
                f"{interval}; {on}",
                1 / latency.speedup,
            )
        )
    if accuracy is not None:
        name = accuracy.metric
        bound = accuracy.drop_upper_95
        sure = f", at most {numbers.difference(name, bound)} with 95 % confidence" if math.isfinite(bound) else ""
        cards.append(
            Card(
                f"Accuracy, {name}",
                numbers.figure(name, accuracy.compressed),
                numbers.figure(name, accuracy.original),
                numbers.figure(name, accuracy.compressed),
                f"drop {numbers.difference(name, accuracy.drop)}{sure}; {accuracy.samples:,} samples",
            )
        )
    for name, attribute, shown in (
        ("MACs for one sample", "macs", numbers.short),
        ("Parameters", "params", numbers.short),
        ("Size on disk", "size_bytes", numbers.size),
    ):
        before_count, after_count = getattr(original, attribute), getattr(compressed, attribute)
        share = after_count / before_count if before_count else 1.0
        cards.append(
            Card(
                name, numbers.percent(share), *numbers.pair(before_count, after_count, shown), "of the original", share
            )
        )
    return tuple(cards)


def _counts(cost: Cost, layers: int) -> tuple[Card, ...]:
    return (
        Card("MACs for one sample", numbers.short(cost.macs), "", "", "Conv, ConvTranspose, Gemm and MatMul"),
        Card("Parameters", numbers.short(cost.params), "", "", "elements of every initializer"),
        Card("Layers", str(layers), "", "", "that can be decomposed"),
    )


def _budget(budget: BudgetResult, accuracy: Accuracy | None) -> dict[str, Any]:
    if budget.metric == "drop":
        metric = accuracy.metric if accuracy else ""
        name, asked, reached = (
            f"drop of {metric}",
            *(numbers.difference(metric, v) for v in (budget.asked, budget.reached)),
        )
        if accuracy and not math.isnan(accuracy.drop_upper_95):
            at_most = f"at most {reached}" if math.isfinite(budget.reached) else reached
            reached = f"{numbers.difference(metric, accuracy.drop)}, {at_most} with 95 % confidence"
    else:
        name = METRIC_OF.get(budget.metric, budget.metric).removeprefix("predicted ")
        asked, reached = numbers.percent(budget.asked), numbers.percent(budget.reached)
    foretold = "" if budget.predicted is None else f"predicted {numbers.percent(budget.predicted)}"
    return {
        "name": name,
        "asked": f"at most {asked}",
        "reached": reached if budget.measured else f"{reached} (predicted, not measured)",
        "foretold": foretold if budget.measured else "",
        "met": budget.met,
    }


@dataclass(frozen=True)
class Network:
    """The layers as a bar: MACs before and after, and those of all that is no layer here."""

    before: int
    after: int | None
    rest: int
    highest: int
    methods: tuple[str, ...]
    drawn: tuple[str, ...]


def _network(details: Sequence[LayerDetails], original: Size, compressed: Size | None) -> Network | None:
    if not details or not original.macs:
        return None
    rest = max(original.macs - sum(layer.macs_before for layer in details), 0)
    chosen = {layer.decomposition for layer in details}
    drawn = chosen | {curve.decomposition for layer in details for curve in layer.curves}
    return Network(
        original.macs,
        compressed.macs if compressed else None,
        rest,
        max(max(layer.macs_before, layer.macs_after) for layer in details) or 1,
        tuple(sorted(chosen - {DENSE})) + ((DENSE,) if DENSE in chosen else ()),
        tuple(sorted(drawn - {DENSE})),
    )


def _search(report: Report) -> dict[str, Any] | None:
    chart = search_chart(report)
    if chart is None or report.accuracy is None:
        return None
    metric, name = search_metric(report), report.accuracy.metric
    rows = []
    for step in report.search:
        cost = step_cost(step, metric)
        rows.append(
            {
                "cost": "" if cost is None else numbers.percent(cost),
                "accuracy": numbers.figure(name, step.accuracy),
                "drop": numbers.difference(name, step.drop),
                "bound": numbers.difference(name, step.drop_upper_95) if math.isfinite(step.drop_upper_95) else "none",
                "chosen": step.chosen,
            }
        )
    return {"chart": chart, "rows": rows, "metric": METRIC_OF[metric], "accuracy": name}


def _latencies(latencies: Sequence[Latency]) -> list[dict[str, Any]]:
    shown = []
    for latency in latencies:
        row: dict[str, Any] = {
            "provider": latency.provider,
            "batch": latency.batch,
            "threads": latency.threads,
            "simulated": simulated(latency.provider),
            "ran": not math.isnan(latency.speedup),
        }
        if row["ran"]:
            longest = max(
                latency.original_p90_ms, latency.compressed_p90_ms, latency.original_ms, latency.compressed_ms
            )
            row["bars"] = [
                (name, median, p90, 100 * median / longest, 100 * p90 / longest)
                for name, median, p90 in (
                    ("original", latency.original_ms, latency.original_p90_ms),
                    ("compressed", latency.compressed_ms, latency.compressed_p90_ms),
                )
            ]
            low, high = min(1.0, latency.speedup_low_95), max(1.0, latency.speedup_high_95)
            room = 0.12 * (high - low) or 0.1
            low, high = low - room, high + room
            row["speedup"] = (latency.speedup, latency.speedup_low_95, latency.speedup_high_95)
            row["places"] = [100 * (v - low) / (high - low) for v in (1.0, *row["speedup"])]
        shown.append(row)
    return shown


def _placement(latencies: Sequence[Latency], targets: Sequence[TargetResult]) -> dict[str, Any] | None:
    rows = []
    for latency in latencies:
        providers = dict.fromkeys([*latency.original_placement, *latency.placement])
        rows += [(p, latency.original_placement.get(p, 0), latency.placement.get(p, 0)) for p in providers]
    notes = [latency.fallback for latency in latencies if latency.fallback]
    if not rows and not targets and not notes:
        return None
    return {"rows": rows, "notes": notes, "targets": targets}


__all__ = ["Origin", "Panel", "inspection_page", "require_jinja", "result_page", "verification_page", "write_page"]

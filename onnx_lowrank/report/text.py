"""Renderings for the terminal, as rich tables: they fit its width. Piped, they lose their colours and take the width they need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box, markup
from rich.cells import cell_len
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from onnx_lowrank.candidates import show_rank
from onnx_lowrank.graph.shapes import Tensor
from onnx_lowrank.report import numbers
from onnx_lowrank.report.data import Report, Size, TargetResult, by_reason
from onnx_lowrank.report.results import Inspection, Verification
from onnx_lowrank.runtime import simulated
from onnx_lowrank.types import Skip, printable
from onnx_lowrank.verification.verify import Accuracy, Latency

Renderable = Table | str

SHOWN_SKIPS = 12
"""Reasons printed before the rest is counted; the JSON report has all."""

SHOWN_NAMES = 4
"""Of layers that repeat or are left alone for one reason, those that are listed."""

LEAST_NAME = 12
"""Characters that names keep on a narrow terminal, before other columns are folded."""

SENTENCE = 32
"""Characters that sentences keep beside them."""

GAP = 3
"""Characters between two columns."""


class Names:
    """Names in a cell, each cut short in the middle where the cell is narrower: one in two lines cannot be read."""

    def __init__(self, *names: str, before: str = "", after: str = "") -> None:
        self._names, self._before, self._after = [printable(name) for name in names], before, after

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Text]:
        comma = len(self._names) > 1 or bool(self._after)
        yield self._text([shortened(name, options.max_width - comma) for name in self._names])

    def __rich_measure__(self, console: Any, options: Any) -> Measurement:
        return Measurement(1, self._text(self._names).cell_len)

    def _text(self, names: Sequence[str]) -> Text:
        return Text(self._before + ", ".join(names) + self._after)


def shortened(name: str, width: int) -> str:
    """`name` in so many columns at most, with an ellipsis for its middle: its end says more than its beginning.

    Examples
    --------
    >>> shortened("/layer1/layer1.0/conv1/Conv", 20)
    '/layer….0/conv1/Conv'
    """
    if cell_len(name) <= width:
        return name
    start, end = name[: max(width - 1, 0) // 3], name
    while end and cell_len(start) + 1 + cell_len(end) > width:
        end = end[1:]
    return f"{start}…{end}"


class LayerTable(Table):
    """A table whose first column, of names, is what gives way; `sentences` is the column that is folded, where there is one."""

    sentences: int | None = None

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        needed = 0
        for index, column in enumerate(self.columns[1:], 1):
            cells = (column.header, *column.cells)
            width = max(Measurement.get(console, options, cell).maximum for cell in cells)
            needed += GAP + (min(width, SENTENCE) if index == self.sentences else width)
        self.columns[0].max_width = max(LEAST_NAME, options.max_width - needed)
        yield from super().__rich_console__(console, options)


def escape(text: str) -> str:
    """What comes from a model, as itself: no markup and nothing that a terminal obeys."""
    return markup.escape(printable(text))


def render_report(report: Report) -> Iterator[Renderable]:
    """What `compress` and `apply` say at the end."""
    if report.layers:
        yield _layer_table(report)
        yield ""
    yield from _skips(report.skips)
    yield _comparison(report.original, report.compressed, report.accuracy, report.latency, report.targets)
    yield ""
    for budget in report.budgets:
        mark = "[green]met[/]" if budget.met else "[red]not met[/]"
        foretold = "" if budget.predicted is None else f" (predicted {budget.predicted:.4g})"
        if budget.metric == "drop" and report.accuracy is not None:
            yield f"{_drop(report.accuracy)}; asked {budget.asked:.4g} - {mark}"
            continue
        if not budget.measured:
            yield f"{budget.metric}: asked {budget.asked:.4g}, predicted {budget.reached:.4g}, not measured - {mark}"
            continue
        yield f"{budget.metric}: asked {budget.asked:.4g}, reached {budget.reached:.4g}{foretold} - {mark}"
    yield from _notes(report.notes)
    yield (
        f"[dim]{sum(report.seconds.values()):.1f} s: "
        + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
        + "[/]"
    )


def _drop(accuracy: Accuracy) -> str:
    """What was lost, and what it may be at most: a promise is held on the second, where it can be told."""
    text = f"drop: {accuracy.drop:+.4f}"
    if math.isnan(accuracy.drop_upper_95):
        return text
    if math.isinf(accuracy.drop_upper_95):
        return f"{text}, without bound"
    return f"{text}, at most {accuracy.drop_upper_95:.4f} with 95 % confidence"


def render_verification(check: Verification) -> Iterator[Renderable]:
    """What `verify` says."""
    yield _comparison(check.original, check.compressed, check.accuracy, check.latency, check.targets)
    yield ""
    yield from _notes(check.notes)


def render_inspection(view: Inspection) -> Iterator[Renderable]:
    """What `inspect` says."""
    if view.inputs or view.outputs:
        yield f"inputs: {_tensors(view.inputs)}; outputs: {_tensors(view.outputs)}"
    yield _counts(view)
    yield ""
    table = _table(
        "layer", "op", "kernel", "MACs", "params", "at half cost", f"{view.error_of}\nerror", numbers=(3, 4, 6)
    )
    alone = {skip.layer for skip in view.skips}
    # those left alone are told with their reasons
    shown = [layer for layer in view.layers if layer.half or layer.name not in alone]
    for layer in shown:
        half = layer.half
        could = f"{half.decomposition} {show_rank(half.rank)}" if half else "nothing to gain"
        table.add_row(
            Names(layer.name),
            layer.op_type,
            show_rank(layer.weight_shape),
            numbers.short(layer.macs),
            numbers.short(layer.params),
            could,
            f"{half.error**0.5:.2f}" if half else "",
        )
    if shown:
        yield table
        yield ""
        of = (
            "the kernel, ||W - W~|| / ||W||,"
            if view.error_of == "kernel"
            else "the model's outputs, this layer changed alone,"
        )
        yield f"[dim]{view.error_of} error: relative error of {of} of the best decomposition at half the layer's MACs and parameters[/]"
    if view.sections:
        yield "layers that repeat, and may share a factor (--methods joint_left, joint_right, joint_both):"
        yield from (f"  {_listed(section)}" for section in view.sections)
        yield ""
    yield from _skips(view.skips)
    yield from _notes(view.notes)


def _table(*headers: str, numbers: Sequence[int] = (), sentences: int | None = None) -> Table:
    """A table that folds what is too long, but for names, which are whole when piped and in the JSON report."""
    table = LayerTable(*headers, box=box.MINIMAL, show_edge=False, pad_edge=False)
    table.sentences = sentences
    for index, column in enumerate(table.columns):
        column.overflow = "fold"
        column.justify = "right" if index in numbers else "left"
    return table


def _listed(names: Sequence[str]) -> str:
    """Names, or the first and the last of many."""
    if len(names) <= SHOWN_NAMES:
        return escape(", ".join(names))
    return escape(f"{', '.join(names[: SHOWN_NAMES - 1])} ... {names[-1]}: {len(names)} layers")


def _tensors(tensors: Sequence[Tensor]) -> str:
    """Inputs or outputs with their types, or the first of many."""
    text = ", ".join(map(str, tensors[:SHOWN_NAMES])) or "none"
    return escape(text) + (f" and {len(tensors) - SHOWN_NAMES} more" if len(tensors) > SHOWN_NAMES else "")


def _counts(view: Inspection) -> str:
    return f"{view.cost.macs:,} MACs for one sample, {view.cost.params:,} parameters, {len(view.layers)} layers"


def _layer_table(report: Report) -> Table:
    table = _table("layer", "decomposition", "rank", "MACs", "params", f"{report.error_of} error", numbers=(2, 3, 4, 5))
    for layer in report.layers:
        table.add_row(
            Names(layer.name),
            layer.decomposition,
            show_rank(layer.rank),
            _share(layer.macs_after, layer.macs_before),
            _share(layer.params_after, layer.params_before),
            f"{layer.relative_error:.3f}",
        )
    return table


def _share(after: int, before: int) -> str:
    return f"{after / before:.0%}" if before else "shared"


def _comparison(
    original: Size,
    compressed: Size,
    accuracy: Accuracy | None,
    latencies: Sequence[Latency],
    targets: Sequence[TargetResult],
) -> Table:
    table = _table("", "original", "compressed", "", numbers=(1, 2, 3))
    for name, attribute in (("MACs", "macs"), ("parameters", "params"), ("bytes", "size_bytes")):
        before, after = getattr(original, attribute), getattr(compressed, attribute)
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.3f}" if before else "")
    if accuracy is not None:
        bound = f"drop {accuracy.drop:+.4f}"
        if accuracy.drop_upper_95 == accuracy.drop_upper_95:
            bound += f", at most {accuracy.drop_upper_95:.4f} (95 %)"
        table.add_row(
            f"{escape(accuracy.metric)}, {accuracy.samples} samples",
            f"{accuracy.original:.4f}",
            f"{accuracy.compressed:.4f}",
            bound,
        )
        for name, value in accuracy.others.items():
            table.add_row(f"{name} with the original", "", f"{value:.4f}", "")
    for latency in latencies:
        provider = latency.provider.removesuffix("ExecutionProvider")
        imitated = " (simulator)" if simulated(latency.provider) else ""
        name = f"ms, {provider}{imitated}, batch {latency.batch}, {latency.threads} thread(s)"
        if math.isnan(latency.speedup):
            table.add_row(name, "", "", f"[yellow]not run on {provider}[/]")
            continue
        table.add_row(
            name,
            f"{latency.original_ms:.3f}",
            f"{latency.compressed_ms:.3f}",
            f"{latency.speedup:.2f}x ({latency.speedup_low_95:.2f} to {latency.speedup_high_95:.2f})",
        )
        elsewhere = {p: n for p, n in latency.placement.items() if p != latency.provider}
        if elsewhere:
            fell = ", ".join(f"{n} on {p.removesuffix('ExecutionProvider')}" for p, n in elsewhere.items())
            table.add_row("", "", "", f"[yellow]not all on {provider}: {fell}[/]")
    for target in targets:
        before, after = target.partitions["before"], target.partitions["after"]
        table.add_row(f"parts on {target.name}", str(before.num_partitions), str(after.num_partitions), "")
        taken = (f"{parts.num_supported} of {parts.num_nodes}" for parts in (before, after))
        table.add_row(f"nodes that {target.name} takes", *taken, "")
    return table


def _skips(skips: Sequence[Skip]) -> Iterator[Renderable]:
    if not skips:
        return
    table, named = _table("left alone", "op", "because", sentences=2), 0
    for reason, layers in by_reason(skips)[:SHOWN_SKIPS]:
        shown = layers if len(layers) <= SHOWN_NAMES else layers[: SHOWN_NAMES - 1]
        count = f"{len(layers)} layers: " if len(layers) > 1 else ""
        names = Names(*(skip.layer for skip in shown), before=count, after=", ..." if len(shown) < len(layers) else "")
        table.add_row(names, ", ".join(dict.fromkeys(skip.op_type for skip in layers)), escape(reason))
        named += len(shown)
    yield table
    if len(skips) > named:
        yield f"... and {len(skips) - named} more (--json F for all)"
    yield ""


def _notes(notes: Sequence[str]) -> Iterator[Renderable]:
    for note in notes:
        yield f"[yellow]note:[/] {escape(note)}"

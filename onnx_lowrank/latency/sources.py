"""Tables of times, wherever they come from: this machine's profiler, another engine, a file brought back from a device."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank.config import Config
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.latency.engines import OnMNN, mnn_times
from onnx_lowrank.latency.probes import digest
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.latency.timings import Place, Timings
from onnx_lowrank.latency.whole_times import WholeTimes, take_in
from onnx_lowrank.quantize import beginnings
from onnx_lowrank.subject import Subject
from onnx_lowrank.targets import Results, Target
from onnx_lowrank.types import Candidate, LowRankError, Progress

Table = LatencyTable | WholeTimes
"""What a planner asks for times."""


def check_target(subject: Subject, config: Config, target: Target) -> None:
    """See that what a target knows of times is of this model, and of what is asked for.

    Raises
    ------
    LowRankError
        Where it is not.
    """
    changed = config.changes_first
    if target.results and changed:
        raise LowRankError(
            f"{config.target} was measured of the model that was given, and {' and '.join(changed)} would make it another: leave it out"
        )
    if target.results and target.results.model != digest(subject):
        raise LowRankError(
            f"{config.target} was measured of another model, or for inputs of other sizes ({target.results.name}): "
            f"make a bundle of this one"
        )
    if target.results and target.results.batch != config.batch_size:
        raise LowRankError(
            f"{config.target} was measured on batches of {target.results.batch}, and batch_size {config.batch_size} was given: "
            f"the same was expected"
        )
    if config.quantize != "none" and not target.eight_bits:
        raise LowRankError(f"target {target.name} takes no nodes in eight bits: leave out quantize {config.quantize}")
    if target.engine and changed and config.needs_latency:
        raise LowRankError(
            f"target {target.name} is timed by models made of the one that was given, and {' and '.join(changed)} would make it "
            f"another: leave it out, or give a budget on macs or params"
        )
    if (target.engine or target.results) and config.quantize != "none" and config.needs_latency:
        raise LowRankError(
            f"target {target.name} is timed in floating point, and quantize {config.quantize} was given: give a budget on "
            f"macs or params, or leave out quantize"
        )


def filled_tables(
    subject: Subject,
    config: Config,
    target: Target,
    engine: OnMNN | None,
    block: int,
    candidates: Sequence[Sequence[Candidate]],
    progress: Progress,
) -> tuple[list[Table], tuple[str, ...]]:
    """The tables that plans are made by, filled; none where times cannot be told apart. And what is to be said of them."""
    if target.results is not None:
        known = device_times(subject, target.results)
        return [known], known.notes
    tables: list[Table] = []
    notes: tuple[str, ...] = ()
    if engine is not None:
        table: Table = mnn_times(subject, config, engine, block, progress)
        table.fill(candidates)
        return [table], _notes(table, config)
    plain = config.quantize == "none"
    ways = 1 if plain else len(beginnings(subject.model, infer(subject.model, subject.sample_shapes)))
    feeds = subject.feeds(config.batch_size)
    for way in range(ways):
        table = LatencyTable(subject, config, feeds, progress, way)
        if table.usable:
            table.fill(candidates)
            tables.append(table)
        notes = notes or _notes(table, config)
    return tables, notes


def device_times(subject: Subject, results: Results) -> WholeTimes:
    """The table that a device has filled."""
    timings = Timings({}, None)
    for model in sorted(results.models, key=lambda model: len(model.parts)):  # mixes say something beside their parts
        parts = [(Place(layer, method), rank, count) for layer, method, rank, count in model.parts]
        take_in(timings, parts, model.ratio, model.error)
    note = f"latency is predicted by times measured on {results.where}, of {len(results.models)} models; it was not measured there"
    if results.missing:
        note += f"; {results.missing} models were not timed, and what is between is estimated"
    return WholeTimes(subject, timings, results.original_ms, results.align, notes=(note,))


def _notes(table: Table, config: Config) -> tuple[str, ...]:
    """What the user should know of the times that a plan is made by."""
    if not table.usable:
        return (
            f"the time of single layers cannot be told on {config.provider}: the plan goes by MACs, "
            f"and the latency of the whole was measured",
        )
    if table.measured < table.wanted:
        return (
            f"the latency of {table.measured} of {table.wanted} chains was measured in the time given, that of the rest "
            f"estimated; what was measured is kept for the next run",
        )
    return ()

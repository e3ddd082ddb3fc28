"""analyze, apply, compress, verify, inspect, bundle, providers: the only file that knows the order of the stages."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import runtime
from onnx_lowrank.config import CHANGED_FIRST, Config, make_config
from onnx_lowrank.graph.probe import probe_model
from onnx_lowrank.graph.shapes import declared
from onnx_lowrank.interop import from_proto
from onnx_lowrank.latency.bundle import Bundle, write_bundle
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.planning.plans import check_dropped, plan_to_dict, read_choices, read_plan
from onnx_lowrank.quantize import check_unquantized
from onnx_lowrank.recipes import find_recipe
from onnx_lowrank.report.data import Report, environment
from onnx_lowrank.report.details import layer_details
from onnx_lowrank.report.notes import advice, of_provider, on_target
from onnx_lowrank.report.results import Inspection, LayerView, Result, Verification
from onnx_lowrank.runtime import RunSettings
from onnx_lowrank.search.bench import Attempt, Bench, open_bench
from onnx_lowrank.search.search import budget_results
from onnx_lowrank.subject import Subject, check_patterns, open_subject
from onnx_lowrank.targets import block_of
from onnx_lowrank.types import InputSpec, LowRankError, Plan, Progress, no_progress

MADE_WITH_SAMPLES = (
    "the plan was made for kernels fitted to samples, and none were given: without --calibrate they are those of the weights "
    "alone, and lose more"
)


def analyze(model: Any, *, config: Config | None = None, progress: Progress = no_progress, **options: Any) -> Plan:
    """Decide what every layer becomes, without touching the graph.

    Parameters
    ----------
    model
        A path, a ModelProto, a graphsurgeon Graph or an onnx-ir Model.
    config, options
        See :class:`~onnx_lowrank.config.Config`: a budget on ``macs`` or ``params``, or ``rank``.

    Raises
    ------
    LowRankError
        For a model or an option that cannot be used, or a budget out of reach.
    """
    config = configured(config, options)
    recipe = find_recipe(config.recipe)
    config = recipe.configure(config)
    planner = Planner(_opened(model, config, progress), config, progress, recipe.policy(config))
    if recipe.plan is None:
        raise LowRankError(f"recipe {config.recipe} finds its ranks while it trains: use compress")
    return recipe.plan(planner)


def apply(
    model: Any,
    plan: Plan | str | Path,
    *,
    config: Config | None = None,
    progress: Progress = no_progress,
    details: bool = False,
    **options: Any,
) -> Result:
    """Carry out a plan, made by `analyze` or read from a file, and verify the result as `compress` does."""
    config = configured(config, options)
    planner = Planner(_opened(model, config, progress), config, progress)
    if config.quantize != "none":
        check_unquantized(planner.subject.model)
    data = plan_to_dict(plan) if isinstance(plan, Plan) else read_plan(plan)
    check_dropped(data, planner.subject.dropped)
    choices = read_choices(data, planner.subject.groups)
    lost = (MADE_WITH_SAMPLES,) if data.get("fitted") and not planner.fitting.wanted else ()
    with open_bench(planner) as bench:
        return _finish(bench, model, bench.tuned(bench.attempt(planner.plan(choices, *lost))), details)


def compress(
    model: Any,
    *,
    config: Config | None = None,
    progress: Progress = no_progress,
    details: bool = False,
    **options: Any,
) -> Result:
    """Make a model smaller and faster, and check on ONNX Runtime that it is.

    Parameters
    ----------
    model
        A path, a ModelProto, a graphsurgeon Graph or an onnx-ir Model; never changed.
    config, options
        See :class:`~onnx_lowrank.config.Config`. At least one of ``budget``, ``max_drop``, ``rank``, ``quantize`` and
        ``drop_dead_channels``.
    details
        Also work out what the page of a report shows of each layer (``result.details``): spectra and error curves.

    Returns
    -------
    Result
        Look at ``result.met`` and ``result.report`` before using ``result.model``.

    Raises
    ------
    LowRankError
        For a model, data or options that cannot be used.
    """
    config = configured(config, options)
    recipe = find_recipe(config.recipe)
    config = recipe.configure(config)
    wanted = config.budget or config.max_drop is not None or config.rank or config.drop_dead_channels
    if not wanted and config.quantize == "none":
        raise LowRankError(
            "nothing was asked for: give a budget (macs=0.5), the largest drop accepted (max_drop 0.01), a rank estimator "
            "(vbmf), quantize int8 or drop_dead_channels"
        )
    if config.max_drop is not None and config.evaluate is None and config.calibrate is None:
        raise LowRankError("max_drop needs samples to hold it on: give --evaluate DATA")
    planner = Planner(_opened(model, config, progress), config, progress, recipe.policy(config))
    if config.quantize != "none":
        check_unquantized(planner.subject.model)
    if not planner.subject.found.layers:
        raise LowRankError(
            "the model has no layer to decompose (Conv, ConvTranspose, Gemm or MatMul with a stored float weight)"
            + "".join(f"; {skip.layer}: {skip.reason}" for skip in planner.subject.skips[:3])
        )
    with open_bench(planner) as bench:
        return _finish(bench, model, recipe.search(planner, bench), details)


def verify(
    original: Any, other: Any, *, config: Config | None = None, progress: Progress = no_progress, **options: Any
) -> Verification:
    """Accuracy, latency and placement of two models on the same samples.

    Raises
    ------
    LowRankError
        Where a model cannot be loaded, or the other has different inputs or outputs.
    """
    config = configured(config, options)
    if config.quantize != "none" or config.changes_first:
        raise LowRankError(f"verify compares two models as they are: leave out quantize, {', '.join(CHANGED_FIRST)}")
    subject, second = open_subject(original, config), open_subject(other, config)
    if not _fed_alike(subject.inputs, second.inputs):
        ends = (", ".join(map(str, declared(each.model)[0])) or "none" for each in (subject, second))
        raise LowRankError(
            f"the two models have different inputs, {' and '.join(ends)}: two versions of one model were expected"
        )
    planner = Planner(subject, config, progress)
    with open_bench(planner) as bench:
        attempt = bench.measure(second.model, Plan(()), (), second.model.path)
        latency = bench.latency(attempt)
        notes = bench.notes + of_provider(latency)
        targets = bench.parts(attempt)
        notes += on_target(planner, targets)
        return Verification(bench.original, attempt.size, attempt.accuracy, (latency,), notes, environment(), targets)


def _fed_alike(first: Sequence[InputSpec], second: Sequence[InputSpec]) -> bool:
    """Whether feeds of one model can be feeds of the other; an axis without a fixed size takes any, and so does no shape."""
    return len(first) == len(second) and all(
        (a.name, a.dtype) == (b.name, b.dtype)
        and (not a.shape or not b.shape or len(a.shape) == len(b.shape))
        and all(
            x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(a.shape, b.shape, strict=False)
        )
        for a, b in zip(first, second, strict=False)
    )


def inspect(
    model: Any,
    *,
    config: Config | None = None,
    progress: Progress = no_progress,
    details: bool = False,
    **options: Any,
) -> Inspection:
    """What is in a model, what each layer could become, and why others are left alone.

    With `details`, also what a page shows of each layer: spectra and error curves.
    """
    config = configured(config, options)
    planner = Planner(_opened(model, config, progress), config, progress)
    views: list[LayerView] = []
    for group, candidates in zip(planner.subject.groups, planner.sets.all(), strict=False):
        dense = group.dense.cost
        small = [c for c in candidates if 2 * c.cost.macs <= dense.macs and 2 * c.cost.params <= dense.params]
        half = min(small, key=lambda c: c.error, default=None)
        views += [
            LayerView(layer.name, layer.op_type, layer.spec.weight_shape, layer.macs, layer.spec.params, half)
            for layer in group.layers
        ]
    repeated = tuple(tuple(layer.name for layer in section.layers) for section in planner.subject.sections)
    seen = layer_details(planner) if details else ()
    subject = planner.subject
    ends = declared(subject.model)
    error_of = "output" if planner.fitting.wanted else "kernel"
    return Inspection(subject.cost, tuple(views), planner.skips(), subject.notes, repeated, seen, *ends, error_of)


def bundle(
    model: Any, out: str | Path, *, config: Config | None = None, progress: Progress = no_progress, **options: Any
) -> Bundle:
    """Write an archive that measures on a device what plans for it need: models without weights, and ``bench.py``.

    Parameters
    ----------
    model
        A path, a ModelProto, a graphsurgeon Graph or an onnx-ir Model.
    out
        Archive to write. What its ``bench.py`` writes on the device is a ``target`` of the other functions.

    Raises
    ------
    LowRankError
        For a model or an option that cannot be used, or a model without a layer to decompose.
    """
    config = configured(config, options)
    if config.changes_first:
        raise LowRankError(f"a bundle is of the model as it is: leave out {' and '.join(config.changes_first)}")
    planner = Planner(_opened(model, config, progress), config, progress)
    if planner.target.engine:
        raise LowRankError(
            f"a bundle runs ONNX Runtime on the device, and target {planner.target.name} was given: leave it out"
        )
    made_for = planner.target.results.target if planner.target.results else planner.target.name
    return write_bundle(planner.subject, config, planner.sets.all(), made_for, planner.block, Path(out), progress)


def providers(*, config: Config | None = None, **options: Any) -> tuple[tuple[str, str], ...]:
    """Execution providers that this build of ONNX Runtime has a name for, and what each does on this machine.

    All but the CPU's are tried in a process of their own.
    """
    config = configured(config, options)
    model, feeds = probe_model()
    libraries, asked = tuple(config.provider_library.items()), tuple(config.provider_option.items())
    missing = {name: f"not in this build{runtime.needs(name)}" for name in runtime.known_providers()}
    apart = dict.fromkeys([*runtime.installed_plugins(), *config.provider_library])
    wanted = runtime.named(config.provider, [*missing, *apart])
    if wanted is None:
        raise LowRankError(
            f"execution provider '{config.provider}' is not known: one of {', '.join(missing)} was expected"
        )
    found: dict[str, str] = {}
    for name in dict.fromkeys([*runtime.available_providers(), *apart, *([wanted] if config.accelerated else [])]):
        options_of = asked if name == wanted else ()
        settings = RunSettings(name, libraries=libraries if name in apart else (), options=options_of)
        try_it = runtime.probe if name == runtime.CPU else runtime.probe_apart
        found[name] = try_it(settings, model, feeds)
    return tuple({**found, **{name: why for name, why in missing.items() if name not in found}}.items())


def configured(config: Config | None, options: Mapping[str, Any]) -> Config:
    """The options of a call: a Config, or keywords that make one."""
    if config is not None and options:
        raise LowRankError(f"config and {', '.join(options)} were given: put every option into config, or give none")
    return config or make_config(**options)


def _opened(model: Any, config: Config, progress: Progress) -> Subject:
    dead_block = block_of(config) if config.drop_dead_channels else None
    subject = open_subject(model, config, dead_block=dead_block, progress=progress)
    check_patterns(subject, config)
    return subject


def _finish(bench: Bench, given: Any, best: Attempt, detailed: bool) -> Result:
    """Time the best attempt and report on it."""
    planner = bench.planner
    latency, targets = bench.latency(best), bench.parts(best)
    details = layer_details(planner, best.plan, best.layers) if detailed else ()
    report = Report(
        bench.original,
        best.size,
        best.layers,
        best.plan.skips,
        budget_results(planner.config, bench.original, best, latency),
        best.accuracy,
        (latency,),
        dict(planner.seconds),
        environment(),
        best.plan.notes
        + bench.notes
        + advice(planner, best.layers, best.accuracy, latency)
        + on_target(planner, targets),
        bench.is_original(best),
        planner.config.to_dict(),
        targets,
        bench.search(best),
    )
    model, kept = bench.release(bench.model_of(best))
    feeds, compiled = planner.subject.feeds(), planner.target.compiled
    result = Result(from_proto(model.proto, given), best.plan, report, model, feeds, compiled, details)
    if kept is not None:
        weakref.finalize(result, shutil.rmtree, kept, ignore_errors=True)
    return result

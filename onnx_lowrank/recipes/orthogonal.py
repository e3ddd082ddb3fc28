"""``orthogonal``: train a factorised network of full rank with factors kept orthogonal, then cut ranks by VBMF, then train again.

1. Every convolution becomes its decomposition of full rank (``--methods``: tucker2, the default, channel_svd, channel_svd_in or
   cp3): more parameters than before, the same function. 2. It is trained with the loss of the task and ``--orthogonality`` times
   the distance of the outer factors from orthonormal ones (0: the same pipeline without). 3. The chains are composed to kernels
   again, their ranks are estimated (``--rank``, vbmf where nothing is said), and they are truncated. 4. The small network is
   trained.

Our reading: the outer factors are the pointwise stages; they are orthonormal at the start. Layers whose estimated rank saves nothing
keep their composed kernel.

References
----------
Wu, Jiang & He (2024), "Convolutional neural network compression based on low-rank decomposition", arXiv 2408.16289.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.candidates import Group, is_spatial_convolution, price, refused
from onnx_lowrank.config import METHODS, Config
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.decompositions.matrix import is_pointwise
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.plain import PlainGraph, is_floating, plain_graph, with_values
from onnx_lowrank.planning.candidate_sets import Policy
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Candidate, LowRankError

KINDS = ("tucker2", "channel_svd", "channel_svd_in", "cp3")
"""Decompositions whose outer factors are pointwise stages."""


def configure(config: Config) -> Config:
    """One decomposition, and labels to learn.

    Raises
    ------
    LowRankError
        Where others were asked for.
    """
    if config.finetune != "labels":
        raise LowRankError("recipe orthogonal trains with the loss of the task: give --finetune labels --train DATA")
    if config.budget or config.max_drop is not None:
        raise LowRankError(
            "recipe orthogonal takes its ranks from an estimator: leave out --budget and --max-drop, see --rank"
        )
    methods = ("tucker2",) if config.methods == METHODS else config.methods
    if len(methods) != 1 or methods[0] not in KINDS:
        raise LowRankError(
            f"recipe orthogonal with methods {', '.join(methods)}: one of {', '.join(KINDS)} was expected"
        )
    return replace(config, methods=methods, rank=config.rank or "vbmf", align=config.align or 1)


def policy(config: Config) -> Policy:
    """Kernels of the weights alone."""
    return Policy(plain=True)


def search(planner: Planner, bench: Bench) -> Attempt:
    """Widen, train, cut, train."""
    refiner, config = bench.refiner, planner.config
    assert refiner is not None  # the options say so
    groups = planner.subject.groups
    before = plain_graph(planner.subject.model)
    choices = {
        group.names[0]: choice
        for group in groups
        if (choice := _full(group, config.methods[0], before.values))
        and not refused(group, choice, planner.target.formats.refuses)
    }
    if not choices:
        raise LowRankError("recipe orthogonal: the model has no plain convolution to factorise")
    wide, reports = planner.carry_out(planner.plan([choices.get(group.names[0], group.dense) for group in groups]))
    graph = plain_graph(wide)
    kernels = {report.name: _stored(graph, report) for report in reports}
    wide = with_values(wide, _orthonormal(graph, choices, kernels))
    outer = [
        kernel
        for report in reports
        for stage, kernel in zip(choices[report.name].chains[0], kernels[report.name], strict=True)
        if is_pointwise(stage.spec)
    ]
    touched = [node for report in reports for node in report.nodes]
    with planner.stage("finetune"):
        first = refiner.refine(
            wide,
            touched,
            settings=replace(refiner.settings(), keep_last=True),
            orthogonal=outer,
            weight=1.0 if config.orthogonality is None else config.orthogonality,
        )
    composed = _composed(planner, before, first.model, choices, kernels, reports)
    step = Planner(open_subject(composed, config), config, planner.progress, planner.policy)
    plan = step.estimated()
    small, layers = step.carry_out(plan)
    with planner.stage("finetune"):
        second = refiner.refine(small, [node for layer in layers for node in layer.nodes])
    epochs = ", ".join(
        f"{epoch}: {value:.3g}" for (epoch, *_), value in zip(first.run.scores, first.run.watched, strict=True)
    )
    notes = (
        f"factorised at full rank, {first.note}",
        f"distance from orthogonal factors, by epoch: {epochs}",
        f"truncated, {second.note}",
    )
    return bench.measure(planner.finished(second.model), plan.with_notes(*notes), layers)


def _full(group: Group, method: str, values: Mapping[str, np.ndarray]) -> Candidate | None:
    """The candidate of full rank of a plain convolution whose kernel is stored as it is; None for other layers."""
    layer = group.layers[0]
    kernel = values.get(layer.weight_name)
    if kernel is None or kernel.shape != layer.spec.weight_shape:
        return None
    decomposition = find_decomposition(method)
    if not is_spatial_convolution(group) or lift.refuses(decomposition, [layer.spec]):
        return None
    return price(group, method, lift.max_rank(decomposition, [layer.spec]), math.nan)


def _stored(graph: PlainGraph, report: LayerReport) -> list[str]:
    """Names of the kernels of a layer's chain."""
    nodes = {node.key: node for node in graph.nodes}
    return [nodes[name].inputs[1] for name in report.nodes]


def _orthonormal(
    graph: PlainGraph, choices: Mapping[str, Candidate], kernels: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Kernels of the same functions, with outer factors that are orthonormal where the next stage mixes all channels."""
    values: dict[str, np.ndarray] = {}
    for name, names in kernels.items():
        stages = choices[name].chains[0]
        parts = [graph.stored[each].astype(np.float64) for each in names]
        if is_pointwise(stages[-1].spec) and stages[-2].spec.group == 1:
            basis, rest = np.linalg.qr(parts[-1].reshape(parts[-1].shape[:2]))
            parts[-1] = basis.reshape(*basis.shape, *parts[-1].shape[2:])
            parts[-2] = np.einsum("rc,c...->r...", rest, parts[-2])
        if is_pointwise(stages[0].spec) and stages[1].spec.group == 1:
            basis, rest = np.linalg.qr(parts[0].reshape(parts[0].shape[:2]).T)
            parts[0] = basis.T.reshape(*basis.T.shape, *parts[0].shape[2:])
            parts[1] = np.einsum("oc...,rc->or...", parts[1], rest)
        values |= dict(zip(names, parts, strict=True))
    return values


def _composed(
    planner: Planner,
    before: PlainGraph,
    wide: Model,
    choices: Mapping[str, Candidate],
    kernels: Mapping[str, Sequence[str]],
    reports: Sequence[LayerReport],
) -> Model:
    """The original graph with all that was trained: chains as the kernels that they compute."""
    graph = plain_graph(wide)
    nodes = {node.key: node for node in graph.nodes}
    given = {node.key: node for node in before.nodes}
    values = {name: value for name, value in graph.values.items() if name in before.values and is_floating(value)}
    layers = {layer.name: layer for layer in planner.subject.found.layers}
    for report in reports:
        layer = layers[report.name]
        parts = [graph.stored[name] for name in kernels[report.name]]
        values[layer.weight_name] = lift.compose(choices[report.name].chains[0], parts)
        last, old = nodes[report.nodes[-1]], given[report.name]
        if len(last.inputs) > 2 and len(old.inputs) > 2:
            values[old.inputs[2]] = graph.values[last.inputs[2]]
    return with_values(planner.subject.model, values)

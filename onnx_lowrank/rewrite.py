"""A plan carried out: kernels factorised, islands spliced in."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lowrank.cache import UNKEPT, Kept
from onnx_lowrank.candidates import Group, chain_macs, group_of, group_task, loaded_task, methods_key, show_rank
from onnx_lowrank.correction import corrected_biases
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.splice import Replacement, splice
from onnx_lowrank.parallel import Work, run_all
from onnx_lowrank.refit import refit
from onnx_lowrank.types import Candidate, Chain, Factorization, LayerStatistics, LowRankError, Plan, Progress


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    op_type: str
    decomposition: str
    rank: tuple[int, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    relative_error: float
    converged: bool
    next_step: str
    nodes: tuple[str, ...]


class FactorCache:
    """Factorizations made so far, so that a search that comes back to a candidate does not repeat its work."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Factorization] = {}

    def get(self, choice: Candidate) -> Factorization | None:
        return self._made.get((choice.layers, choice.decomposition, choice.rank))

    def put(self, choice: Candidate, made: Factorization) -> None:
        self._made[choice.layers, choice.decomposition, choice.rank] = made


def rewrite(
    model: Model,
    found: Found,
    groups: Sequence[Group],
    plan: Plan,
    *,
    seed: int,
    work: Work,
    kept: Kept = UNKEPT,
    progress: Progress,
    cache: FactorCache | None = None,
    feeds: list[dict[str, np.ndarray]] | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    correct: bool = True,
) -> tuple[Model, tuple[LayerReport, ...]]:
    """A copy of `model` with `plan` carried out, and what became of each layer.

    Raises
    ------
    LowRankError
        Where a layer cannot be factorised or written; its name, decomposition and rank are in the message.
    """
    by_layer = {name: group for group in groups for name in group.names}
    chosen = [(group_of(c.layers, by_layer), c) for c in plan.choices if not c.dense]
    choices = [choice for _, choice in chosen]
    biases: dict[str, np.ndarray] = {}
    if feeds:  # each fit depends on those before it: nothing can be kept from another plan
        seen = statistics or {}
        fitted = refit(model, found, choices, feeds, statistics=seen, seed=seed, kept=kept, progress=progress)
        made = {choice: fitted[choice.layers] for choice in choices}
    else:
        made = _by_weights(chosen, FactorCache() if cache is None else cache, seed, work, progress)
        if correct:
            biases = corrected_biases(model, found, made)
    replacements, reports = [], []
    for group, choice in chosen:
        factorization = made[choice]
        for index, (layer, chain) in enumerate(zip(group.layers, choice.chains, strict=True)):
            kernels = factorization.of(index)
            bias = factorization.biases[index] if factorization.biases else biases.get(layer.name)
            replacements.append(Replacement(layer.name, choice.decomposition, choice.rank, chain, kernels, bias))
            reports.append((group, layer, chain, choice, factorization, index == 0))
    result, nodes = splice(model, found, replacements)
    return result, tuple(
        LayerReport(
            layer.name,
            layer.op_type,
            choice.decomposition,
            choice.rank,
            layer.macs,
            chain_macs(chain, layer),
            layer.spec.params if first or group.joint else 0,  # a kernel that several layers read is counted once
            _stored_by(choice, chain, first=first),
            factorization.relative_error,
            factorization.converged,
            factorization.next_step,
            nodes[layer.name],
        )
        for group, layer, chain, choice, factorization, first in reports
    )


def sketch(model: Model, found: Found, plan: Plan) -> Model:
    """A copy of `model` in the form that `plan` gives it, with zeros for kernels: what it looks like costs no fit."""
    dtypes = {layer.name: layer.dtype for layer in found.layers}
    replacements = []
    for choice in plan.choices:
        for name, chain in zip(choice.layers, choice.chains, strict=False):  # a dense one has no chains
            kernels = [np.zeros(stage.spec.weight_shape, dtypes[name]) for stage in chain]
            replacements.append(Replacement(name, choice.decomposition, choice.rank, chain, kernels))
    return splice(model, found, replacements)[0]


def _stored_by(choice: Candidate, chain: Chain, *, first: bool) -> int:
    """Parameters of a layer's chain: what it shares with others counts for the first of them."""
    own = sum(math.prod(shape) for stage in chain for tag, shape in stage.pieces if not tag)
    others = sum(
        math.prod(shape) for each in choice.chains[1:] for stage in each for tag, shape in stage.pieces if not tag
    )
    return choice.cost.params - others if first else own


def _by_weights(
    chosen: Sequence[tuple[Group, Candidate]], cache: FactorCache, seed: int, work: Work, progress: Progress
) -> dict[Candidate, Factorization]:
    """Every choice factorised by the weights alone, or taken from the cache."""
    known = {choice: cache.get(choice) for _, choice in chosen}
    todo = [(group, choice) for group, choice in chosen if known[choice] is None]
    tasks = [
        group_task(
            group,
            *(choice, seed),
            size=group.layers[0].spec.params,
            key=(methods_key(choice.decomposition), choice.rank, seed),
        )
        for group, choice in todo
    ]
    made = run_all(_factorize, tasks, loaded_task, work=work, progress=progress, stage="factorize")
    for (_, choice), new in zip(todo, made, strict=True):
        cache.put(choice, new)
        known[choice] = new
    return {choice: factorization for choice, factorization in known.items() if factorization is not None}


def _factorize(given: tuple[Any, ...]) -> Factorization:
    group, choice, seed = given
    layer = group.layers[0]
    # a stream of its own for each layer: the result does not depend on the order or on what else is decomposed
    rng = np.random.default_rng([seed, zlib.crc32(layer.name.encode())])
    decomposition = find_decomposition(choice.decomposition)
    try:
        specs, weights = [x.spec for x in group.owners], [x.read_weight() for x in group.owners]
        made = lift.factorize(decomposition, specs, weights, choice.rank, rng=rng)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise LowRankError(
            f"layer '{layer.name}', {choice.decomposition} of rank {show_rank(choice.rank)}: {error}"
        ) from error
    # in the model's precision from here on: a cache of float64 kernels would be as large as the model itself
    return made.stored(layer.dtype)

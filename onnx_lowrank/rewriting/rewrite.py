"""A plan carried out: kernels factorised, islands spliced in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onnx_lowrank.cache import UNKEPT, Kept
from onnx_lowrank.candidates import Group, chain_macs, group_of
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.splice import Replacement, splice
from onnx_lowrank.layer_tasks import factorize_group, group_task, loaded_task, methods_key
from onnx_lowrank.rewriting.correction import corrected_biases
from onnx_lowrank.rewriting.refit import fits, refit
from onnx_lowrank.types import Candidate, Chain, Factorization, Layer, LayerStatistics, LowRankError, Plan, Progress
from onnx_lowrank.work.parallel import run_all
from onnx_lowrank.work.tasks import Work


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Parameters
    ----------
    name, op_type
        Of the node that was replaced.
    decomposition, rank
        What it became; the rank has a number for each mode.
    macs_before, macs_after
        Multiply-accumulates for one sample.
    params_before, params_after
        Elements of the kernels; one that several layers read counts for the first of them.
    relative_error
        Of the layer's output where it was `fitted`, of its kernel otherwise.
    converged, next_step
        Whether the fit did, and what to try where it did not.
    nodes
        Names of the new nodes.
    fitted
        Whether it was fitted to samples.
    """

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
    fitted: bool = False


class FactorCache:
    """Factorizations made so far, so that a search that comes back to a candidate does not repeat its work.

    Parameters
    ----------
    folder
        Where kernels wait, of a model too large for them to be in memory; None keeps them there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._made: dict[tuple[object, ...], Factorization] = {}
        self._files: dict[tuple[object, ...], tuple[Path, list[list[tuple[tuple[int, ...], np.dtype]]]]] = {}

    def __contains__(self, choice: Candidate) -> bool:
        return _key(choice) in self._made

    def get(self, choice: Candidate) -> Factorization:
        """What was put in for a choice; kernels on disk are read again each time."""
        made = self._made[_key(choice)]
        if _key(choice) not in self._files:
            return made
        path, forms = self._files[_key(choice)]
        with open(path, "rb") as file:
            kernels = tuple(tuple(_read(file, *form) for form in layer) for layer in forms)
        return replace(made, kernels=kernels)

    def put(self, choice: Candidate, made: Factorization) -> None:
        key = _key(choice)
        if self._folder is not None:
            path = self._folder / f"factors-{len(self._made)}"
            try:
                with open(path, "wb") as file:
                    for kernel in (kernel for layer in made.kernels for kernel in layer):
                        file.write(np.ascontiguousarray(kernel).view(np.uint8).data)
            except OSError as error:
                raise LowRankError(
                    f"{self._folder} cannot be written ({error.strerror}): it needs room for the factors; TMPDIR names another"
                ) from error
            self._files[key] = path, [[(kernel.shape, kernel.dtype) for kernel in layer] for layer in made.kernels]
            made = replace(made, kernels=())
        self._made[key] = made

    def clear(self) -> None:
        """Forget everything, and give back its room."""
        for path, _ in self._files.values():
            path.unlink(missing_ok=True)
        self._made.clear()
        self._files.clear()


def _key(choice: Candidate) -> tuple[object, ...]:
    return choice.layers, choice.decomposition, choice.rank


def _read(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


class _FromCache(Mapping[Candidate, Factorization]):
    """Factorizations of some choices, each read when it is asked for."""

    def __init__(self, cache: FactorCache, choices: Sequence[Candidate]) -> None:
        self._cache, self._choices = cache, choices

    def __getitem__(self, choice: Candidate) -> Factorization:
        return self._cache.get(choice)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)


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
    folder: Path | None = None,
) -> tuple[Model, tuple[LayerReport, ...]]:
    """A copy of `model` with `plan` carried out, and what became of each layer.

    Parameters
    ----------
    folder
        For a model too large to be in memory: where its external data go, and its factors until they are written.

    Raises
    ------
    LowRankError
        Where a layer cannot be factorised or written; its name, decomposition and rank are in the message.
    """
    by_layer = {name: group for group in groups for name in group.names}
    chosen = [(group_of(c.layers, by_layer), c) for c in plan.choices if not c.dense]
    choices = [choice for _, choice in chosen]
    biases: dict[str, np.ndarray] = {}
    made: Mapping[Candidate, Factorization]
    own = cache is None
    cache = FactorCache(folder) if cache is None else cache
    if feeds:  # each fit depends on those before it: nothing can be kept from another plan
        seen = statistics or {}
        fitted = refit(model, found, choices, feeds, statistics=seen, seed=seed, kept=kept, progress=progress)
        made = {choice: fitted[choice.layers] for choice in choices}
    else:
        _by_weights(chosen, cache, seed, work, progress)
        made = _FromCache(cache, choices)
        if correct:
            biases = corrected_biases(model, found, made)
    reports: list[tuple[Group, Layer, Chain, Candidate, Factorization, bool]] = []

    def replacements() -> Iterator[Replacement]:
        for group, choice in chosen:
            factorization = made[choice]
            done = replace(factorization, kernels=(), biases=())
            for index, (layer, chain) in enumerate(zip(group.layers, choice.chains, strict=True)):
                bias = factorization.biases[index] if factorization.biases else biases.get(layer.name)
                reports.append((group, layer, chain, choice, done, index == 0))
                kernels = factorization.of(index)
                yield Replacement(layer.name, choice.decomposition, choice.rank, chain, kernels, bias)

    result, nodes = splice(model, found, replacements(), folder)
    if own:
        cache.clear()
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
            bool(feeds) and fits(choice.decomposition, group.layers),
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
) -> None:
    """See that every choice is in the cache, factorised by the weights alone."""
    todo = [(group, choice) for group, choice in chosen if choice not in cache]
    tasks = [
        group_task(
            group,
            *(choice, seed),
            size=group.layers[0].spec.params,
            key=(methods_key(choice.decomposition), choice.rank, seed),
        )
        for group, choice in todo
    ]
    run_all(
        factorize_group,
        tasks,
        loaded_task,
        work=work,
        progress=progress,
        stage="factorize",
        keep=lambda index, made: cache.put(todo[index][1], made),
    )

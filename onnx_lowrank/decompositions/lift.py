"""Groups and transposed convolutions, brought to plain convolutions once for every decomposition.

*Groups*: each group alone, so that the whole is block-diagonal. Kernels of grouped stages stack along their
first axis, whatever the decomposition.

*ConvTranspose*: a convolution of the input with zeros between its numbers, each tap of the kernel named by where it reads.
So its kernel is that of a convolution with the two channel axes exchanged, and so is that of every stage of its chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.decompositions.matrix import is_pointwise
from onnx_lowrank.linalg import squared_norm
from onnx_lowrank.types import (
    Chain,
    ConvSpec,
    Decomposition,
    Factorization,
    LayerStatistics,
    Rank,
    Stage,
)


def plain(spec: ConvSpec) -> ConvSpec:
    """One group of `spec`, as a convolution that is not transposed."""
    first, second, *kernel = spec.weight_shape
    channels = (second, first // spec.group) if spec.transposed else (first // spec.group, second)
    return replace(spec, weight_shape=(*channels, *kernel), group=1, transposed=False)


def by_output(spec: ConvSpec, kernel: np.ndarray) -> np.ndarray:
    """A kernel in ONNX order as (O, I / group, *spatial); one of a ConvTranspose comes as (I, O / group, *spatial)."""
    return _exchanged(kernel, spec.group) if spec.transposed else kernel


def in_onnx_order(spec: ConvSpec, kernel: np.ndarray) -> np.ndarray:
    """The inverse of :func:`by_output`."""
    return _exchanged(kernel, spec.group) if spec.transposed else kernel


def _exchanged(kernel: np.ndarray, group: int) -> np.ndarray:
    """(group * a, b, ...) as (group * b, a, ...), each group by itself."""
    first, second, *spatial = kernel.shape
    blocks = kernel.reshape(group, first // group, second, *spatial).swapaxes(1, 2)
    return np.ascontiguousarray(blocks).reshape(group * second, first // group, *spatial)


def refuses(decomposition: Decomposition, specs: Sequence[ConvSpec]) -> str | None:
    """Why layers cannot be decomposed this way; None where they can."""
    if len(specs) > 1 and any(spec.group > 1 or spec.transposed for spec in specs):
        return "layers with groups and transposed ones are not joined"
    if specs[0].depthwise:
        return "depthwise: no channel is mixed with another, so there is nothing to factorise"
    return decomposition.refuses([plain(spec) for spec in specs])


def max_rank(decomposition: Decomposition, specs: Sequence[ConvSpec]) -> Rank:
    """The rank (of each group) at which the chain can reproduce any kernel."""
    return decomposition.max_rank([plain(spec) for spec in specs])


def chains(decomposition: Decomposition, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
    """The chain of each layer, with its groups and its direction."""
    per_layer = decomposition.chain([plain(spec) for spec in specs], rank)
    return tuple(_lift_chain(spec, chain) for spec, chain in zip(specs, per_layer, strict=True))


def rank_step(decomposition: Decomposition, specs: Sequence[ConvSpec], block: int) -> int:
    """Step of the rank at which the channels between the stages are multiples of `block`, of each group."""
    specs = [plain(spec) for spec in specs]
    least = (1,) * len(decomposition.max_rank(specs))
    first = decomposition.chain(specs, least)[0][0].spec
    return block // math.gcd(block, first.out_channels)


def errors(
    decomposition: Decomposition,
    specs: Sequence[ConvSpec],
    weights: Sequence[np.ndarray],
    ranks: Sequence[Rank],
    statistics: Sequence[LayerStatistics] | None = None,
) -> np.ndarray:
    """Predicted squared relative error for each of `ranks`, over all groups."""
    parts, seen = _groups(specs, weights), _group_statistics(specs, statistics)
    energy = _energies(parts, seen)
    if energy.sum() == 0:
        return np.zeros(len(ranks))
    each = np.array([decomposition.errors(part, ranks, stats) for part, stats in zip(parts, seen, strict=True)])
    return energy @ each / energy.sum()


def estimate_rank(
    decomposition: Decomposition,
    specs: Sequence[ConvSpec],
    weights: Sequence[np.ndarray],
    estimator: Callable[[np.ndarray], int],
) -> Rank:
    """The estimated rank; the largest over the groups, which share one."""
    each = [decomposition.estimate_rank(part, estimator) for part in _groups(specs, weights)]
    return tuple(max(ranks) for ranks in zip(*each, strict=True))


def factorize(
    decomposition: Decomposition,
    specs: Sequence[ConvSpec],
    weights: Sequence[np.ndarray],
    rank: Rank,
    statistics: Sequence[LayerStatistics] | None = None,
    *,
    rng: np.random.Generator,
    start: Sequence[Sequence[np.ndarray]] | None = None,
    draft: bool = False,
) -> Factorization:
    """Kernels for :func:`chains`, in float64."""
    parts, seen = _groups(specs, weights), _group_statistics(specs, statistics)
    declared = chains(decomposition, specs, rank)
    begin = _group_starts(specs, declared, start)
    results = [
        decomposition.factorize(part, rank, stats, rng=rng, start=kernels, draft=draft)
        for part, stats, kernels in zip(parts, seen, begin, strict=True)
    ]
    energy = _energies(parts, seen)
    squared = np.square([result.relative_error for result in results])
    stacked = (
        [np.concatenate(blocks) if len(blocks) > 1 else blocks[0] for blocks in zip(*per_group, strict=True)]
        for per_group in zip(*(result.kernels for result in results), strict=True)
    )
    return Factorization(
        tuple(_lift_kernels(*layer) for layer in zip(declared, stacked, strict=True)),
        float(np.sqrt(energy @ squared / energy.sum())) if energy.sum() > 0 else 0.0,
        all(result.converged for result in results),
        next((result.next_step for result in results if result.next_step), ""),
    )


def compose(stages: Chain, kernels: Sequence[np.ndarray]) -> np.ndarray:
    """The kernel that a chain of one layer computes, of plain convolutions: the inverse of :func:`factorize` at full rank.

    Parameters
    ----------
    stages, kernels
        Of one layer without groups, not transposed. Every spatial axis is spanned by one stage alone.

    Returns
    -------
    ndarray
        (O, I, *spatial), in float64.
    """
    total: np.ndarray | None = None
    for stage, kernel in zip(stages, kernels, strict=True):
        step = _without_groups(np.asarray(kernel, dtype=np.float64), stage.spec.group)
        total = step if total is None else np.einsum("oc...,ci...->oi...", step, total)
    assert total is not None
    return total


def _without_groups(kernel: np.ndarray, group: int) -> np.ndarray:
    """A kernel in ONNX order as (O, I, *spatial), with zeros between its groups."""
    if group == 1:
        return kernel
    rows, columns = kernel.shape[0] // group, kernel.shape[1]
    dense = np.zeros((kernel.shape[0], columns * group, *kernel.shape[2:]))
    for g in range(group):
        dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = kernel[g * rows : (g + 1) * rows]
    return dense


def _groups(specs: Sequence[ConvSpec], weights: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """For each group, the weight of each layer restricted to it."""
    group = specs[0].group
    direct = (by_output(spec, weight) for spec, weight in zip(specs, weights, strict=True))
    return [list(part) for part in zip(*(np.split(weight, group) for weight in direct), strict=True)]


def _group_statistics(
    specs: Sequence[ConvSpec], statistics: Sequence[LayerStatistics] | None
) -> list[list[LayerStatistics] | None]:
    """For each group, what each layer's group sees; None for each where there are no statistics."""
    group = specs[0].group
    if statistics is None:
        return [None] * group
    return [[stats.of_group(index, group) for stats in statistics] for index in range(group)]


def _group_starts(
    specs: Sequence[ConvSpec], declared: Sequence[Chain], start: Sequence[Sequence[np.ndarray]] | None
) -> Sequence[Sequence[Sequence[np.ndarray]] | None]:
    """For each group, its part of the kernels to go on from."""
    group = specs[0].group
    if start is None:
        return [None] * group
    parts = [
        [
            np.split(by_output(stage.spec, np.asarray(kernel, dtype=np.float64)), group)
            for stage, kernel in zip(chain, kernels, strict=True)
        ]
        for chain, kernels in zip(declared, start, strict=True)
    ]
    return [[[kernel[index] for kernel in kernels] for kernels in parts] for index in range(group)]


def _energies(parts: Sequence[Sequence[np.ndarray]], seen: Sequence[Sequence[LayerStatistics] | None]) -> np.ndarray:
    """What relative errors of groups are weighted by: energy of the kernels, or of their outputs."""
    return np.array([_energy(part, stats) for part, stats in zip(parts, seen, strict=True)])


def _energy(weights: Sequence[np.ndarray], statistics: Sequence[LayerStatistics] | None) -> float:
    if statistics is None:
        return sum(squared_norm(weight) for weight in weights)
    return sum(
        stats.output_energy(weight.reshape(len(weight), -1)) for weight, stats in zip(weights, statistics, strict=True)
    )


def _lift_chain(spec: ConvSpec, chain: Chain) -> Chain:
    if spec.group == 1 and not spec.transposed:
        return chain
    # one layer by itself: nothing of it is shared or joined from parts
    lifted = [_with_groups(stage.spec, spec.group) for stage in chain]
    if spec.transposed and is_pointwise(spec):  # the zeros in between come last: nothing is computed from them
        lifted = [stage.stage(stage.weight_shape[0], stage.weight_shape[1], group=stage.group) for stage in lifted]
        lifted[-1] = replace(plain(spec), weight_shape=lifted[-1].weight_shape, group=lifted[-1].group)
    return tuple(Stage(_transposed(stage) if spec.transposed else stage) for stage in lifted)


def _with_groups(spec: ConvSpec, group: int) -> ConvSpec:
    first, *rest = spec.weight_shape
    return replace(spec, weight_shape=(first * group, *rest), group=spec.group * group)


def _transposed(spec: ConvSpec) -> ConvSpec:
    if _mixes_channels_only(spec):  # with no zeros in between it is a plain one, and runtimes are faster at that
        return spec
    first, second, *kernel = spec.weight_shape
    return replace(spec, weight_shape=(second * spec.group, first // spec.group, *kernel), transposed=True)


def _mixes_channels_only(spec: ConvSpec) -> bool:
    trivial = not any(spec.pads) and not any(spec.output_padding) and all(s == 1 for s in spec.strides)
    return is_pointwise(spec) and trivial


def _lift_kernels(chain: Chain, kernels: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Kernels as :func:`_lift_chain` declares them; `kernels` are stacked over the groups already."""
    return tuple(in_onnx_order(stage.spec, kernel) for stage, kernel in zip(chain, kernels, strict=True))

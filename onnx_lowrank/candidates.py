"""Layers x decompositions x ranks -> priced candidates. Every cost comes from the chain, by one function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_lowrank.decompositions import find_decomposition, is_joint, lift
from onnx_lowrank.decompositions.levels import energy_levels
from onnx_lowrank.types import (
    DENSE,
    Candidate,
    Chain,
    ConvSpec,
    Cost,
    Decomposition,
    Layer,
    LayerStatistics,
    LowRankError,
    Rank,
    Skip,
    Stage,
)

RANKS_PER_MODE = {1: 64, 2: 16}
"""Most ranks tried along each mode, by the number of modes: past this the grid is coarser than one block."""


@dataclass(frozen=True)
class Group:
    """Layers that are decided together: one layer, or all that read one stored kernel in the same way.

    Where it is `joint`, the layers have kernels of their own, which may come to share a factor.
    """

    layers: tuple[Layer, ...]
    joint: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def owners(self) -> tuple[Layer, ...]:
        """One layer for each stored kernel: all of a joint group, and the first of those that read the same."""
        return self.layers if self.joint else self.layers[:1]

    @property
    def dense(self) -> Candidate:
        """The candidate that changes nothing."""
        macs = sum(layer.macs for layer in self.layers)
        return Candidate(self.names, DENSE, (), (), Cost(macs, sum(layer.spec.params for layer in self.owners)), 0.0)


def is_spatial_convolution(group: Group) -> bool:
    """Whether a group is one plain convolution, without groups of channels, whose kernel has more than one tap."""
    layer = group.layers[0]
    plain = len(group.layers) == 1 and layer.op_type == "Conv" and layer.spec.group == 1
    return plain and max(layer.spec.kernel, default=1) > 1


def group_of(names: Sequence[str], by_layer: Mapping[str, Group]) -> Group:
    """The layers called `names`: a group as it is, or several of one layer each taken together."""
    group = by_layer[names[0]]
    if group.names == tuple(names):
        return group
    return Group(tuple(by_layer[name].layers[0] for name in names), joint=True)


def group_layers(layers: Sequence[Layer]) -> tuple[Group, ...]:
    """Layers in groups that share a stored kernel; one that something else reads too is decided alone."""
    groups: dict[tuple[bool, str], list[Layer]] = {}
    for layer in layers:
        # a node may be called what a kernel is called
        key = layer.weight_kept, layer.name if layer.weight_kept else layer.weight_name
        groups.setdefault(key, []).append(layer)
    return tuple(Group(tuple(members)) for members in groups.values())


def chain_macs(chain: Chain, layer: Layer) -> int:
    """Multiply-accumulates of `chain` in the place of `layer`, for one sample."""
    size, macs = layer.input_size, 0
    for stage in chain:
        after = stage.spec.output_size(size)
        macs += layer.batch * math.prod(size if stage.spec.transposed else after) * stage.spec.params
        size = after
    return macs


def chain_params(chains: Sequence[Chain]) -> int:
    """Stored elements of the kernels of `chains`, shared ones once."""
    pieces = [piece for chain in chains for stage in chain for piece in stage.pieces]
    shared = {tag: shape for tag, shape in pieces if tag}
    return sum(map(math.prod, shared.values())) + sum(math.prod(shape) for tag, shape in pieces if not tag)


def price(group: Group, name: str, rank: Rank, error: float) -> Candidate:
    """The candidate that decomposes `group` by `name` at `rank`.

    Raises
    ------
    LowRankError
        Where the decomposition refuses the layers or has no such rank.
    """
    specs = [layer.spec for layer in group.owners]
    decomposition = find_decomposition(name)
    reason = lift.refuses(decomposition, specs)
    if reason:
        raise LowRankError(f"layer '{group.names[0]}' cannot be decomposed by {name}: {reason}")
    highest = lift.max_rank(decomposition, specs)
    if len(rank) != len(highest) or any(not 1 <= r <= most for r, most in zip(rank, highest, strict=True)):
        raise LowRankError(
            f"rank {show_rank(rank) or '[]'} of {name} for layer '{group.names[0]}': {len(highest)} number(s) were expected, "
            f"from 1 to {show_rank(highest)}"
        )
    chains = _chains(group, decomposition, rank)
    macs = sum(chain_macs(chain, layer) for chain, layer in zip(chains, group.layers, strict=True))
    kept = sum(layer.spec.params for layer in group.owners if layer.weight_kept)
    return Candidate(group.names, name, rank, chains, Cost(macs, chain_params(chains) + kept), error)


def _chains(group: Group, decomposition: Decomposition, rank: Rank) -> tuple[Chain, ...]:
    """A chain for each layer of the group; of layers that read one kernel, every kernel is shared."""
    specs, stem = [layer.spec for layer in group.layers], group.layers[0].weight_name
    if group.joint:
        chains = lift.chains(decomposition, specs, rank)
        return tuple(tuple(stage.tagged(stem) for stage in chain) for chain in chains)
    if len(specs) == 1:
        return lift.chains(decomposition, specs, rank)
    alone = (lift.chains(decomposition, [spec], rank)[0] for spec in specs)
    return tuple(tuple(Stage(stage.spec, f"{stem}_{i}") for i, stage in enumerate(chain)) for chain in alone)


def show_rank(rank: Rank) -> str:
    """A rank as people write it: ``32`` or ``32x16``.

    Examples
    --------
    >>> show_rank((32, 16))
    '32x16'
    """
    return "x".join(map(str, rank))


def rank_grid(highest: Rank, block: int, most: int | None = None) -> list[Rank]:
    """Ranks to try: multiples of `block` up to `highest`, at most `most` (``RANKS_PER_MODE``) of them along each mode.

    Below one block every power of two is tried too: a small layer has nothing else.

    Examples
    --------
    >>> rank_grid((24,), 8)
    [(1,), (2,), (4,), (8,), (16,), (24,)]
    """
    most = most or RANKS_PER_MODE.get(len(highest), 8)
    return list(itertools.product(*(_mode_ranks(top, block, most) for top in highest)))


def _mode_ranks(top: int, block: int, most: int) -> list[int]:
    small = [1 << power for power in range((block - 1).bit_length()) if 1 << power <= top]
    count = top // block
    picks = sorted({round(i) for i in np.linspace(1, count, min(count, most))}) if count else []
    return small + [block * pick for pick in picks]


def spread(ranks: Sequence[Rank], count: int) -> list[Rank]:
    """`count` of `ranks` that stand for all (half as many again over two modes): the middle one, then in turn the one
    furthest from those taken.

    Distances are of logarithms: what depends on a rank bends where it is small.

    Examples
    --------
    >>> spread([(8,), (16,), (24,), (32,), (40,), (48,), (56,), (64,)], 4)
    [(32,), (8,), (16,), (64,)]
    """
    left = sorted(set(ranks))
    if not left:
        return []
    places = np.log([list(rank) for rank in left])
    taken = [int(np.argmin(np.square(places - places.mean(axis=0)).sum(axis=1)))]
    while len(taken) < min(count if len(left[0]) == 1 else 3 * count // 2, len(left)):
        distances = np.square(places[:, None] - places[taken]).sum(axis=2).min(axis=1)
        taken.append(int(distances.argmax()))
    return [left[i] for i in taken]


Refuses = Callable[[Layer, Chain], "str | None"]
"""Why a chain cannot stand for a layer; None where it can."""


def no_refusal(layer: Layer, chain: Chain) -> str | None:
    """Every chain can stand for its layer."""
    return None


def refused(group: Group, candidate: Candidate, refuses: Refuses) -> str | None:
    """Why a chain of a candidate is refused; None where none is."""
    reasons = (refuses(layer, chain) for layer, chain in zip(group.layers, candidate.chains, strict=True))
    return next((reason for reason in reasons if reason), None)


def group_candidates(
    group: Group,
    methods: Sequence[str],
    block: int,
    statistics: Sequence[LayerStatistics] | None = None,
    *,
    most: int | None = None,
    levels: bool = False,
    refuses: Refuses = no_refusal,
) -> tuple[tuple[Candidate, ...], Skip | None]:
    """Every candidate of `group` that saves something, the dense one first, and why there is none besides it.

    A candidate saves something where it has fewer MACs and no more parameters than the layer; those that another of the
    same method beats in cost and error are dropped. Across methods none is: time is not known here.

    Parameters
    ----------
    most
        Ranks along each mode.
    levels
        The error is -log of the level that the rank keeps (see :func:`~onnx_lowrank.decompositions.levels.energy_levels`).
    refuses
        Why a chain cannot stand for a layer where the model is to run.
    """
    dense = group.dense
    specs = [layer.spec for layer in group.owners]
    methods = [name for name in methods if is_joint(name) == group.joint]
    found: list[Candidate] = []
    reasons: list[str] = []
    weights: list[np.ndarray] | None = None
    for name in methods:
        decomposition = find_decomposition(name)
        reason = lift.refuses(decomposition, specs)
        if reason:
            reasons.append(reason)
            continue
        reason = refused(group, price(group, name, lift.max_rank(decomposition, specs), math.inf), refuses)
        if reason:  # by its form: at one rank as at any other
            reasons.insert(0, reason)
            continue
        grid = rank_grid(lift.max_rank(decomposition, specs), lift.rank_step(decomposition, specs, block), most)
        cheaper = [c for c in (price(group, name, rank, math.inf) for rank in grid) if saves(c, dense)]
        if not cheaper:
            kept = group.layers[0].weight_kept
            reasons.insert(
                0,
                "something else reads its kernel too, which would stay in the file beside the new ones"
                if kept
                else f"too small: {name} saves nothing at any rank of its grid",
            )
            continue
        if weights is None:
            weights = [layer.read_weight() for layer in group.owners]
        ranks = [c.rank for c in cheaper]
        if levels:
            errors = -np.log(energy_levels(decomposition, specs, weights, ranks))
        else:
            errors = lift.errors(decomposition, specs, weights, ranks, statistics)
        errors = len(specs) * errors  # a mean over the layers, of which each counts as it does alone
        found += pareto([_with_error(c, float(e)) for c, e in zip(cheaper, errors, strict=True)])
    if not found:
        # a method that applies and saves nothing says more than one that does not apply
        why = reasons[0] if reasons else f"none of the methods {', '.join(methods)} applies"
        return (dense,), Skip(group.names[0], group.layers[0].op_type, why)
    return (dense, *found), None


def saves(candidate: Candidate, dense: Candidate) -> bool:
    """Whether a candidate is worth having beside `dense`: cheaper in one count and no dearer in the other."""
    cost, whole = candidate.cost, dense.cost
    return cost.macs <= whole.macs and cost.params <= whole.params and cost != whole


def _with_error(candidate: Candidate, error: float) -> Candidate:
    return replace(candidate, error=max(error, 0.0))


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in MACs, parameters, latency and error together."""
    kept: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.error, c.cost.macs, c.cost.params, c.cost.latency_ms)):
        # sorted by error: what is kept already is at least as accurate
        if not any(_no_dearer(k.cost, c.cost) for k in kept):
            kept.append(c)
    return kept


def _no_dearer(one: Cost, other: Cost) -> bool:
    return one.macs <= other.macs and one.params <= other.params and one.latency_ms <= other.latency_ms


def estimated_candidate(
    group: Group,
    methods: Sequence[str],
    estimator: Callable[[np.ndarray], int],
    block: int,
    refuses: Refuses = no_refusal,
) -> Candidate | Skip:
    """`group` by the first method that applies, at the rank that `estimator` gives, aligned upwards to `block`.

    An estimate of 0 means that the kernel holds no signal above its noise; it is never taken for a rank.
    """
    first, dense = group.layers[0], group.dense
    reasons = []
    for name in methods:
        decomposition = find_decomposition(name)
        reason = lift.refuses(decomposition, [first.spec]) or refused(
            group, price(group, name, lift.max_rank(decomposition, [first.spec]), math.inf), refuses
        )
        if reason:
            reasons.append(reason)
            continue
        weights = [first.read_weight()]
        estimate = lift.estimate_rank(decomposition, [first.spec], weights, estimator)
        if 0 in estimate:
            return Skip(first.name, first.op_type, f"{name}: the estimated rank is 0, so no rank is safe: left dense")
        highest = lift.max_rank(decomposition, [first.spec])
        rank = tuple(min(-(-r // block) * block, most) for r, most in zip(estimate, highest, strict=True))
        candidate = price(group, name, rank, math.inf)
        if not saves(candidate, dense):
            return Skip(
                first.name, first.op_type, f"{name} at the estimated rank {show_rank(rank)} saves nothing: left dense"
            )
        return _with_error(candidate, float(lift.errors(decomposition, [first.spec], weights, [rank])[0]))
    return Skip(first.name, first.op_type, reasons[-1] if reasons else "no method applies")


def operator_of(layer: Layer, spec: ConvSpec) -> str:
    """The operator that a stage is written as."""
    if not spec.ndim:
        return layer.op_type
    return "ConvTranspose" if spec.transposed else "Conv"


@dataclass(frozen=True)
class Formats:
    """What a target takes: see :class:`onnx_lowrank.targets.Target`."""

    name: str
    spatial: Mapping[str, tuple[int, ...]]

    def refuses(self, layer: Layer, chain: Chain) -> str | None:
        """Why a chain in the place of a layer would leave what the target takes; None where it does not."""
        for stage in chain:
            op_type = operator_of(layer, stage.spec)
            if op_type not in self.spatial:
                return f"{self.name} has no {op_type}"
            if stage.spec.ndim not in self.spatial[op_type]:
                taken = " and ".join(f"{n}-D" for n in self.spatial[op_type])
                return f"{self.name} takes {op_type} in {taken} only: this one is {stage.spec.ndim}-D"
        return None

"""``joint_svd``: repeated layers in one subspace, at the ranks of the paper.

``--rank ratio=R`` is the paper's rate: a layer of O output channels by itself gets the rank ``int(O R)`` of a plain SVD, and a
section the joint rank that takes as many parameters as that would. ``--methods`` says the scheme: ``joint_left`` (LJSVD,
the default), ``joint_right`` (RJSVD-2; RJSVD-1 where ``--group`` names the first layer of a stage too) or ``joint_both``
(Bi-JSVD). The first layer, products, the first stage and the shortcuts stay as they are; what is left without a partner
becomes a plain spatial SVD. BatchNormalization is folded at the end: beside kernels this small it would be 4 % of the file.

Our reading: the first stage is all that has the output size of the first layer after the first; ranks are those at which a
section is worth its parameters whatever its shapes, which are the paper's formulas for basic blocks and bottlenecks.

References
----------
Chen, Zhou, Sun & Huang (2023), "Joint matrix decomposition for deep convolutional neural networks compression",
arXiv 2107.04386, section 4.1 and table 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onnx_lowrank.candidates import Group, chain_params, price
from onnx_lowrank.config import METHODS, Config
from onnx_lowrank.decompositions import find_decomposition, is_joint, lift
from onnx_lowrank.graph.sections import alike
from onnx_lowrank.planning.candidate_sets import Policy
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.types import Candidate, Layer, LowRankError, Plan

DEFAULT = "joint_left"


def configure(config: Config) -> Config:
    """The scheme, nothing that contradicts it, and nothing left of BatchNormalization.

    Raises
    ------
    LowRankError
        Where no rate is given, or no scheme of the recipe is named.
    """
    methods = (DEFAULT,) if config.methods == METHODS else config.methods
    if len(methods) != 1 or not is_joint(methods[0]):
        raise LowRankError(
            f"recipe joint_svd with methods {', '.join(methods)}: one of joint_left, joint_right and joint_both was expected"
        )
    _rate(config)
    return replace(config, methods=methods, fold_batchnorm=True)


def policy(config: Config) -> Policy:
    """Kernels of the weights alone."""
    return Policy(plain=True)


def search(planner: Planner, bench: Bench) -> Attempt:
    """The plan of the paper."""
    return bench.tuned(bench.attempt(plan_of(planner)))


def plan_of(planner: Planner) -> Plan:
    """Every section by the scheme, its rest by plain SVD, at the ranks of the rate."""
    rate, scheme = _rate(planner.config), planner.config.methods[0]
    subject = planner.subject
    alone = {group.names[0]: group for group in subject.groups if len(group.layers) == 1}
    touched = [layer for layer in _stages(list(subject.found.layers)) if layer.name in alone]
    around = {layer.name for section in subject.sections if section.shortcut for layer in section.layers}
    around |= {
        layer.name for layer in touched if set(layer.spec.kernel) <= {1} and any(s > 1 for s in layer.spec.strides)
    }
    free = {layer.name: layer for layer in touched if layer.name not in around}
    choices: list[Candidate] = []
    for section in subject.sections:
        members = tuple(layer for layer in section.layers if layer.name in free)
        if not (planner.config.group and scheme == "joint_right"):  # which alone can share with a narrower first layer
            members = alike(members)
        if len(members) > 1:
            choices.append(_joined(Group(members, joint=True), scheme, rate))
            for layer in members:
                del free[layer.name]
    for layer in free.values():
        rank = max(1, int(layer.spec.out_channels * rate))
        method = "spatial_svd" if max(layer.spec.kernel) > 1 else "svd"
        if lift.refuses(find_decomposition(method), [layer.spec]) is None:
            choices.append(price(alone[layer.name], method, (rank,), math.nan))
    decided = {name for choice in choices for name in choice.layers}
    choices += [group.dense for group in subject.groups if not decided & set(group.names)]
    return planner.plan(choices, _factor(subject.found.layers, choices))


def _rate(config: Config) -> float:
    name, _, rate = (config.rank or "").partition("=")
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if name != "ratio" or not 0 < value < 1:
        raise LowRankError(
            f"recipe joint_svd with rank {config.rank}: the paper's rate was expected, for example --rank ratio=0.04"
        )
    return value


def _stages(layers: Sequence[Layer]) -> list[Layer]:
    """Convolutions beyond the first layer and the first stage."""
    convolutions = [
        layer for layer in layers if layer.op_type == "Conv" and layer.spec.ndim and not layer.spec.depthwise
    ]
    sizes = [layer.spec.output_size(layer.input_size) for layer in convolutions]
    return [layer for layer, size in zip(convolutions[1:], sizes[1:], strict=True) if size != sizes[1]]


def _joined(group: Group, scheme: str, rate: float) -> Candidate:
    """A section at the rank at which it has as many parameters as plain SVDs of the rate."""
    specs = [layer.spec for layer in group.layers]
    separate = sum(_per_rank(Group((layer,)), "joint_left") for layer in group.layers)
    # per rank, whatever the split: a half of the ranks may share the first stage and the other half the second
    together = _per_rank(group, "joint_left" if scheme == "joint_both" else scheme)
    highest = lift.max_rank(find_decomposition(scheme), specs)[0]
    rank = int(specs[0].out_channels * separate / together * rate)
    return price(group, scheme, (min(max(rank, 2 if scheme == "joint_both" else 1), highest),), math.nan)


def _per_rank(group: Group, scheme: str) -> int:
    """Parameters of a rank of one."""
    return chain_params(price(group, scheme, (1,), 0.0).chains)


def _factor(layers: Sequence[Layer], choices: Sequence[Candidate]) -> str:
    """By how much the kernels shrink: the paper counts nothing else."""
    before = sum(layer.spec.params for layer in layers)
    decided = {name for choice in choices if not choice.dense for name in choice.layers}
    after = sum(layer.spec.params for layer in layers if layer.name not in decided)
    after += sum(choice.cost.params for choice in choices if not choice.dense)
    return f"the kernels have {before:,} parameters before and {after:,} after: a factor of {before / after:.2f}"

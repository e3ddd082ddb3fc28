"""Kernels by tensorly's `partial_tucker` and `parafac` at their defaults; ranks by EVBMF; written to ONNX by our splice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from tensorly.decomposition import parafac, partial_tucker

from onnx_lowrank.candidates import Group, price
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.graph.splice import Replacement, splice
from onnx_lowrank.types import Candidate
from tools.benchmark.by_papers import Make, opened
from tools.benchmark_accuracy import Pick, at_share, priced, scaled_vbmf

ITERATIONS = 100
"""tensorly's own default, said here because it is what most of the time goes into."""


def tucker(model: Path, samples: Path) -> Make:
    """Kim et al. (2016): EVBMF of both channel modes, all ranks scaled by one factor to the share."""
    return _maker(model, scaled_vbmf("tucker2"))


def cp(model: Path, samples: Path) -> Make:
    """The larger of the two ranks of EVBMF for each layer, scaled likewise; CP of (O, I, kh * kw)."""
    return _maker(model, scaled_vbmf("cp3"))


def cp_uniform(model: Path, samples: Path) -> Make:
    """CP without EVBMF: every layer at the rank that keeps the same share of its MACs."""

    def pick(group: Group, level: float) -> Candidate:
        layer = group.layers[0]
        name = "cp3" if lift.refuses(find_decomposition("cp3"), [layer.spec]) is None else "svd"
        one = price(group, name, (1,), 0.0).cost.macs
        return priced(group, name, (level * group.dense.cost.macs / one,))

    return _maker(model, pick)


def _maker(model: Path, pick: Pick) -> Make:
    planner, groups = opened(model)
    subject = planner.subject

    def make(share: float | None, out: Path) -> None:
        plan = at_share(planner, groups, pick, float(share or 0))
        replacements = [
            Replacement(group.names[0], choice.decomposition, choice.rank, choice.chains[0], kernels(group, choice))
            for group, choice in zip(subject.groups, plan.choices, strict=True)
            if not choice.dense
        ]
        onnx.save(splice(subject.model, subject.found, replacements)[0].proto, out)

    return make


def kernels(group: Group, choice: Candidate) -> tuple[np.ndarray, ...]:
    """What tensorly makes of a layer's kernel, in the shapes of the chain."""
    layer = group.layers[0]
    weight = np.asarray(layer.read_weight(), np.float64)
    shapes = [stage.spec.weight_shape for stage in choice.chains[0]]
    if choice.decomposition == "svd":
        made = lift.factorize(
            find_decomposition("svd"), [layer.spec], [weight], choice.rank, rng=np.random.default_rng(0)
        )
        return tuple(made.kernels[0])
    if choice.decomposition == "tucker2":
        (core, (outer, inner)), _ = partial_tucker(weight, list(choice.rank), modes=[0, 1], n_iter_max=ITERATIONS)
        parts = (inner.T, core, outer)
    else:
        tensor = weight.reshape(*weight.shape[:2], -1)  # (O, I, kh, kw) -> (O, I, kh*kw)
        scales, (outer, inner, taps) = parafac(tensor, choice.rank[0], n_iter_max=ITERATIONS, random_state=0)
        parts = (inner.T, taps.T, outer * scales)
    return tuple(np.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True))

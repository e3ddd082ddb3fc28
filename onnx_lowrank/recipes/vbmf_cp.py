"""``vbmf_cp``: layer by layer, from the first on: a rank, a CP decomposition, training of the whole network, the next layer.

The rank of a layer comes from the weights that the training before it left (EVBMF, the larger of the estimates along its output
and its input channels); that it is chosen then, and not for all layers at the start, is the point of the paper. ``--rank``
selects what to compare with: ``vbmf_at_start``, all ranks before anything is changed; or ``sensitivity=R``, the baseline of
the authors' earlier paper: ranks in proportion to what a layer's decomposition does to the network, such that the layers keep the
share R of their multiply-accumulates.

Our reading: every plain convolution with a spatial kernel is decomposed whose chain has fewer multiply-accumulates at its
rank; ranks are not aligned. The sensitivity of a layer is the distance of the outputs from the original's on the samples held
out with this layer alone at half of its multiply-accumulates.

References
----------
Astrid, Lee & Seo (2018), "Rank selection of CP-decomposed convolutional layers with variational Bayesian matrix factorization",
arXiv 1801.05243. Astrid & Lee (2017), "CP-decomposition with tensor power method for convolutional neural networks
compression", arXiv 1701.07148.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from onnx_lowrank.candidates import Group, is_spatial_convolution, price, refused
from onnx_lowrank.config import METHODS, Config
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.decompositions.cp import CP3
from onnx_lowrank.planning.candidate_sets import Policy
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.ranks import parse_estimator
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Candidate, Factorization, LowRankError

METHOD = "cp3"

AT_START = "vbmf_at_start"

SENSITIVITY = "sensitivity"

HALVINGS = 60
"""Steps of the search for the factor between sensitivities and ranks."""

Ranks = Callable[[Group], int]


def configure(config: Config) -> Config:
    """Training, and no methods or budgets of one's own.

    Raises
    ------
    LowRankError
        Where nothing is to be trained, or others were asked for.
    """
    if config.finetune == "none":
        raise LowRankError("recipe vbmf_cp trains after each layer: give --finetune labels --train DATA, or distill")
    if config.budget or config.max_drop is not None:
        raise LowRankError("recipe vbmf_cp chooses the ranks itself: leave out --budget and --max-drop")
    if config.methods not in (METHODS, (METHOD,)):
        raise LowRankError("recipe vbmf_cp lays down the method, cp3: leave out --methods")
    rank = config.rank or "vbmf"
    if rank not in ("vbmf", AT_START):
        _share(rank)
    return replace(config, methods=(METHOD,), rank=rank, align=config.align or 1)


def policy(config: Config) -> Policy:
    """Kernels of the weights alone."""
    return Policy(plain=True)


def search(planner: Planner, bench: Bench) -> Attempt:
    """Layer by layer."""
    assert bench.refiner is not None  # the options say so
    names = [group.names[0] for group in planner.subject.groups if _eligible(group, planner)]
    ranks = _ranks(planner, bench)
    model = planner.subject.model
    reports: dict[str, LayerReport] = {}
    choices: dict[str, Candidate] = {}
    notes = []
    for number, name in enumerate(names):
        planner.progress("layers", number, len(names))
        step = Planner(open_subject(model, planner.config), planner.config, planner.progress, planner.policy)
        (group,) = (each for each in step.subject.groups if each.names == (name,))
        rank = ranks(group)
        choice = _choice(group, rank)
        if choice is None:
            notes.append(f"{name}: rank {rank} saves nothing: left dense")
            continue
        with planner.stage("factorize"):
            step.take(choice, _factorized(group, choice, planner.config.seed))
        plan = step.plan([choice if each.names == (name,) else each.dense for each in step.subject.groups])
        rewritten, (report,) = step.carry_out(plan)
        with planner.stage("finetune"):
            refined = bench.refiner.refine(rewritten, report.nodes)
        model = refined.model
        choices[name], reports[name] = choice, report
        notes.append(f"{name}: rank {choice.rank[0]}; {refined.note}")
    planner.progress("layers", len(names), len(names))
    groups = planner.subject.groups
    plan = planner.plan([choices.get(group.names[0], group.dense) for group in groups], *notes)
    layers = tuple(reports[name] for name in names if name in reports)
    return bench.measure(planner.finished(model), plan, layers)


def _eligible(group: Group, planner: Planner) -> bool:
    decomposition, specs = find_decomposition(METHOD), [group.layers[0].spec]
    if not is_spatial_convolution(group) or lift.refuses(decomposition, specs):
        return False
    widest = price(group, METHOD, lift.max_rank(decomposition, specs), math.nan)
    return refused(group, widest, planner.target.formats.refuses) is None


def _choice(group: Group, rank: int) -> Candidate | None:
    """The candidate of a rank; None where it saves nothing."""
    (highest,) = lift.max_rank(find_decomposition(METHOD), [group.layers[0].spec])
    if not 1 <= rank <= highest:
        return None
    choice = price(group, METHOD, (rank,), math.nan)
    return choice if choice.cost.macs < group.dense.cost.macs else None


def _factorized(group: Group, choice: Candidate, seed: int) -> Factorization:
    """By the tensor power method."""
    layer = group.layers[0]
    made = CP3(algorithm="tpm").factorize([layer.read_weight()], choice.rank, rng=np.random.default_rng(seed))
    return made.stored(layer.dtype)


def _ranks(planner: Planner, bench: Bench) -> Ranks:
    """What gives a layer its rank when its turn has come."""
    rule = planner.config.rank
    if rule == "vbmf":
        return _estimated
    if rule == AT_START:
        fixed: Mapping[str, int] = {
            group.names[0]: _estimated(group) for group in planner.subject.groups if _eligible(group, planner)
        }
    else:
        fixed = _by_sensitivity(planner, bench, _share(rule or ""))
    return lambda group: fixed[group.names[0]]


def _estimated(group: Group) -> int:
    layer = group.layers[0]
    decomposition = find_decomposition(METHOD)
    return lift.estimate_rank(decomposition, [layer.spec], [layer.read_weight()], parse_estimator("vbmf"))[0]


def _share(rule: str) -> float:
    name, _, text = rule.partition("=")
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if name != SENSITIVITY or not 0 < share < 1:
        raise LowRankError(
            f"recipe vbmf_cp with rank {rule}: vbmf, {AT_START} or {SENSITIVITY}=SHARE was expected, as in {SENSITIVITY}=0.3"
        )
    return share


def _by_sensitivity(planner: Planner, bench: Bench, share: float) -> Mapping[str, int]:
    """Ranks in proportion to sensitivity, such that all layers together keep a share of their work."""
    assert bench.refiner is not None
    groups = [group for group in planner.subject.groups if _eligible(group, planner)]
    per_rank = {group.names[0]: price(group, METHOD, (1,), math.nan).cost.macs for group in groups}
    felt = {}
    for number, group in enumerate(groups):
        planner.progress("sensitivity", number, len(groups))
        choice = _choice(group, max(1, group.dense.cost.macs // (2 * per_rank[group.names[0]])))
        if choice is None:
            felt[group.names[0]] = 0.0
            continue
        planner.take(choice, _factorized(group, choice, planner.config.seed))
        plan = planner.plan([choice if each is group else each.dense for each in planner.subject.groups])
        model, _ = planner.carry_out(plan)
        felt[group.names[0]] = bench.refiner.distance(model)
    planner.progress("sensitivity", len(groups), len(groups))
    highest = {group.names[0]: (group.dense.cost.macs - 1) // per_rank[group.names[0]] for group in groups}
    wanted = share * sum(group.dense.cost.macs for group in groups)

    def ranks(scale: float) -> dict[str, int]:
        return {name: max(1, min(round(scale * felt[name]), highest[name])) for name in felt}

    low, high = 0.0, max(highest.values(), default=1) / (min((f for f in felt.values() if f > 0), default=1.0))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        work = sum(rank * per_rank[name] for name, rank in ranks(middle).items())
        low, high = (middle, high) if work <= wanted else (low, middle)
    return ranks(low)

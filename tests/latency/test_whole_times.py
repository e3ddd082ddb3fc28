"""Times of whole models: what is told from them of layers, how few models that takes, and plans made by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest

from onnx_lowrank.candidates import Group, group_candidates
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.model import Model
from onnx_lowrank.latency import probes as probing
from onnx_lowrank.latency import whole_times
from onnx_lowrank.latency.probes import digest, kind_of, mixes, picked, probes
from onnx_lowrank.latency.timings import Timings
from onnx_lowrank.latency.whole_times import MIXED, WholeTimes
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.subject import Subject, open_subject
from onnx_lowrank.types import Budget, Candidate, Cost, Plan, no_progress
from tests.helpers import normal, parse

NET = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
  [a] h = Conv <pads = [1,1,1,1]> (x, w1)
  [b] i = Conv <pads = [1,1,1,1]> (h, w2)
  [c] j = Conv <pads = [1,1,1,1]> (i, w3)
  [d] y = Conv <pads = [1,1,1,1]> (j, w4)
}"""
BLOCK = 4
METHODS = ("channel_svd", "spatial_svd", "tucker2")


def net(seed: int = 0, wide: int = 32) -> onnx.ModelProto:
    """Two layers of 16 to 16 channels, and two others."""
    shapes = {"w1": (16, 16), "w2": (16, 16), "w3": (wide, 16), "w4": (16, wide)}
    return parse(NET, **{name: normal(*shape, 3, 3, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())})


@pytest.fixture
def subject() -> Subject:
    return open_subject(net(), make_config())


def candidates_of(subject: Subject) -> list[tuple[Candidate, ...]]:
    return [group_candidates(group, METHODS, BLOCK)[0] for group in subject.groups]


def truth(choice: Candidate, group: Group) -> float:
    """Share of a layer's time: a stage has a cost of its own, and the rest goes by MACs."""
    return 0.05 * len(choice.chains[0]) + 0.9 * choice.cost.macs / group.dense.cost.macs


class Engine:
    """Times that are made up: layers take 0.9 of the original's time, in proportion to their MACs."""

    def __init__(self, subject: Subject, share: Callable[[Candidate, Group], float] = truth) -> None:
        self.asked: list[tuple[Candidate, ...]] = []
        self.adding_up, self.error = 1.0, 0.0
        self._share, self._groups = share, {group.names: group for group in subject.groups}
        self._macs = sum(group.dense.cost.macs for group in subject.groups)

    def saved(self, choices: Sequence[Candidate]) -> float:
        each = [
            (1 - self._share(c, self._groups[c.layers])) * self._groups[c.layers].dense.cost.macs / self._macs
            for c in choices
        ]
        return 0.9 * sum(each)

    def ratio(self, model: Model, *, thorough: bool = False) -> tuple[float, float]:
        choices = self.asked[-1]
        several = len({kind_of(self._groups[c.layers]) for c in choices}) > 1
        return 1 - self.saved(choices) * (self.adding_up if several else 1.0), self.error


def table(subject: Subject, engine: Engine | None, timings: Timings | None = None) -> WholeTimes:
    made = WholeTimes(subject, timings or Timings({}, None), 10.0, BLOCK, engine)
    if engine is not None:
        inner = made._stand_ins.model

        def model(choices: Sequence[Candidate]) -> object:
            engine.asked.append(tuple(choices))
            return inner(choices)

        made._stand_ins.model = model  # type: ignore[method-assign, assignment]
    return made


def test_what_is_told_of_the_layers_adds_up_to_what_was_timed(subject: Subject) -> None:
    engine, every = Engine(subject), candidates_of(subject)
    made = table(subject, engine)
    made.fill(every)
    assert made.measured == made.wanted == len(engine.asked) - probing.MIXES
    priced = made.priced(every)
    dense = [members[0].cost.latency_ms for members in priced]
    assert made.rest + sum(dense) == pytest.approx(made.original.latency_ms) == pytest.approx(10.0)
    by_key = {(c.layers, c.decomposition, c.rank): c.cost.latency_ms for members in priced for c in members}
    alone = [choices for choices in engine.asked if len({c.decomposition for c in choices}) == 1][: made.wanted]
    for choices in alone:
        names = {name for c in choices for name in c.layers}
        left = sum(ms for group, ms in zip(subject.groups, dense, strict=True) if not names & set(group.names))
        total = made.rest + left + sum(by_key[c.layers, c.decomposition, c.rank] for c in choices)
        assert total == pytest.approx(10 * (1 - engine.saved(choices)), rel=1e-3)


def test_all_layers_of_one_kind_are_changed_at_once_and_the_models_are_few(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = candidates_of(subject)
    found = probes(subject, every, BLOCK)
    assert all(len(probe.parts) == 1 for probe in found)
    assert {tuple(n for c in probe.choices for n in c.layers) for probe in found} == {("a", "b"), ("c",), ("d",)}
    assert len(found) <= 3 * (2 * probing.POINTS + probing.POINTS + 1)
    monkeypatch.setattr(probing, "MODELS", 3)
    few = probes(subject, every, BLOCK)
    assert few == found[:3]
    assert len({probe.parts[0].kind for probe in few}) == 3, "every kind of layer gets its turn"


def test_a_kind_of_layer_that_hardly_counts_gets_no_model(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "LEAST_SHARE", 0.32)  # a and b are a third of all; c and d are each
    names = {c.layers for probe in probes(subject, candidates_of(subject), BLOCK) for c in probe.choices}
    assert names == {("a",), ("b",), ("c",), ("d",)}
    monkeypatch.setattr(probing, "LEAST_SHARE", 0.34)
    assert probes(subject, candidates_of(subject), BLOCK) == ()


def test_nothing_takes_less_than_no_time(subject: Subject) -> None:
    engine, every = Engine(subject, lambda choice, group: -1.0), candidates_of(subject)
    made = table(subject, engine)
    made.fill(every)
    assert made.rest >= 0
    assert all(c.cost.latency_ms >= 0 for members in made.priced(every) for c in members)


def test_a_chain_that_was_seen_to_be_slower_is_slower_than_its_layer(subject: Subject) -> None:
    engine = Engine(
        subject, lambda choice, group: 1.5 if choice.decomposition == "spatial_svd" else truth(choice, group)
    )
    every = candidates_of(subject)
    made = table(subject, engine)
    made.fill(every)
    for members in made.priced(every):
        spatial = [c for c in members if c.decomposition == "spatial_svd"]
        assert spatial
        assert all(c.cost.latency_ms > members[0].cost.latency_ms for c in spatial)


def test_what_is_uncertain_is_not_counted_on(subject: Subject) -> None:
    every, foretold = candidates_of(subject), []
    for error in (0.0, 0.02):
        engine = Engine(subject)
        engine.error = error
        made = table(subject, engine)
        made.fill(every)
        members = made.priced(every)[0]
        foretold.append(members[0].cost.latency_ms - min(c.cost.latency_ms for c in members))
    assert foretold[1] < foretold[0]


@pytest.mark.parametrize("adding_up", [0.5, 0.7, 1.2])
def test_savings_that_do_not_add_up_are_corrected_by_mixes(subject: Subject, adding_up: float) -> None:
    every, gains = candidates_of(subject), []
    for factor in (1.0, adding_up):
        engine = Engine(subject)
        engine.adding_up = factor
        made = table(subject, engine)
        made.fill(every)
        priced = made.priced(every)
        cheapest = [min(members, key=lambda c: c.cost.latency_ms).cost.latency_ms for members in priced]
        gains.append(sum(members[0].cost.latency_ms for members in priced) - sum(cheapest))
        assert made._timings.of(MIXED)[(1,)] == pytest.approx(factor, rel=1e-3)
    assert gains[1] / gains[0] == pytest.approx(min(adding_up, 1.0), rel=0.02), "more beside others than alone is noise"


def test_mixes_are_made_of_chains_that_are_timed_alone(subject: Subject) -> None:
    single = probes(subject, candidates_of(subject), BLOCK)
    parts = {probe.parts[0] for probe in single}
    made = mixes(single)
    assert len(made) == probing.MIXES
    assert all(set(mix.parts) <= parts and len(mix.parts) == 3 for mix in made)
    assert made == mixes(single)
    assert mixes([probe for probe in single if probe.parts[0].kind == single[0].parts[0].kind]) == ()


def test_a_method_that_was_not_timed_is_not_chosen_for_its_macs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "MODELS", 3)  # the first method of each kind
    every = candidates_of(subject)
    made = table(subject, Engine(subject))
    made.fill(every)
    for members in made.priced(every):
        unknown = [c for c in members if c.decomposition not in ("dense", "channel_svd")]
        assert unknown
        assert all(c.cost.latency_ms == members[0].cost.latency_ms for c in unknown)


def test_what_was_timed_is_kept_and_read_again(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = candidates_of(subject)
    first = table(subject, Engine(subject), Timings({"engine": "E"}, tmp_path))
    first.fill(every)
    again = Engine(subject)
    second = table(subject, again, Timings({"engine": "E"}, tmp_path))
    second.fill(every)
    assert again.asked == []
    prices = [[c.cost.latency_ms for members in made.priced(every) for c in members] for made in (first, second)]
    assert prices[0] == pytest.approx(prices[1])
    monkeypatch.setattr(whole_times, "TABLE_SECONDS", 0.0)
    other = table(subject, Engine(subject))
    other.fill(every)
    assert (other.measured, other.wanted) == (0, first.wanted)


def test_a_whole_plan_is_timed_or_foretold(subject: Subject) -> None:
    every, engine = candidates_of(subject), Engine(subject)
    made = table(subject, engine)
    made.fill(every)
    priced = made.priced(every)
    choices = tuple(min(members, key=lambda c: c.cost.latency_ms) for members in priced)
    plan = Plan(choices, (), Cost(0, 0, made.rest), made.original)
    engine.adding_up = 0.9
    assert made.check(plan) == pytest.approx(1 - 0.9 * engine.saved(choices))
    alone = table(subject, None, made._timings)
    assert alone.check(plan) == pytest.approx(plan.ratio("latency"))
    assert alone.check(Plan(tuple(members[0] for members in priced), (), Cost(0, 0), made.original)) == 1.0


def test_a_plan_goes_by_the_times_and_not_by_macs(subject: Subject) -> None:
    """Where one method is slow, a plan by latency has none of it, though it saves as many MACs."""
    config = make_config(budget={"latency": 0.7}, methods=",".join(METHODS), align=BLOCK, jobs=1)
    planner = Planner(subject, config, no_progress)
    best = {c.decomposition for c in planner.solve([Budget("macs", 0.5)]).choices} - {"dense"}
    engine = Engine(subject, lambda choice, group: 1.2 if choice.decomposition in best else truth(choice, group))
    made = table(subject, engine)
    made.fill(planner.sets.all())
    planner._table = made
    plan = planner.solve([Budget("latency", 0.7)])
    assert plan.ratio("latency") <= 0.7
    assert not best & {c.decomposition for c in plan.choices}


def test_the_hash_is_of_layers_and_sizes_and_not_of_kernels(subject: Subject) -> None:
    assert digest(open_subject(net(seed=9), make_config())) == digest(subject)
    assert digest(open_subject(net(wide=24), make_config())) != digest(subject)
    free = NET.replace("8, 8] x", "H, W] x").replace("8, 8] y", "H, W] y")
    kernels = {f"w{i}": normal(16, 16, 3, 3) for i in range(1, 5)}
    sizes = [open_subject(parse(free, **kernels), make_config(input_shape=f"x:1,16,{n},{n}")) for n in (8, 9)]
    assert digest(sizes[0]) != digest(sizes[1])


def test_ranks_that_stand_for_all_reach_from_end_to_end() -> None:
    ranks = [(r,) for r in (1, 2, 4, *range(8, 65, 8))]
    assert picked(ranks, 8) == [(32,), (64,), (8,)]
    assert picked([(1,), (2,), (4,)], 8) == [(2,), (4,), (1,)]
    assert picked([(3,)], 8) == [(3,)]
    assert picked([], 8) == []
    assert len(picked([(8 * i, 8 * j) for i in range(1, 5) for j in range(1, 5)], 8)) == probing.POINTS + 1

"""The latency of candidates: whose time is whose, what is interpolated, what is kept, and plans made by it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank import runtime
from onnx_lowrank.budgets.knapsack import OutOfReach
from onnx_lowrank.cache import FOLDER, cache_folder
from onnx_lowrank.candidates import spread
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.owners import own_nodes, owners
from onnx_lowrank.graph.save import save
from onnx_lowrank.latency import table as latency
from onnx_lowrank.latency.pricing import interpolated
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.latency.timings import Place, Timings
from onnx_lowrank.planning import planner
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.runtime import OPTIMIZED, Profile, RunSettings, Session, Timing, profile_nodes
from onnx_lowrank.search.search import within_budgets
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Budget, Cost, no_progress
from tests.helpers import decompose, normal, parse

RESIDUAL = """g (float[N, 16, 12, 12] x) => (float[N, 10] y) {
  [first] a = Conv <pads = [1,1,1,1]> (x, w1)
  [norm] n = BatchNormalization (a, gain, shift, mean, variance)
  [relu] r = Relu (n)
  [second] b = Conv <pads = [1,1,1,1]> (r, w2)
  [sum] s = Add (b, x)
  [relu2] t = Relu (s)
  [pool] p = GlobalAveragePool (t)
  [flat] f = Flatten (p)
  [head] m = MatMul (f, w3)
  [bias] y = Add (m, c)
}"""
STORED = {
    "w1": normal(16, 16, 3, 3),
    "w2": normal(16, 16, 3, 3, seed=1),
    "w3": normal(16, 10),
    "c": normal(10),
    **{name: np.ones(16, "float32") for name in ("gain", "variance")},
    **{name: np.zeros(16, "float32") for name in ("shift", "mean")},
}


def residual():
    return parse(RESIDUAL, **STORED)


def owned_by(model, found, replaced, tmp_path: Path):
    save(model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", RunSettings(), profile=tmp_path)
    session.run({"x": normal(1, 16, 12, 12)})
    session.end_profile()
    groups: dict[str, list[str]] = {}
    for node in owners(model, {**found, **replaced}, tmp_path / OPTIMIZED):
        groups.setdefault(node.layer, []).append(node.op_type)
    return groups


# --- whose time is whose --------------------------------------------------------------------------------------------


def test_a_layer_owns_what_the_runtime_makes_of_it_and_of_what_waits_for_it(tmp_path: Path) -> None:
    subject = open_subject(residual(), make_config())
    groups = owned_by(subject.model, own_nodes(subject.model, subject.found), {}, tmp_path)
    assert set(groups) == {"first", "second", "head"}
    everything = [op for ops in groups.values() for op in ops]
    assert sum(op in ("Conv", "FusedConv") for op in everything) == 2
    assert not {"GlobalAveragePool", "Flatten"} & set(everything)
    # fused into the convolution or not, the sum goes with the layer that it waits for
    assert not {"Add", "Relu"} & set(groups["first"])


def test_a_chain_is_owned_by_the_layer_it_stands_for(tmp_path: Path) -> None:
    subject = open_subject(residual(), make_config())
    rewritten = decompose(residual(), "tucker2", lambda rank: (8, 8), only=["first", "second"])
    groups = owned_by(
        replace(subject.model, proto=rewritten.model),
        own_nodes(subject.model, subject.found),
        rewritten.nodes,
        tmp_path,
    )
    for layer in ("first", "second"):
        assert sum(op in ("Conv", "FusedConv") for op in groups[layer]) == 3


def test_a_profile_tells_the_time_of_every_node(tmp_path: Path) -> None:
    save(open_subject(residual(), make_config()).model, tmp_path / "model.onnx")
    feeds = {"x": normal(1, 16, 12, 12)}
    reference = Session(tmp_path / "model.onnx")
    profile = profile_nodes(tmp_path / "model.onnx", reference, feeds, RunSettings(), tmp_path, rounds=5)
    assert profile.reference_ms > 0
    assert all(ms >= 0 for ms in profile.node_ms.values())
    assert any("Conv" in name or "nchwc" in name or name for name in profile.node_ms)


# --- interpolation --------------------------------------------------------------------------------------------------


def test_points_are_few_and_reach_from_end_to_end() -> None:
    ranks = [(8 * i,) for i in range(1, 65)]
    points = spread(ranks, 6)
    assert len(points) == 6 == len(set(points))
    assert {(8,), (512,)} <= set(points)
    pairs = [(8 * i, 8 * j) for i in range(1, 9) for j in range(1, 9)]
    assert len(spread(pairs, 6)) == 9
    assert {(8, 64), (64, 8)} <= set(spread(pairs, 6))
    assert spread([(4,)], 6) == [(4,)]
    assert spread([], 6) == []


def test_times_over_two_ranks_are_those_of_the_stages() -> None:
    def truth(rank):
        return 0.01 + 0.002 * rank[0] + 0.001 * rank[1] + 3e-5 * rank[0] * rank[1]

    known = {rank: truth(rank) for rank in [(8, 8), (8, 64), (64, 8), (64, 64), (32, 32)]}
    wanted = [(16, 48), (56, 24), (64, 64)]
    np.testing.assert_allclose(interpolated(known, wanted), [truth(rank) for rank in wanted], rtol=1e-6)


def test_what_was_measured_is_taken_as_it_is_and_a_higher_rank_is_never_faster() -> None:
    known = {(8,): 0.30, (16,): 0.28, (32,): 0.6}
    got = interpolated(known, [(1,), (8,), (16,), (24,), (32,), (40,)])
    assert got[[0, 1, 4]].tolist() == [0.30, 0.30, 0.6]
    assert (np.diff(got) >= 0).all()


# --- what is kept ---------------------------------------------------------------------------------------------------

HERE = {"provider": "CPU", "onnxruntime": "1", "processor": "P", "threads": "1", "batch": "1"}
PLACE = Place("Conv 16x16x3x3", "svd")


def test_times_are_kept_and_read_again(tmp_path: Path) -> None:
    first = Timings(HERE, tmp_path)
    first.add(PLACE, (8,), 0.5)
    first.add(PLACE, (8,), 0.7)
    first.save()
    again = Timings(HERE, tmp_path)
    assert again.of(PLACE) == {(8,): pytest.approx(0.6)}
    assert again.of(Place("another layer", "svd")) == again.of(Place(PLACE.layer, "cp3")) == {}


@pytest.mark.parametrize("key", HERE)
def test_times_of_another_environment_are_not_used(tmp_path: Path, key: str) -> None:
    first = Timings(HERE, tmp_path)
    first.add(PLACE, (8,), 0.5)
    first.save()
    other = HERE | {key: "other"}
    assert Timings(other, tmp_path).of(PLACE) == {}
    # not even where a file of that name says so
    (file,) = tmp_path.iterdir()
    Timings(other, tmp_path).save()
    (renamed,) = set(tmp_path.iterdir()) - {file}
    renamed.write_bytes(file.read_bytes())
    assert Timings(other, tmp_path).of(PLACE) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"environment": {}}', b"\xff\xfe"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: bytes) -> None:
    Timings(HERE, tmp_path).save()
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert Timings(HERE, tmp_path).of(PLACE) == {}


def test_times_that_cannot_be_kept_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    Timings(HERE, tmp_path / "file").save()
    Timings(HERE, None).save()


def test_the_folder_of_the_cache_can_be_named_and_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.setenv(FOLDER, "")
    assert cache_folder() is None
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/onnx-lowrank")


# --- the table and plans by it --------------------------------------------------------------------------------------

NODE_MS = 0.1


def made_up_times(monkeypatch: pytest.MonkeyPatch, ms) -> list[Path]:
    """Profiles in which every node of the optimised graph takes what `ms` says of the file and the node."""
    profiled: list[Path] = []

    def profile(model, reference, feeds, settings, folder):
        session = Session(model, settings, profile=folder)
        session.run(feeds)
        events = json.loads(session.end_profile().read_text())
        names = {e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")}
        profiled.append(model)
        return Profile({name: ms(name) for name in names}, 10.0, folder / OPTIMIZED)

    def pair(first, second, feeds, **options):
        return runtime.Timing(np.full(10, 10.0), np.full(10, 10.0))  # all of it is beside the nodes

    monkeypatch.setattr(latency, "profile_nodes", profile)
    monkeypatch.setattr(latency, "time_pair", pair)
    return profiled


def test_the_table_is_filled_once_and_then_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    profiled = made_up_times(monkeypatch, lambda name: NODE_MS)
    config = make_config(methods="svd,cp3", align=4)
    subject = open_subject(residual(), config)
    candidates = Planner(subject, config, no_progress).sets.all()
    table = LatencyTable(subject, config, subject.feeds(), no_progress)
    assert table.usable
    table.fill(candidates)
    assert table.measured == table.wanted > 0
    first = len(profiled)
    priced = table.priced(candidates)
    assert all(c.cost.latency_ms > 0 for group in priced for c in group)
    whole = sum((group[0].cost for group in priced), Cost(0, 0)).latency_ms
    assert 0 < whole <= table.original.latency_ms
    again = LatencyTable(subject, config, subject.feeds(), no_progress)
    again.fill(candidates)
    assert again.wanted == 0
    assert len(profiled) == first + 1  # the original alone
    for one, other in zip(again.priced(candidates), priced, strict=True):  # as shares of the layer's own time
        shares = [[c.cost.latency_ms / group[0].cost.latency_ms for c in group] for group in (one, other)]
        assert shares[0] == pytest.approx(shares[1])
    other = make_config(methods="svd,cp3", align=4, batch_size=2)
    more = LatencyTable(subject, other, subject.feeds(2), no_progress)
    more.fill(candidates)
    assert more.measured == table.measured


def test_a_table_that_runs_out_of_time_estimates_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.setattr(latency, "TABLE_SECONDS", 0.0)
    made_up_times(monkeypatch, lambda name: NODE_MS)
    config = make_config(methods="channel_svd", align=4, budget={"latency": 0.9})
    made = Planner(open_subject(residual(), config), config, no_progress)
    assert made.counts("latency") == "latency"
    plan = made.solve([Budget("latency", 0.9)])
    assert any(note.startswith("the latency of 0 of ") for note in plan.notes)
    for choice, group in zip(plan.choices, made.subject.groups, strict=True):
        if not choice.dense:
            assert choice.cost.latency_ms > 0
            assert choice.cost.macs < group.dense.cost.macs


def test_a_chain_that_is_no_faster_is_left_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    made_up_times(monkeypatch, lambda name: 1.0)  # each node takes the same: two are twice as slow as one
    config = make_config(methods="channel_svd", align=4, budget={"latency": 0.9})
    made = Planner(open_subject(residual(), config), config, no_progress)
    assert made.counts("latency") == "latency"
    with pytest.raises(OutOfReach, match=r"latency=0.9 cannot be met: .* reach 1.000"):
        made.solve([Budget("latency", 0.9)])


def test_a_plan_is_made_again_until_the_whole_takes_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(methods="channel_svd,svd", align=4, jobs=1, budget={"latency": 0.7})
    made = Planner(open_subject(models.DIGITS, config), config, no_progress)
    checked: list[float] = []

    class Table:
        """Layers take time in proportion to their MACs; the whole is always a tenth slower than its parts."""

        original = replace(made.subject.cost, latency_ms=float(made.subject.cost.macs))
        rest = float(made.subject.cost.macs - sum(group.dense.cost.macs for group in made.subject.groups))

        def priced(self, candidates):
            return [
                tuple(replace(c, cost=replace(c.cost, latency_ms=float(c.cost.macs))) for c in g) for g in candidates
            ]

        def check(self, plan):
            checked.append(plan.ratio("latency"))
            return 1.1 * plan.ratio("latency")

    made._table = Table()  # type: ignore[assignment]
    (plan, *_) = made.alternatives([Budget("latency", 0.7)])
    assert len(checked) == 2
    assert planner.NEAR * 0.7 <= 1.1 * plan.ratio("latency") <= 0.7


def test_where_times_cannot_be_told_apart_macs_stand_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatencyTable, "usable", False)
    config = make_config(budget={"latency": 0.5}, methods="channel_svd,svd")
    made = Planner(open_subject(models.DIGITS, config), config, no_progress)
    assert made.counts("latency") == "macs"
    assert any("cannot be told" in note for note in made.solve([Budget("macs", 0.5)]).notes)


def test_a_latency_budget_out_of_reach_says_how_far_it_goes() -> None:
    config = make_config(budget={"latency": 0.01}, methods="channel_svd,svd", jobs=1)
    made = Planner(open_subject(models.DIGITS, config), config, no_progress)

    class Bench:
        original = None

        def attempt(self, plan, *others):
            return plan

        def latency(self, plan):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lowrank.search.search.budget_results", lambda *given: ())
        plan = within_budgets(made, Bench())  # type: ignore[arg-type]
    assert any("latency=0.01 cannot be met: the layers that may be decomposed reach 0." in note for note in plan.notes)


def test_a_plan_by_latency_is_written_and_its_figures_reported() -> None:
    result = lr.compress(models.DIGITS, budget={"latency": 0.8}, methods="channel_svd,svd,cp3", calibrate=None)
    (budget,) = result.report.budgets
    assert budget.metric == "latency"
    assert budget.predicted is not None
    assert 0 < budget.predicted <= 0.9
    assert result.report.layers
    assert result.plan.original.latency_ms > result.plan.cost.latency_ms > 0


def test_times_that_vary_while_a_plan_is_made_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([1.0, 1.5])

    def time_pair(first: Any, second: Any, feeds: Any, **limits: float) -> Timing:
        return Timing(np.full(10, next(times)), np.full(10, 0.5))

    options: dict[str, Any] = {"budget": {"latency": 0.9}, "methods": "channel_svd", "align": 4, "jobs": 1}
    monkeypatch.setattr(latency, "time_pair", time_pair)
    assert any("took up to 1.5 times as long" in note for note in lr.compress(residual(), **options).report.notes)
    times = itertools.cycle([1.0, 1.1])
    assert not any("the machine was busy" in note for note in lr.compress(residual(), **options).report.notes)

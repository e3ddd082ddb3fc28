"""Plans as JSON: what is written, what is read back, and what an edited one may say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.candidates import Group, group_layers, price
from onnx_lowrank.planning.plans import plan_to_dict, read_choices, read_plan
from onnx_lowrank.types import Candidate, Cost, LowRankError, Plan, Skip
from tests import tiny
from tests.helpers import find, normal, parse

SHARED = """g (float[N, 16] x) => (float[N, 16] y) {
  [first] h = MatMul (x, w)
  [second] y = MatMul (h, w)
}"""


@pytest.fixture
def groups() -> tuple[Group, ...]:
    return group_layers(find(tiny.classifier()).layers)


@pytest.fixture
def shared() -> tuple[Group, ...]:
    """One group of two layers."""
    return group_layers(find(parse(SHARED, w=normal(16, 16))).layers)


def choices(*entries: Any) -> dict[str, Any]:
    return {"choices": list(entries)}


def choice(layers: Any = ("first",), method: Any = "svd", rank: Any = (2,), **more: Any) -> dict[str, Any]:
    layers, rank = (list(v) if isinstance(v, tuple) else v for v in (layers, rank))
    return {"layers": layers, "decomposition": method, "rank": rank, **more}


def test_a_plan_in_json_is_read_back_as_it_was(groups: tuple[Group, ...], tmp_path: Path) -> None:
    first = price(groups[0], "svd", (3,), 0.25)
    plan = Plan(
        (first, groups[1].dense), (Skip("relu", "Relu", "no kernel"),), Cost(0, 24), Cost(624, 648), ("a note",)
    )
    data = plan_to_dict(plan)
    assert data["original"] == {"macs": 624, "params": 648, "latency_ms": 0.0}
    assert data["planned"] == {"macs": 3 * 40 + 240, "params": 3 * 40 + 240 + 24, "latency_ms": 0.0}
    assert data["choices"][0] == choice(rank=(3,), macs=120, params=120, latency_ms=0.0, error=0.25)
    assert data["choices"][1] == choice(("second",), "dense", (), macs=240, params=240, latency_ms=0.0, error=0.0)
    assert data["skips"] == [{"layer": "relu", "op_type": "Relu", "reason": "no kernel"}]
    assert data["notes"] == ["a note"]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data, allow_nan=False))
    assert read_choices(read_plan(file), groups) == plan.choices


def test_layers_that_a_plan_does_not_name_stay_dense(groups: tuple[Group, ...]) -> None:
    assert [c.dense for c in read_choices(choices(choice()), groups)] == [False, True]
    assert all(c.dense for c in read_choices(choices(), groups))


def test_only_layers_decomposition_and_rank_of_an_edited_plan_matter(groups: tuple[Group, ...]) -> None:
    edited = choices(choice(macs=1, params=1, error=0.5, remark="mine"))
    assert read_choices(edited, groups)[0] == price(groups[0], "svd", (2,), 0.5)


@pytest.mark.parametrize("rank", [2, [2]])
@pytest.mark.parametrize("layers", ["first", ["first"]])
def test_one_rank_and_one_layer_may_stand_without_brackets(groups: tuple[Group, ...], layers: Any, rank: Any) -> None:
    assert read_choices(choices(choice(layers, rank=rank)), groups)[0].rank == (2,)


def test_a_dense_choice_needs_no_rank(groups: tuple[Group, ...]) -> None:
    assert read_choices(choices({"layers": ["first"], "decomposition": "dense"}), groups)[0].dense


def test_layers_that_share_a_kernel_are_chosen_together_in_any_order(shared: tuple[Group, ...]) -> None:
    (group,) = shared
    (made,) = read_choices(choices(choice(("second", "first"))), shared)
    assert made == price(group, "svd", (2,), 0.0)
    assert made.cost == Cost(2 * 2 * 32, 2 * 32)  # computed twice, stored once


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (choice(("third",)), "choice 0 of the plan names layer 'third', which the model does not have: see inspect"),
        (choice(()), "names layer ''"),
        (choice(("first", "third")), "names layer 'third'"),
        (choice(("first", "second")), "names first, second: .* decided together: first"),
        (choice(rank=(17,)), r"rank 17 of svd for layer 'first': 1 number\(s\) were expected, from 1 to 16"),
        (choice(rank=(0,)), "rank 0 of svd for layer 'first'"),
        (choice(rank=(-1,)), "rank -1 of svd for layer 'first'"),
        (choice(rank=()), r"rank \[\] of svd for layer 'first': 1 number"),
        (choice(rank=(2, 2)), "rank 2x2 of svd for layer 'first'"),
        (choice(rank=2.5), "choice 0 of the plan cannot be read .*: layers, decomposition and rank were expected"),
        (choice(rank="2"), "cannot be read"),
        (choice(rank=(None,)), "cannot be read"),
        (choice(rank=float("inf")), "cannot be read"),
        (choice(error="small"), "cannot be read"),
        (choice(error=None), "cannot be read"),
        (choice(method="magic"), "no decomposition is called 'magic'"),
        (choice(method=None), "no decomposition is called 'None'"),
        (choice(method="tucker2"), "layer 'first' cannot be decomposed by tucker2: "),
        ({"decomposition": "svd"}, "cannot be read"),
        ({"layers": ["first"]}, "cannot be read"),
        ([], "cannot be read"),
        (None, "cannot be read"),
        ("first", "cannot be read"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(groups: tuple[Group, ...], entry: Any, match: str) -> None:
    with pytest.raises(LowRankError, match=match):
        read_choices(choices(entry), groups)


def test_a_layer_is_decided_once(groups: tuple[Group, ...]) -> None:
    with pytest.raises(LowRankError, match="choice 1 of the plan decides layer 'first' a second time"):
        read_choices(choices(choice(), choice(rank=(3,))), groups)


def test_layers_that_share_a_kernel_are_not_decided_apart(shared: tuple[Group, ...]) -> None:
    with pytest.raises(LowRankError, match=r"names first: these layers share a kernel .*: first, second"):
        read_choices(choices(choice()), shared)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"plan.json cannot be read \(No such file or directory\)"),
        (b"", "plan.json is not JSON"),
        (b"a plan", "plan.json is not JSON"),
        (b'{"choices": [', "plan.json is not JSON"),
        (b"\xff\xfe\x00", "plan.json is not JSON"),
        (b"[" * 100_000, "plan.json is not JSON"),
        (b"[]", "has no list of 'choices'"),
        (b"{}", "has no list of 'choices'"),
        (b'{"choices": {}}', "has no list of 'choices'"),
        (b"3", "has no list of 'choices'"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes | None, match: str) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LowRankError, match=match) as error:
        read_plan(path)
    assert re.search("a (saved plan|plan saved with --plan) was expected", str(error.value))


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"cannot be read .*: a saved plan was expected"):
        read_plan(tmp_path)


def test_the_cost_of_a_plan_is_that_of_its_choices_and_the_rest(groups: tuple[Group, ...]) -> None:
    def cheap(candidate: Candidate) -> Candidate:
        return replace(candidate, cost=Cost(100, 50), error=0.1)

    plan = Plan(tuple(cheap(group.dense) for group in groups), (), Cost(5, 7), Cost(410, 214))
    assert plan.cost == Cost(205, 107)
    assert plan.ratio("macs") == plan.ratio("params") == 0.5
    assert plan.error == pytest.approx(0.2)
    assert plan.with_notes("b").notes == ("b",)


def test_a_plan_says_what_each_layer_could_have_become() -> None:
    plan = lr.analyze(models.DIGITS, budget={"macs": 0.5}, methods="channel_svd,cp3,svd")
    data = plan_to_dict(plan)
    assert [entry["layers"] for entry in data["sensitivity"]] == [entry["layers"] for entry in data["choices"]]
    for entry, choice in zip(data["sensitivity"], data["choices"], strict=True):
        (chosen,) = [c for c in entry["candidates"] if c["chosen"]]
        assert all(chosen[key] == choice[key] for key in choice if key != "layers")
        for method in {c["decomposition"] for c in entry["candidates"]}:
            curve = sorted((c["macs"], c["error"]) for c in entry["candidates"] if c["decomposition"] == method)
            assert [error for _, error in curve] == sorted((error for _, error in curve), reverse=True)
    assert len({c["decomposition"] for entry in data["sensitivity"] for c in entry["candidates"]}) > 2

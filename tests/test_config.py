"""Options: their everyday forms, what is refused, and files that hold them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.config import METHODS, Config, make_config, parse_budgets, parse_input_shapes, read_config
from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.options import OPTIONS
from onnx_lowrank.types import Budget, LowRankError


def test_every_option_of_the_command_line_is_a_field() -> None:
    files = ("reports", "page")
    flags = {flag for group, options in OPTIONS.items() for flag, _ in options if group not in files}
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {flag[2:].replace("-", "_") for flag in flags} <= fields


def test_every_field_is_explained() -> None:
    for field in dataclasses.fields(Config):
        assert field.name in (Config.__doc__ or "").replace("`", "")


def test_the_default_methods_are_decompositions() -> None:
    assert set(METHODS) <= set(DECOMPOSITIONS)


def test_the_default_config_asks_for_nothing() -> None:
    assert make_config() == Config()
    assert (Config().budget, Config().max_drop, Config().rank) == ((), None, None)
    assert Config().selects("anything")


HALF = (Budget("macs", 0.5),)


@pytest.mark.parametrize(
    ("name", "forms", "value"),
    [
        ("budget", [{"macs": 0.5}, "macs=0.5", ["macs=0.5"], Budget("macs", 0.5), HALF, {"macs": "0.5"}], HALF),
        ("budget", [{"macs": "50%"}, "macs=50%", ["macs=50 %"]], HALF),
        ("budget", [{"macs": 1, "size": 0.5}, ["macs=1", "size=0.5"]], (Budget("macs", 1.0), Budget("size", 0.5))),
        ("budget", [{}, []], ()),
        ("methods", ["svd,cp3", "svd, cp3,", ["svd", "cp3"], ("svd", "cp3")], ("svd", "cp3")),
        ("include", ["a*,b", ["a*", "b"]], ("a*", "b")),
        ("exclude", ["a", ["a"]], ("a",)),
        ("input_shape", [{"x": (1, 3)}, {"x": [1, np.int64(3)]}, "x:1,3", ["x:1,3"]], {"x": (1, 3)}),
        ("provider_library", [{"Foo": Path("a=b.so")}, "Foo=a=b.so", ["Foo=a=b.so"]], {"Foo": "a=b.so"}),
        ("target", ["nnapi"], "nnapi"),
        ("max_drop", [0.01, "0.01", np.float32(0.01).astype(float), "1%", "1.0 % "], pytest.approx(0.01)),
        ("max_drop", [0, 0.0], 0.0),
        ("jobs", [3, np.int64(3)], 3),
        ("preprocess", ["a.toml", Path("a.toml")], "a.toml"),
        ("fold_batchnorm", [True], True),
        ("seed", [None], 0),
    ],
)
def test_an_option_may_be_given_in_everyday_forms(name: str, forms: list[Any], value: Any) -> None:
    for form in forms:
        assert getattr(make_config(**{name: form}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("budget", {"macs": 0}, "budget macs=0: a fraction of the original above 0 and at most 1 was expected"),
        ("budget", {"macs": 1.01}, "budget macs=1.01: a fraction"),
        ("budget", {"macs": -0.5}, "budget macs=-0.5: a fraction"),
        ("budget", {"macs": float("nan")}, "budget macs=nan: a fraction"),
        ("budget", {"macs": float("inf")}, "budget macs=inf: a fraction"),
        ("budget", {"macs": None}, "budget macs 'None' was given: a number was expected"),
        ("budget", {"flops": 0.5}, "budget flops=0.5 was given: one of macs, params, size, latency was expected"),
        ("budget", "macs", "budget 'macs' was given: METRIC=RATIO"),
        ("budget", "macs=", "budget macs '' was given: a number was expected"),
        ("budget", ["macs=0.5", "macs=0.6"], "2 budgets on macs were given: one for each metric was expected"),
        ("budget", "macs=0.5,params=0.5", "budget 'macs=0.5,params=0.5' was given: one .* repeat --budget"),
        ("budget", 0.5, "budget 0.5 was given: METRIC=RATIO"),
        ("budget", [0.5], r"budget \[0.5\] was given: METRIC=RATIO"),
        ("max_drop", -0.1, "max_drop -0.1 was given: a number of at least 0 was expected"),
        ("max_drop", float("nan"), "max_drop nan was given"),
        ("max_drop", float("inf"), "max_drop inf was given"),
        ("max_drop", "much", "max_drop 'much' was given: a number was expected"),
        ("max_drop", "much%", "max_drop 'much%' was given: a number was expected"),
        ("max_drop", "%", "max_drop '%' was given: a number was expected"),
        ("max_drop", "-1%", "max_drop -0.01 was given: a number of at least 0 was expected"),
        ("max_drop", 1, r"^max_drop 1 was given: a share below 0.5 \(0.01 or 1% for one point\) was expected$"),
        ("max_drop", 0.5, "max_drop 0.5 was given: a share below 0.5"),
        ("max_drop", "50%", "max_drop 0.5 was given: a share below 0.5"),
        ("budget", "macs=500%", "budget macs=5: a fraction of the original above 0 and at most 1 was expected"),
        ("budget", {"macs": "half%"}, "budget macs 'half%' was given: a number was expected"),
        ("max_drop", [0.1], "max_drop .* was given: a number was expected"),
        ("objective", "beauty", "objective 'beauty' was given: one of macs, params, size, latency was expected"),
        ("methods", "", "an empty list of methods was given: at least one decomposition was expected"),
        ("methods", [], "an empty list of methods"),
        ("methods", 3, "methods 3 was given: a list of names was expected"),
        ("include", [3], r"include \[3\] was given: a list of names was expected"),
        ("rank", 0.5, "rank 0.5 was given: text was expected"),
        ("provider", 3, "provider 3 was given: text was expected"),
        ("metric", len, "metric <built-in function len> was given: text was expected"),
        ("preprocess", {}, "preprocess {} was given: text was expected"),
        ("fold_batchnorm", "no", "fold_batchnorm 'no' was given: true or false was expected"),
        ("fold_batchnorm", 1, "fold_batchnorm 1 was given: true or false was expected"),
        ("threads", -1, "threads -1 was given: a whole number of at least 0 was expected"),
        ("batch_size", 0, "batch_size 0 was given: a whole number of at least 1 was expected"),
        ("jobs", -1, "jobs -1 was given: a whole number of at least 0 was expected"),
        ("jobs", 1.0, "jobs 1.0 was given: a whole number was expected"),
        ("jobs", "2", "jobs '2' was given: a whole number was expected"),
        ("seed", -1, "seed -1 was given: a whole number of at least 0 was expected"),
        ("seed", True, "seed True was given: a whole number was expected"),
        ("align", 0, "align 0 was given: a whole number of at least 1 was expected"),
        ("input_shape", {"x": (1, -3)}, "input_shape .* was given: sizes of at least 1"),
        ("input_shape", {"x": "1,3"}, "input_shape .* was given: sizes of at least 1"),
        ("input_shape", {"x": (1, 1.5)}, "input_shape .* was given: sizes of at least 1"),
        ("input_shape", {"x": 3}, "input_shape .* was given: sizes of at least 1"),
        ("input_shape", 3, "input_shape 3 was given"),
        ("input_shape", "x", "input shape 'x' was given: NAME:SIZES"),
        ("input_shape", ":1,3", "input shape ':1,3' was given: NAME:SIZES"),
        (
            "provider_option",
            "a=1",
            r"provider_option is for a provider beside the CPU: give provider \(--provider NAME\)",
        ),
        ("provider_library", "foo.so", "provider_library 'foo.so' was given: NAME=PATH, for example QNN"),
        ("target", 3, "target 3 was given: text was expected"),
        ("rankk", "vbmf", "option 'rankk' was given: one of align, .*, trained was expected"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name: str, value: Any, match: str) -> None:
    with pytest.raises(LowRankError, match=match):
        make_config(**{name: value})


def test_a_drop_of_half_and_more_is_taken_where_the_range_of_the_metric_is_not_that_of_a_share() -> None:
    for metric in ("sqnr", "psnr", "mine.py:points"):
        assert make_config(max_drop=3, metric=metric).max_drop == 3
    for other in ("top1", "top5", "agreement", "cosine"):
        with pytest.raises(LowRankError, match=r"max_drop 3 was given: a share below 0.5"):
            make_config(max_drop=3, metric=other)


def test_layers_are_chosen_by_patterns_of_their_names() -> None:
    config = make_config(include="layer1.*,/fc/MatMul", exclude="*.conv2")
    chosen = [n for n in ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "/fc/MatMul") if config.selects(n)]
    assert chosen == ["layer1.0.conv1", "/fc/MatMul"]
    assert not make_config(include="Conv_1").selects("conv_1")


def test_an_input_name_may_hold_a_colon() -> None:
    assert parse_input_shapes(["input:0:1,3,8,8"]) == {"input:0": (1, 3, 8, 8)}
    assert parse_budgets(["macs=0.5", "latency=1"]) == (Budget("macs", 0.5), Budget("latency", 1.0))


def test_a_config_as_json_says_everything_and_reads_back(tmp_path: Path) -> None:
    config = make_config(
        budget="macs=0.5", methods="svd", include="a*", input_shape="x:1,3", evaluate=tmp_path, calibrate=[1], align=4
    )
    data = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert set(data) == {field.name for field in dataclasses.fields(Config)}
    assert data["budget"] == {"macs": 0.5}
    assert (data["evaluate"], data["calibrate"]) == (str(tmp_path), "list")
    again = make_config(**(data | {"calibrate": [1]}))
    assert dataclasses.replace(again, evaluate=tmp_path) == config


def test_one_process_for_each_core_is_the_default() -> None:
    assert make_config(jobs=3).workers == 3
    assert make_config().workers >= 1


def test_options_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(
        'max-drop = 0.01\nmethods = ["svd"]\ninput-shape = {x = [1, 3]}\nbudget = {macs = 0.5}\nrank = "é"\n',
        encoding="utf-8",
    )
    options = read_config(path)
    assert options["max_drop"] == 0.01 and options["rank"] == "é"
    config = make_config(**options)
    assert (config.budget, config.methods, config.input_shape) == (HALF, ("svd",), {"x": (1, 3)})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "options.toml cannot be read .*: a TOML file was expected"),
        (b"max-drop 0.01", "options.toml is not TOML .*: KEY = VALUE lines were expected"),
        (b"rank = '\xe9'", "options.toml is not TOML"),
        (b"calibrate = 'a.py:data'", "options.toml: calibrate = 'a.py:data' would execute a file"),
        (b"evaluate = 'a.py:data'", "evaluate = 'a.py:data' would execute a file"),
        (b"metric = 'a.py:data'", "metric = 'a.py:data' would execute a file"),
        (b"provider-library = 'Foo=foo.so'", "options.toml: provider_library would execute a file: give it on the"),
        (b"evaluate = ['a.py:data']", "would execute a file: give it on the command line instead"),
    ],
)
def test_a_file_of_options_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, match: str) -> None:
    path = tmp_path / "options.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LowRankError, match=match):
        read_config(path)

"""The command line as users meet it: exit codes, one clear line for a mistake, and no file that was not asked for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import models
from onnx_lowrank.cli import main
from tests import tiny
from tests.helpers import arrays, stored, with_stored
from tests.helpers import run as run_model

Run = Callable[..., tuple[int, str, str]]
QUICK = "--methods svd,spatial_svd --align 1 --jobs 1"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; its exit code, and what it printed to stdout and stderr."""

    def call(line: str, *more: str) -> tuple[int, str, str]:
        code = main([*shlex.split(line), *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model, its data, a folder for results, and a scratch folder that has to end up empty."""
    furnish(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and one of everything that cannot be used: one folder for all tests, none of which may change it."""
    folder = tmp_path_factory.mktemp("bad")
    furnish(folder)
    prepare(folder)
    return folder


def furnish(folder: Path) -> None:
    tiny.save(tiny.classifier(), folder / "model.onnx")
    tiny.save_data(folder / "data.npz", **tiny.labelled(tiny.classifier()))
    (folder / "out").mkdir()
    (folder / "scratch").mkdir()
    (folder / "out" / "kept.txt").write_text("keep me")


def flat(text: str) -> str:
    """Text of a report without its lines and tables, in which a sentence may be spread over several cells."""
    return " ".join(re.sub("[│┃|]", " ", text).split())


def plan_of(*choices: object) -> str:
    return json.dumps({"format": 1, "choices": list(choices)})


def choice(layer: object = "first", method: object = "svd", rank: object = 2) -> dict[str, object]:
    return {"layers": [layer], "decomposition": method, "rank": rank}


def prepare(folder: Path) -> None:
    """One of everything that cannot be used."""
    x = tiny.inputs(40)
    whole = models.DIGITS.read_bytes()
    shutil.copy(models.DIGITS, folder / "digits.onnx")
    (folder / "folder.onnx").mkdir()
    (folder / "empty.onnx").touch()
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupted.onnx").write_bytes(whole[:1000] + b"\xff" * 64 + whole[1064:])
    (folder / "text.onnx").write_text("This is no model.\n")
    nan = np.full((24, 16), np.nan, "float32")
    tiny.save(with_stored(tiny.classifier(), "w1", nan), folder / "nan.onnx")
    tiny.save(tiny.without_layers(), folder / "relu.onnx")
    tiny.save(tiny.strange("Gelatinize"), folder / "operator.onnx")
    tiny.save(tiny.strange("strange.domain.Relu"), folder / "domain.onnx")
    narrow, double = tiny.classifier(), tiny.without_layers()
    narrow.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 15
    narrow = with_stored(narrow, "w1", stored(narrow, "w1")[:, :15])
    tiny.save(narrow, folder / "narrow.onnx")
    del double.graph.input[:], double.graph.output[:]
    double.graph.input.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, ["N", 16]))
    double.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, ["N", 16]))
    tiny.save(double, folder / "double.onnx")
    tiny.save_data(folder / "other_name.npz", z=x)
    tiny.save_data(folder / "other_shape.npz", x=x[:, :15])
    tiny.save_data(folder / "whole_numbers.npz", x=np.ones((40, 16), "int64"))
    tiny.save_data(folder / "no_sample.npz", x=x[:0])
    tiny.save_data(folder / "not_finite.npz", x=np.full_like(x, np.inf))
    tiny.save_data(folder / "without_labels.npz", x=x)
    tiny.save_data(folder / "few_labels.npz", x=x, labels=np.zeros(39, int))
    tiny.save_data(folder / "wide_labels.npz", x=x, labels=np.zeros((40, 3), int))
    tiny.save_data(folder / "text_labels.npz", x=x, labels=np.array(["cat", "dog"] * 20))
    tiny.save_data(folder / "float_labels.npz", x=x, labels=np.zeros(40, "float32"))
    tiny.save_data(folder / "hot_labels.npz", x=x, labels=np.eye(10)[np.arange(40) % 10])
    tiny.save_data(folder / "renamed_labels.npz", x=x, y=np.zeros(40, int))
    tiny.save_data(folder / "pictures.npz", images=np.zeros((40, 8, 8, 1), "uint8"))
    (folder / "text.npz").write_text("This is no archive.\n")
    (folder / "data.csv").write_text("1,2\n")
    (folder / "functions.py").write_text(
        "def metric(outputs, labels):\n    raise RuntimeError('two\\nlines')\n"
        "def words(outputs, labels):\n    return 'good'\n"
        "def data():\n    raise RuntimeError('two\\nlines')\n"
        "number = 3\n"
    )
    (folder / "broken.py").write_text("def metric(:\n")
    for name, text in {
        "text": "This is no plan.\n",
        "list": "[]",
        "empty": "{}",
        "other": plan_of(choice("conv1")),
        "high": plan_of(choice(rank=17)),
        "zero": plan_of(choice(rank=0)),
        "none": plan_of(choice(rank=[])),
        "two": plan_of(choice(rank=[2, 2])),
        "half": plan_of(choice(rank=2.5)),
        "infinite": '{"choices": [{"layers": ["first"], "decomposition": "svd", "rank": 1e999}]}',
        "word": plan_of(choice(rank="high")),
        "method": plan_of(choice(method="magic")),
        "unfit": plan_of(choice(method="spatial_svd")),
        "twice": plan_of(choice(), choice()),
        "nameless": plan_of({"decomposition": "svd", "rank": 2}),
        "nested": plan_of(choice(["first"])),
        "plain": plan_of("first"),
        "deep": "[" * 100_000,
    }.items():
        (folder / f"{name}.json").write_text(text)
    for name, text in {
        "text": "This is no TOML.\n",
        "unknown": "bugdet = 'macs=0.5'\n",
        "code": "metric = 'functions.py:metric'\n",
        "more_code": "evaluate = 'functions.py:data'\n",
        "number": "budget = 5\n",
        "list": "methods = 3\n",
        "sizes": "input-shape = {x = [1, 'many']}\n",
        "word": "max-drop = 'little'\n",
        "truth": "fold-batchnorm = 'no'\n",
        "provider": "provider = 3\n",
        "latin": "",
    }.items():
        (folder / f"{name}.toml").write_text(text)
    (folder / "latin.toml").write_bytes(b"rank = '\xe9'\n")
    (folder / "link.onnx").symlink_to("model.onnx")


COMPRESS = "compress model.onnx out/small.onnx "
ASKED = "--budget macs=0.5"
EVALUATE = COMPRESS + ASKED + " --evaluate "

BAD_INPUT = [
    # the model
    ("compress missing.onnx out/small.onnx " + ASKED, "missing.onnx cannot be read"),
    ("compress empty.onnx out/small.onnx " + ASKED, "empty.onnx is empty"),
    ("compress truncated.onnx out/small.onnx " + ASKED, "cut short or damaged"),
    ("compress corrupted.onnx out/small.onnx " + ASKED, "cut short or damaged"),
    ("compress text.onnx out/small.onnx " + ASKED, "not an ONNX model"),
    ("compress folder.onnx out/small.onnx " + ASKED, "folder.onnx is a folder"),
    ("compress '' out/small.onnx " + ASKED, "is a folder"),
    ("compress nan.onnx out/small.onnx " + ASKED, "'w1' holds NaN or infinity"),
    ("compress domain.onnx out/small.onnx " + ASKED, "cannot load the model.*strange.domain"),
    ("compress operator.onnx out/small.onnx " + ASKED, "cannot load the model.*Gelatinize"),
    ("compress relu.onnx out/small.onnx " + ASKED, "no layer to decompose"),
    ("inspect missing.onnx", "missing.onnx cannot be read"),
    ("inspect nan.onnx", "'w1' holds NaN or infinity"),
    ("verify model.onnx missing.onnx", "missing.onnx cannot be read"),
    ("verify model.onnx digits.onnx", r"different inputs, x float32 \(N, 16\) and \S+ float32 \(.*\): two versions"),
    ("verify model.onnx narrow.onnx", r"different inputs, x float32 \(N, 16\) and x float32 \(N, 15\): two versions"),
    ("verify model.onnx double.onnx", r"different inputs, x float32 \(N, 16\) and x float64 \(N, 16\): two versions"),
    ("apply truncated.onnx list.json out/small.onnx", "cut short or damaged"),
    # the data
    (EVALUATE + "missing.npz", "missing.npz: no such file"),
    (EVALUATE + "text.npz", "not a readable .npz"),
    (EVALUATE + "data.csv", "not a form of data"),
    (EVALUATE + "other_name.npz", "wants arrays x, the file holds z"),
    (EVALUATE + "other_shape.npz", r"shape \(\d+, 15\)"),
    (EVALUATE + "whole_numbers.npz", "holds int64"),
    (EVALUATE + "no_sample.npz", "no samples"),
    (EVALUATE + "not_finite.npz", "not finite"),
    (EVALUATE + "few_labels.npz", r"labels \(39,\) for 40 samples"),
    (EVALUATE + "wide_labels.npz", r"wide_labels.npz: labels of shape .* do not fit"),
    (EVALUATE + "text_labels.npz", r"text_labels.npz: labels of dtype <U3 were given: integers were expected"),
    (EVALUATE + "float_labels.npz", r"float_labels.npz: labels of dtype float32 were given: integers were expected"),
    (EVALUATE + "hot_labels.npz", r"hot_labels.npz: labels of shape .* one-hot, store labels.argmax"),
    (EVALUATE + "renamed_labels.npz", r"renamed_labels.npz: array 'y' is not used: labels are called 'labels'"),
    (EVALUATE + "functions.py:data", "raised RuntimeError: two lines"),
    (EVALUATE + "functions.py:number", "no function 'number'"),
    (EVALUATE + "functions.py", "name the function"),
    (EVALUATE + "data.npz --preprocess missing.toml", "missing.toml"),
    (COMPRESS + ASKED + " --calibrate missing.npz", "missing.npz: no such file"),
    ("compress digits.onnx out/small.onnx " + ASKED + " --evaluate pictures.npz", "needs a preprocess file"),
    ("verify model.onnx model.onnx --evaluate missing.npz", "missing.npz: no such file"),
    # the metric
    (EVALUATE + "data.npz --metric beauty", "no metric is called 'beauty'"),
    (EVALUATE + "without_labels.npz --metric top1", "needs labels"),
    (EVALUATE + "without_labels.npz --metric top5", "needs labels"),
    (EVALUATE + "data.npz --metric missing.py:metric", "no such file"),
    (EVALUATE + "data.npz --metric broken.py:metric", "executing the file failed: SyntaxError"),
    (EVALUATE + "data.npz --metric functions.py:metric", "functions.py:metric.*RuntimeError: two lines"),
    (EVALUATE + "data.npz --metric functions.py:words", "'good': one number was expected"),
    # where results go
    ("compress model.onnx missing/small.onnx " + ASKED, "folder missing does not exist"),
    ("compress model.onnx model.onnx " + ASKED, "is the model that was given"),
    ("compress model.onnx ./out/../model.onnx " + ASKED, "is the model that was given"),
    ("compress model.onnx link.onnx " + ASKED, "is the model that was given"),
    ("compress link.onnx model.onnx " + ASKED, "is the model that was given"),
    ("compress model.onnx out " + ASKED, "out is a folder"),
    ("compress model.onnx '' " + ASKED, "is a folder"),
    (COMPRESS + ASKED + " --json out/small.onnx", "one file was named for two results"),
    (COMPRESS + ASKED + " --json out/../out/small.onnx", "one file was named for two results"),
    (COMPRESS + ASKED + " --json out/small.unmet.onnx", "one file was named for two results"),
    (COMPRESS + ASKED + " --json out/x --plan out/x", "one file was named for two results"),
    (COMPRESS + ASKED + " --json missing/report.json", "folder missing does not exist"),
    (COMPRESS + ASKED + " --plan missing/plan.json", "folder missing does not exist"),
    (COMPRESS + ASKED + " --json model.onnx", "model.onnx is .* that was given"),
    (EVALUATE + "data.npz --json data.npz", "data.npz is .* that was given"),
    ("compress model.onnx data.npz " + ASKED + " --calibrate data.npz", "data.npz is .* that was given"),
    ("apply model.onnx zero.json out/small.onnx --json zero.json", "zero.json is .* that was given"),
    ("apply model.onnx zero.json zero.json", "zero.json is .* that was given"),
    ("verify model.onnx digits.onnx --json digits.onnx", "digits.onnx is .* that was given"),
    # budgets and other goals
    (COMPRESS, "nothing was asked for"),
    (COMPRESS + "--budget macs=0", "budget macs=0: a fraction"),
    (COMPRESS + "--budget macs=1.5", "budget macs=1.5: a fraction"),
    (COMPRESS + "--budget macs=-1", "budget macs=-1: a fraction"),
    (COMPRESS + "--budget macs=nan", "budget macs=nan: a fraction"),
    (COMPRESS + "--budget macs=inf", "budget macs=inf: a fraction"),
    (COMPRESS + "--budget macs=abc", "budget macs 'abc' was given: a number"),
    (COMPRESS + "--budget macs", "budget 'macs' was given: METRIC=RATIO"),
    (COMPRESS + "--budget flops=0.5", "budget flops=0.5 was given: one of macs, params"),
    (COMPRESS + "--budget macs=0.5 --budget macs=0.4", "2 budgets on macs were given"),
    (COMPRESS + "--budget macs=0.5,params=0.5", "repeat --budget for another"),
    (COMPRESS + "--quantize int8", r"quantize int8 needs samples: give calibrate \(--calibrate DATA\)$"),
    (
        COMPRESS + "--rank 8",
        "rank '8' was given: an estimator was expected.* ranks by hand go into a plan: .* --plan F",
    ),
    (COMPRESS + "--max-drop 0.01", "max_drop needs samples"),
    (COMPRESS + "--max-drop nan --evaluate data.npz", "max_drop nan was given"),
    (COMPRESS + "--max-drop inf --evaluate data.npz", "max_drop inf was given"),
    (COMPRESS + "--max-drop -0.1 --evaluate data.npz", "max_drop -0.1 was given"),
    (COMPRESS + "--max-drop little --evaluate data.npz", "max_drop 'little' was given: a number was expected"),
    (COMPRESS + "--max-drop 1 --evaluate data.npz", "max_drop 1 was given: a share below 0.5"),
    (COMPRESS + "--max-drop 0.01 --evaluate data.npz --objective beauty", "objective 'beauty' was given"),
    (COMPRESS + "--rank magic", "there is no 'magic'"),
    (COMPRESS + "--rank energy=2", "rank estimator 'energy=2'"),
    (COMPRESS + "--rank energy=much", "rank estimator 'energy=much'"),
    # layers and machine
    (COMPRESS + ASKED + " --methods magic", "no decomposition is called 'magic'"),
    (COMPRESS + ASKED + " --methods svd,magic", "no decomposition is called 'magic'"),
    (COMPRESS + ASKED + " --methods ''", "empty list of methods"),
    (COMPRESS + ASKED + " --align 0", "align 0 was given"),
    (COMPRESS + ASKED + " --align some", "invalid int value: 'some'"),
    (COMPRESS + ASKED + " --jobs -1", "jobs -1 was given"),
    (COMPRESS + ASKED + " --seed -1", "seed -1 was given"),
    (COMPRESS + ASKED + " --threads -1", "threads -1 was given"),
    (COMPRESS + ASKED + " --batch-size 0", "batch_size 0 was given"),
    (COMPRESS + ASKED + " --provider Abacus", "provider 'Abacus' is not in this build.*CPUExecutionProvider"),
    (COMPRESS + ASKED + " --input-shape 1,16", "input shape '1,16' was given: NAME:SIZES"),
    (COMPRESS + ASKED + " --input-shape x:1,many", "input shape 'x:1,many' was given"),
    (COMPRESS + ASKED + " --input-shape x:1,0", "input shape 'x:1,0' was given"),
    (COMPRESS + ASKED + " --input-shape z:1,16", "input shape given for 'z': the model's inputs are x"),
    (COMPRESS + ASKED + " --input-shape x:1,15", r"the model expects \[N, 16\]"),
    (COMPRESS + ASKED + " --input-shape x:16", r"the model expects \[N, 16\]"),
    # usage
    ("squeeze model.onnx", "invalid choice: 'squeeze'"),
    ("compress", "required: MODEL, OUT"),
    ("compress model.onnx", "required: OUT"),
    ("apply model.onnx list.json", "required: OUT"),
    ("verify model.onnx", "required: OTHER"),
    ("inspect", "required: MODEL"),
    (COMPRESS + "--smaller", "unrecognized arguments: --smaller; see onnx-lowrank compress --help$"),
    (COMPRESS + "--bugdet macs=0.5", "--bugdet macs=0.5; did you mean --budget\\?; see onnx-lowrank compress --help$"),
    (COMPRESS + "--max-dorp=0.5", "did you mean --max-drop\\?"),
    ("verify model.onnx model.onnx --report", "--report: expected one argument; see onnx-lowrank verify --help$"),
    ("--quite inspect model.onnx", "--quite; see onnx-lowrank --help$"),
    (COMPRESS + "--budget", "--budget: expected one argument"),
    # the config file
    (COMPRESS + "--config missing.toml", "missing.toml cannot be read"),
    (COMPRESS + "--config out", "out cannot be read"),
    (COMPRESS + "--config text.toml", "text.toml is not TOML"),
    (COMPRESS + "--config latin.toml", "latin.toml is not TOML"),
    (COMPRESS + "--config unknown.toml", "option 'bugdet' was given: one of align, augment, batch_size"),
    (COMPRESS + "--config code.toml", "code.toml: metric = .* would execute a file"),
    (COMPRESS + "--config more_code.toml", "more_code.toml: evaluate = .* would execute a file"),
    (COMPRESS + "--config number.toml", "budget 5 was given"),
    (COMPRESS + "--config list.toml", "methods 3 was given"),
    (COMPRESS + "--config sizes.toml", "input_shape .* was given"),
    (COMPRESS + "--config word.toml", "max_drop 'little' was given"),
    (COMPRESS + "--config truth.toml", "fold_batchnorm 'no' was given"),
    (COMPRESS + "--config provider.toml", "provider 3 was given"),
    # the plan
    ("apply model.onnx missing.json out/small.onnx", "missing.json cannot be read"),
    ("apply model.onnx out out/small.onnx", "out cannot be read"),
    ("apply model.onnx data.npz out/small.onnx", "data.npz is not JSON"),
    ("apply model.onnx text.json out/small.onnx", "text.json is not JSON"),
    ("apply model.onnx deep.json out/small.onnx", "deep.json is not JSON"),
    ("apply model.onnx list.json out/small.onnx", "no list of 'choices'"),
    ("apply model.onnx empty.json out/small.onnx", "no list of 'choices'"),
    ("apply model.onnx other.json out/small.onnx", "names layer 'conv1', which the model does not have"),
    ("apply model.onnx high.json out/small.onnx", "rank 17 of svd for layer 'first': .* from 1 to 16"),
    ("apply model.onnx zero.json out/small.onnx", "rank 0 of svd for layer 'first'"),
    ("apply model.onnx none.json out/small.onnx", r"rank \[\] of svd for layer 'first': 1 number\(s\)"),
    ("apply model.onnx two.json out/small.onnx", r"rank 2x2 of svd for layer 'first': 1 number\(s\)"),
    ("apply model.onnx half.json out/small.onnx", "choice 0 of the plan cannot be read"),
    ("apply model.onnx infinite.json out/small.onnx", "choice 0 of the plan cannot be read"),
    ("apply model.onnx word.json out/small.onnx", "choice 0 of the plan cannot be read"),
    ("apply model.onnx method.json out/small.onnx", "no decomposition is called 'magic'"),
    ("apply model.onnx unfit.json out/small.onnx", "'first' cannot be decomposed by spatial_svd"),
    ("apply model.onnx twice.json out/small.onnx", "choice 1 of the plan decides layer 'first' a second time"),
    ("apply model.onnx nameless.json out/small.onnx", "choice 0 of the plan cannot be read"),
    ("apply model.onnx nested.json out/small.onnx", "choice 0 of the plan"),
    ("apply model.onnx plain.json out/small.onnx", "choice 0 of the plan cannot be read"),
]


@pytest.mark.parametrize(("line", "match"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(
    bad_files: Path, monkeypatch: pytest.MonkeyPatch, run: Run, line: str, match: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(bad_files / "scratch"))
    monkeypatch.chdir(bad_files)
    before = tiny.contents(bad_files)
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.startswith("onnx-lowrank: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert re.search(match, err), err
    assert tiny.contents(bad_files) == before


def test_without_a_command_the_commands_are_shown(run: Run) -> None:
    code, out, err = run("")
    assert code == 2
    assert out.startswith("usage: onnx-lowrank ") and "compress" in out
    assert err == "onnx-lowrank: COMMAND was not given; see onnx-lowrank --help\n"


@pytest.mark.parametrize("share", [k / 12 for k in range(1, 12)])
def test_a_model_cut_short_anywhere_is_bad_input(folder: Path, run: Run, share: float) -> None:
    whole = Path("model.onnx").read_bytes()
    Path("part.onnx").write_bytes(whole[: int(share * len(whole))])
    code, _, err = run("compress part.onnx out/small.onnx " + ASKED)
    assert code == 2
    assert re.fullmatch("onnx-lowrank: part.onnx .*(cut short or damaged|not a whole ONNX model).*\n", err)
    assert not Path("out/small.onnx").exists()


@pytest.mark.parametrize("command", ["", "inspect", "compress", "apply", "verify", "providers"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    assert f"usage: onnx-lowrank {command}".rstrip() in capsys.readouterr().out


def test_a_budget_that_is_met_is_exit_code_0_and_the_model_under_its_name(folder: Path, run: Run) -> None:
    code, out, err = run(f"compress model.onnx out/small.onnx --budget macs=0.5 --evaluate data.npz {QUICK}")
    assert (code, err) == (0, "")
    assert out.endswith("written: out/small.onnx\n")
    assert "met" in out and "not met" not in out
    assert sorted(os.listdir("out")) == ["kept.txt", "small.onnx"]
    macs, _ = tiny.count(onnx.load("out/small.onnx"), {"x": tiny.inputs(1)})
    assert macs <= 0.5 * tiny.CLASSIFIER_MACS
    assert not os.listdir("scratch")


def test_a_budget_out_of_reach_is_exit_code_1_and_the_best_is_written_beside_the_name(folder: Path, run: Run) -> None:
    Path("out/small.onnx").write_bytes(b"an earlier result")
    code, out, err = run(f"compress model.onnx out/small.onnx --budget macs=0.01 {QUICK}")
    assert (code, err) == (1, "")
    assert "macs=0.01 cannot be met" in flat(out)
    assert "not met" in out
    assert out.endswith("written: out/small.unmet.onnx; out/small.onnx is of an earlier run\n")
    assert Path("out/small.onnx").read_bytes() == b"an earlier result"
    macs, _ = tiny.count(onnx.load("out/small.unmet.onnx"), {"x": tiny.inputs(1)})
    assert macs == 16 + 24 + 24 + 10  # rank 1 everywhere


@pytest.mark.parametrize("name", ["small", "small.onnx", "small.v2.onnx", "small.pb"])
def test_what_is_not_met_ends_in_unmet_onnx(folder: Path, run: Run, name: str) -> None:
    assert run(f"compress model.onnx out/{name} --budget macs=0.01 {QUICK}")[0] == 1
    assert sorted(os.listdir("out")) == ["kept.txt", f"{name.removesuffix('.onnx').removesuffix('.pb')}.unmet.onnx"]


def test_the_model_that_was_given_is_not_overwritten_by_what_is_not_met(folder: Path, run: Run) -> None:
    tiny.save(tiny.classifier(), Path("small.unmet.onnx"))
    code, _, err = run(f"compress small.unmet.onnx small.onnx --budget macs=0.01 {QUICK}")
    assert code == 2
    assert "small.unmet.onnx is the model that was given" in err
    assert tiny.count(onnx.load("small.unmet.onnx"), {"x": tiny.inputs(1)})[0] == tiny.CLASSIFIER_MACS


@pytest.mark.parametrize(
    "goal", ["--rank vbmf", "--max-drop 0.1 --objective macs", "--budget macs=1", "--budget macs=0.5"]
)
def test_a_model_with_nothing_worth_decomposing_is_written_unchanged(folder: Path, run: Run, goal: str) -> None:
    tiny.save(tiny.too_small(), Path("tiny.onnx"))
    x = np.random.default_rng(0).standard_normal((100, 2), dtype="float32")
    tiny.save_data(Path("pairs.npz"), x=x, labels=(x[:, 0] > 0).astype(int))
    line = f"compress tiny.onnx out/small.onnx {goal} --evaluate pairs.npz --json out/report.json --methods svd"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert onnx.load("out/small.onnx") == tiny.too_small()
    report = json.loads(Path("out/report.json").read_text())
    assert report["unchanged"] is True
    assert report["layers"] == []
    (skip,) = report["skips"]
    assert skip["layer"] == "only"
    assert re.search("saves nothing|rank is 0", skip["reason"])
    assert skip["reason"] in flat(out)


def test_a_broken_accuracy_is_exit_code_1_even_within_the_budget(folder: Path, run: Run) -> None:
    tiny.save(tiny.fragile(), Path("fragile.onnx"))
    tiny.save_data(Path("each.npz"), **tiny.one_hot())
    line = f"compress fragile.onnx out/small.onnx --budget macs=0.5 --max-drop 0.05 --evaluate each.npz {QUICK}"
    code, _, _ = run(line, "--json", "out/report.json")
    assert code == 1
    assert not Path("out/small.onnx").exists() and Path("out/small.unmet.onnx").exists()
    budgets = {b["metric"]: b for b in json.loads(Path("out/report.json").read_text())["budgets"]}
    assert budgets["macs"]["met"] is True
    assert budgets["drop"]["met"] is False and budgets["drop"]["reached"] > 0.05


def test_a_fragile_model_is_left_dense_under_max_drop(folder: Path, run: Run) -> None:
    tiny.save(tiny.fragile(), Path("fragile.onnx"))
    tiny.save_data(Path("each.npz"), **tiny.one_hot())
    line = f"compress fragile.onnx out/small.onnx --max-drop 5% --objective macs --evaluate each.npz {QUICK}"
    code, out, _ = run(line)
    assert code == 0
    assert "no plan lost as little as 0.05: its layers are left as they are" in flat(out)
    assert onnx.load("out/small.onnx") == tiny.fragile()


def test_labels_shifted_by_a_row_are_told_and_no_drop_is_promised_on_them(folder: Path, run: Run) -> None:
    data = arrays(models.DIGITS_TEST)
    tiny.save_data(Path("shifted.npz"), input=data["input"], labels=np.roll(data["labels"], 1))
    told = "right, no better than guessing among 10 classes: labels, preprocess or the order of classes are wrong"
    line = f"compress {models.DIGITS} out/small.onnx --objective macs --evaluate shifted.npz {QUICK}"
    before = tiny.contents(folder)
    code, out, err = run(f"{line} --max-drop 0.02")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err and "max_drop cannot be held on these samples" in err
    assert tiny.contents(folder) == before
    code, out, _ = run(f"verify {models.DIGITS} {models.DIGITS} --evaluate shifted.npz")
    assert code == 0 and told in flat(out)


def test_an_interrupt_is_exit_code_130_and_nothing_is_written(folder: Path, run: Run) -> None:
    Path("interrupts.py").write_text(
        "import numpy as np\ndef data():\n    yield {'x': np.ones((1, 16), np.float32)}\n    raise KeyboardInterrupt\n"
    )
    before = tiny.contents(folder)
    code, out, err = run(f"compress model.onnx out/small.onnx {ASKED} --evaluate interrupts.py:data {QUICK}")
    assert (code, out) == (130, "")
    assert err == "onnx-lowrank: interrupted; nothing was written\n"
    assert tiny.contents(folder) == before


@pytest.mark.parametrize("name", ["[red]", "[/red]", "[bold]x[/bold]", ":smile:", "a  b", "\\[x]", "[link=y]z"])
def test_names_that_look_like_markup_are_printed_as_they_are(folder: Path, run: Run, name: str) -> None:
    assert run("inspect", f"{name}.missing.onnx")[2].startswith(f"onnx-lowrank: {name}.missing.onnx cannot be read")
    model = tiny.classifier()
    for node in model.graph.node:
        node.name = f"{name}{node.op_type}{len(node.input)}"
    for place in (Path(f"{name}.onnx"), Path("out", f"{name}.onnx")):
        place.parent.mkdir(exist_ok=True)
    path = tiny.save(model, Path(f"{name}.onnx"))
    code, out, _ = run(f"compress --budget macs=0.5 --exclude *2 {QUICK}", str(path), f"out/{path}")
    assert code == 0
    assert out.endswith(f"written: out/{name}.onnx\n")
    assert f"\n{name}Gemm3 " in out and f"\n{name}Gemm2 " in out  # decomposed; left alone
    code, out, _ = run("inspect", str(path))
    assert code == 0
    assert f"\n{name}Gemm3 " in out


def test_a_long_path_is_printed_in_one_piece(folder: Path, run: Run) -> None:
    deep = Path("out", *["a long name of a folder"] * 5)
    deep.mkdir(parents=True)
    code, out, _ = run(f"compress model.onnx {ASKED} {QUICK}", str(deep / "small.onnx"))
    assert code == 0
    assert out.endswith(f"\nwritten: {deep}/small.onnx\n")


@pytest.mark.parametrize(
    "line",
    [
        f"compress model.onnx out/small.onnx {ASKED} {QUICK}",
        f"compress model.onnx out/small.onnx --budget macs=0.01 {QUICK}",
        "apply model.onnx plan.json out/small.onnx --jobs 1",
        "verify model.onnx model.onnx",
        "inspect model.onnx --methods svd --jobs 1",
        "providers",
    ],
)
def test_quiet_prints_nothing(folder: Path, run: Run, line: str) -> None:
    Path("plan.json").write_text(plan_of(choice()))
    assert run(line)[1] != ""
    code, out, err = run(f"{line} --quiet")
    assert code == ("0.01" in line)
    assert (out, err) == ("", "")


def test_inspect_says_what_is_there_and_what_it_could_become(folder: Path, run: Run) -> None:
    code, out, err = run("inspect model.onnx --methods svd --align 1 --jobs 1")
    assert (code, err) == (0, "")
    assert out.startswith("inputs: x float32 (N, 16); outputs: y float32 (N, 10)\n")
    assert "624 MACs for one sample, 648 parameters, 2 layers" in out
    # the largest rank r with r (16 + 24) <= 16 * 24 / 2, and its error
    kernel = np.linalg.svd(stored(tiny.classifier(), "w1").astype(float), compute_uv=False)
    error = np.sqrt(np.square(kernel[4:]).sum() / np.square(kernel).sum())
    (row,) = (line for line in out.splitlines() if line.startswith("first "))
    assert [part.strip() for part in re.split("[│|]", row)] == [
        "first", "Gemm", "24x16", "384", "384", "svd 4", f"{error:.2f}",
    ]  # fmt: skip


def test_inspect_shows_a_model_that_no_runtime_could_run(folder: Path, run: Run) -> None:
    tiny.save(tiny.strange("Gelatinize"), Path("operator.onnx"))
    code, out, _ = run("inspect operator.onnx --methods svd --jobs 1")
    assert code == 0
    assert "128 MACs" in out


def test_providers_are_those_of_this_build(run: Run) -> None:
    code, out, err = run("providers")
    assert (code, err) == (0, "")
    assert "\nCPUExecutionProvider: works\n" in out
    assert "\nNnapiExecutionProvider: not in this build; it needs an Android device" in out
    assert "\nRknpuExecutionProvider: not in this build\n" in out
    assert "What can be checked without the devices" in out
    assert "--target nnapi: formats (2-D convolutions" in out
    assert set(onnxruntime.get_all_providers()) <= set(re.findall(r"^(\w+):", out, re.M))
    assert run("providers --provider nnapi")[0] == 1


def test_providers_are_written_for_pipelines(run: Run, tmp_path: Path) -> None:
    run(f"providers --json {tmp_path}/providers.json")
    written = json.loads((tmp_path / "providers.json").read_text())
    assert written["onnxruntime"] == onnxruntime.__version__
    assert written["providers"]["CPUExecutionProvider"] == "works"
    code, _, err = run(f"providers --json {tmp_path}/none/providers.json")
    assert code == 2
    assert "does not exist" in err


def test_providers_write_over_nothing_that_is_read_and_know_their_names(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('provider = "cpu"')
    code, _, err = run(f"providers --config {config} --json {config}")
    assert code == 2
    assert "is a file that was given" in err
    assert config.read_text() == 'provider = "cpu"'
    code, _, err = run("providers --provider nosuch")
    assert code == 2
    assert "execution provider 'nosuch' is not known: one of " in err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--budget size=0.7", "bytes of the .ort format are known once it is written: give a budget on params"),
        (
            f"{ASKED} --quantize int8 --calibrate samples.npz --target nnapi",
            "cannot bring models in eight bits into the .ort",
        ),
    ],
)
def test_what_cannot_be_had_for_mobile_builds_is_refused_before_the_work(
    folder: Path, run: Run, options: str, why: str
) -> None:
    code, _, err = run(f"compress model.onnx small.ort {options}")
    assert (code, len(err.splitlines())) == (2, 1)
    assert why in err
    assert not Path("small.ort").exists()


def test_a_target_that_takes_no_eight_bits_is_told_before_the_work(folder: Path, run: Run) -> None:
    np.savez("samples.npz", x=tiny.inputs(8))
    code, _, err = run("compress model.onnx small.onnx --quantize int8 --calibrate samples.npz --target coreml")
    assert code == 2
    assert "target coreml takes no nodes in eight bits: leave out quantize int8" in err


def test_whoever_reads_the_output_may_stop_before_its_end(folder: Path) -> None:
    line = f"{sys.executable} -m onnx_lowrank compress model.onnx small.onnx {ASKED} {QUICK}"
    process = subprocess.Popen(line.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert Path("small.onnx").exists()


def test_what_was_written_for_mobile_builds_is_said_not_to_be_read(folder: Path, run: Run) -> None:
    Path("small.ort").write_bytes(b"....ORTM")
    code, out, err = run("verify model.onnx small.ort")
    assert (code, out) == (2, "")
    assert "small.ort is of the format for mobile builds, which is written and not read: give the .onnx model" in err


def test_weights_among_the_inputs_are_told_of(folder: Path, run: Run) -> None:
    model = tiny.classifier()
    listed = [onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
    model.graph.input.extend(listed)
    tiny.save(model, Path("listed.onnx"))
    said = "its weights are listed among its inputs, as older exporters do"
    assert said in flat(run(f"compress listed.onnx out/small.onnx {ASKED} {QUICK}")[1])
    assert said not in flat(run(f"compress model.onnx out/small.onnx {ASKED} {QUICK}")[1])


def test_verify_says_what_an_own_computation_says(folder: Path, run: Run) -> None:
    run(f"compress model.onnx out/small.onnx --budget macs=0.3 {QUICK}")
    code, out, err = run("verify model.onnx out/small.onnx --evaluate data.npz --json out/check.json --threads 1")
    assert (code, err) == (0, "")
    data = arrays("data.npz")
    first, second = (run_model(name, {"x": data["x"]})[0].astype(float) for name in ("model.onnx", "out/small.onnx"))
    check = json.loads(Path("out/check.json").read_text())
    accuracy = check["accuracy"]
    right = [scores.argmax(axis=1) == data["labels"] for scores in (first, second)]
    assert (accuracy["metric"], accuracy["samples"]) == ("top1", 400)
    assert accuracy["original"] == right[0].mean() == 1
    assert accuracy["compressed"] == right[1].mean() < 1
    assert accuracy["drop"] == pytest.approx(1 - right[1].mean())
    assert accuracy["drop"] < accuracy["drop_upper_95"] < accuracy["drop"] + 0.05
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert accuracy["others"]["cosine"] == pytest.approx(cosine.mean(), rel=1e-6)
    noise = 10 * np.log10(np.square(first).sum(1) / np.square(first - second).sum(1))
    assert accuracy["others"]["sqnr"] == pytest.approx(noise.mean(), rel=1e-4)
    for side, path in (("original", "model.onnx"), ("compressed", "out/small.onnx")):
        macs, params = tiny.count(onnx.load(path), {"x": tiny.inputs(1)})
        assert check[side] == {"macs": macs, "params": params, "size_bytes": os.path.getsize(path)}
    assert f"{accuracy['compressed']:.4f}" in out


def test_options_may_stand_in_a_file_and_the_command_line_has_the_last_word(folder: Path, run: Run) -> None:
    Path("options.toml").write_text(
        "budget = {macs = 0.9}\nmethods = 'svd'\nalign = 1\njobs = 1\nexclude = ['second']\ninput-shape = ['x:1,16']\n"
    )
    code, _, err = run("compress model.onnx out/small.onnx --config options.toml --seed 3 --json out/report.json")
    assert (code, err) == (0, "")
    report = json.loads(Path("out/report.json").read_text())
    assert report["budgets"][0]["asked"] == 0.9
    assert report["config"]["seed"] == 3 and report["config"]["input_shape"] == {"x": [1, 16]}
    assert {"layer": "second", "op_type": "Gemm", "reason": "left out by --include or --exclude"} in report["skips"]
    code, _, _ = run("compress model.onnx out/b.onnx --config options.toml --budget macs=0.5 --json out/report.json")
    assert code == 0
    assert json.loads(Path("out/report.json").read_text())["budgets"][0]["asked"] == 0.5


def test_a_plan_is_written_and_carried_out_to_the_same_bytes(folder: Path, run: Run) -> None:
    for options in ("", "--fold-batchnorm"):
        line = f"compress {models.DIGITS} out/a.onnx --budget macs=0.5 --plan out/plan.json {QUICK} {options}"
        assert run(line)[0] == 0
        code, _, err = run(f"apply {models.DIGITS} out/plan.json out/b.onnx --jobs 1 --json out/b.json {options}")
        assert (code, err) == (0, "")
        assert Path("out/a.onnx").read_bytes() == Path("out/b.onnx").read_bytes()
        layers = json.loads(Path("out/b.json").read_text())["layers"]
        choices = json.loads(Path("out/plan.json").read_text())["choices"]
        chosen = {c["layers"][0]: c["rank"] for c in choices if c["decomposition"] != "dense"}
        assert {layer["name"]: layer["rank"] for layer in layers} == chosen != {}


def test_a_metric_of_ones_own_decides(folder: Path, run: Run) -> None:
    Path("metric.py").write_text(
        "def tenth(outputs, labels):\n    return 0.1 * float((outputs[0].argmax(axis=1) == labels).mean())\n"
    )
    line = f"compress model.onnx out/small.onnx --budget macs=0.3 --evaluate data.npz --metric metric.py:tenth {QUICK}"
    assert run(line + " --json out/report.json")[0] == 0
    accuracy = json.loads(Path("out/report.json").read_text())["accuracy"]
    scores = run_model("out/small.onnx", {"x": arrays("data.npz")["x"]})[0]
    assert accuracy["metric"] == "metric.py:tenth"
    assert accuracy["original"] == pytest.approx(0.1)
    assert accuracy["compressed"] == pytest.approx(0.1 * (scores.argmax(1) == arrays("data.npz")["labels"]).mean())
    assert accuracy["drop_upper_95"] is None  # one figure for all samples: nothing to tell its uncertainty from


def test_a_piped_report_has_no_colours_and_breaks_no_line(folder: Path, run: Run, monkeypatch: Any) -> None:
    for name in ("FORCE_COLOR", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for line in (f"compress model.onnx out/small.onnx {ASKED} {QUICK}", "inspect model.onnx", "providers"):
        _, out, _ = run(line)
        assert "\x1b" not in out
        assert "…" not in out
    name = "/a/long/name/of/a/layer" * 5
    model = tiny.classifier()
    model.graph.node[0].name = name
    tiny.save(model, Path("long.onnx"))
    _, out, _ = run("inspect long.onnx --methods svd --align 1 --jobs 1")
    assert re.search(rf"^{name} +[│|] Gemm .* svd 4 ", out, re.M)


def test_colours_are_left_out_where_the_environment_says_so(folder: Path, run: Run, monkeypatch: Any) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    line = f"compress model.onnx out/small.onnx {ASKED} {QUICK}"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert colour.search(run(line)[1])
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(run(line)[1])


def on_a_terminal(line: str, columns: int, **environment: str) -> str:
    """What a terminal of so many columns gets to see of a command line."""
    import fcntl
    import pty
    import struct
    import termios

    program = [sys.executable, "-m", "onnx_lowrank", *shlex.split(line)]
    own = {"PYTHONPATH": str(Path(models.__file__).parents[1]), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with subprocess.Popen(
        program, stdin=theirs, stdout=theirs, stderr=theirs, env=variables | own | environment
    ) as run:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 1 << 16):
                seen += part
        except OSError:  # the other end is closed
            pass
        finally:
            os.close(ours)
        assert run.wait(timeout=60) == 0, seen
    return seen.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are those of Unix")
def test_a_terminal_gets_colours_progress_with_time_left_and_80_columns(folder: Path) -> None:
    control = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
    line = f"compress {models.DIGITS} out/small.onnx --max-drop 0.05 --objective macs --evaluate {models.DIGITS_TEST}"
    seen = on_a_terminal(line, 80)
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", seen)
    plain = control.sub("", seen)
    assert max(map(len, re.split(r"[\r\n]+", plain))) <= 80
    assert re.search(r" analyze [━╸╺ ]+ +\d+/7 +[0-9-]+:[0-9-]+:[0-9-]+", plain)
    assert re.search(r" +search [━╸╺ ]+ +3/7 +\d+:\d\d:\d\d left", plain)
    assert "0/0" not in plain
    without = on_a_terminal(line.replace("small", "b"), 80, NO_COLOR="1")
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?[349][0-9][;m]", without)
    assert " search " in control.sub("", without)
    quiet = on_a_terminal(line.replace("small", "c") + " --quiet", 80)
    assert control.sub("", quiet).strip() == ""


def test_a_pipe_gets_no_progress(folder: Path) -> None:
    program = [sys.executable, "-m", "onnx_lowrank", "inspect", str(models.DIGITS), "--methods", "svd,spatial_svd"]
    path = {"PYTHONPATH": str(Path(models.__file__).parents[1]), "TERM": "xterm-256color"}
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    run = subprocess.run(program, capture_output=True, text=True, env=variables | path, timeout=60, check=True)
    assert run.stderr == ""
    assert "\x1b" not in run.stdout


def test_a_pipe_gets_a_line_as_each_stage_begins_where_it_asks_for_more(folder: Path, run: Run) -> None:
    line = f"compress {models.DIGITS} out/small.onnx --max-drop 0.05 --objective macs --evaluate {models.DIGITS_TEST}"
    code, plain, err = run(f"{line} {QUICK}")
    assert (code, err) == (0, "")
    code, out, err = run(f"{line} {QUICK} --verbose")
    assert code == 0 and out.count("\n") == plain.count("\n")
    begun = [found[2] for text in err.splitlines() if (found := re.fullmatch(r" *(\d+\.\d) s: (\w+)", text))]
    assert {"analyze", "search", "factorize"} <= set(begun) and len(set(begun)) == len(begun)
    assert run(f"{line} {QUICK} --verbose --quiet")[1] == ""
    assert " s: " not in run(f"{line} {QUICK} --verbose --quiet")[2]


def test_the_package_runs_as_a_program(folder: Path) -> None:
    def program(line: str) -> subprocess.CompletedProcess[str]:
        path = {"PYTHONPATH": str(Path(models.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "onnx_lowrank", *line.split()]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | path, timeout=60)

    good = program(f"compress model.onnx out/small.onnx {ASKED} {QUICK} --verbose")
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("written: out/small.onnx\n")
    assert "\x1b" not in good.stdout + good.stderr
    bad = program("compress missing.onnx out/other.onnx " + ASKED)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert re.fullmatch("onnx-lowrank: missing.onnx cannot be read .*\n", bad.stderr)


def test_what_is_inspected_and_verified_is_data_too(run: Run, folder: Path) -> None:
    assert run("inspect model.onnx --align 1 --json out/inspected.json --quiet")[0] == 0
    inspected = json.loads((folder / "out/inspected.json").read_text())
    assert inspected["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 16]}]
    assert [each["name"] for each in inspected["outputs"]] == ["y"]
    assert inspected["original"]["macs"] >= sum(layer["macs"] for layer in inspected["layers"]) > 0
    for layer in inspected["layers"]:
        half = layer["half"]
        assert half is None or (2 * half["macs"] <= layer["macs"] and 0 < half["error"] < 1 and half["rank"])
    assert any(layer["half"] for layer in inspected["layers"])
    assert run("verify model.onnx model.onnx --json out/verified.json --quiet")[0] == 0
    verified = json.loads((folder / "out/verified.json").read_text())
    assert (verified["version"], verified["met"]) == (inspected["version"], True)

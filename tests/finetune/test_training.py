"""Training: what it makes better, what it leaves alone, and that an interrupted run ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank import cli
from onnx_lowrank.types import LowRankError, no_progress
from tests.helpers import assert_close, normal, parse, run

torch = pytest.importorskip("torch", reason="training needs the extra [finetune]")

from onnx_lowrank.finetune import augment, samples  # noqa: E402
from onnx_lowrank.finetune.blocks import block_ends  # noqa: E402
from onnx_lowrank.finetune.program import Program, weights_of  # noqa: E402
from onnx_lowrank.finetune.samples import Samples, read_samples  # noqa: E402
from onnx_lowrank.finetune.train import Score, Settings, train  # noqa: E402
from onnx_lowrank.graph.model import load  # noqa: E402
from onnx_lowrank.graph.plain import plain_graph, with_values  # noqa: E402

CALIBRATE = models.DIGITS.with_name("digits_calibrate.npz")
TEST = models.DIGITS.with_name("digits_test.npz")
ROUGH: dict[str, Any] = {"rank": "ratio=0.2", "methods": "spatial_svd", "align": 1, "jobs": 1}
"""Weights alone, and far too few of them: much can be gained."""

WRONG = [({"input": normal(16, 1, 8, 8)}, np.arange(16) % 12)]

RAGGED = [({"input": normal(16, 1, 8, 8)}, np.zeros(shape, int)) for shape in ((16,), (16, 1))]

DISTILL: dict[str, Any] = {"finetune": "distill", "train": CALIBRATE, "epochs": 12, "augment": "none"}


@pytest.fixture(scope="module")
def rough() -> lr.Result:
    return lr.compress(models.DIGITS, evaluate=TEST, **ROUGH)


@pytest.fixture(scope="module")
def distilled() -> lr.Result:
    return lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **DISTILL)


def accuracy(result: lr.Result) -> float:
    return result.report.accuracy.compressed


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


# Distillation


def test_distillation_without_labels_brings_accuracy_back(rough: lr.Result, distilled: lr.Result) -> None:
    assert accuracy(rough) < 0.9
    assert accuracy(distilled) > accuracy(rough) + 0.05
    assert any("loss on the samples held out" in note for note in distilled.report.notes)
    assert distilled.report.seconds["finetune"] > 0


def test_only_values_change(rough: lr.Result, distilled: lr.Result) -> None:
    before, after = rough.model, distilled.model
    assert after.graph.node == before.graph.node
    assert [t.name for t in after.graph.initializer] == [t.name for t in before.graph.initializer]
    assert distilled.report.compressed.macs == rough.report.compressed.macs


def test_the_same_seed_gives_the_same_bytes(distilled: lr.Result) -> None:
    again = lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **DISTILL)
    assert again.model.SerializeToString() == distilled.model.SerializeToString()


def test_only_what_was_touched_trains_on_request(rough: lr.Result) -> None:
    result = lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **DISTILL | {"trained": "touched", "epochs": 2})
    new = {n for layer in result.report.layers for n in layer.nodes}
    weights = {n for node in result.model.graph.node if node.name in new for n in node.input[1:]}
    before, after = initializers(rough.model), initializers(result.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert changed <= weights


def test_tensors_to_train_can_be_named(rough: lr.Result) -> None:
    result = lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **DISTILL | {"trained": "fc*", "epochs": 2})
    before, after = initializers(rough.model), initializers(result.model)
    assert all(name.startswith("fc") for name in before if not np.array_equal(before[name], after[name]))


def test_a_run_that_ends_worse_returns_the_start(rough: lr.Result) -> None:
    result = lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **DISTILL | {"learning_rate": 50.0, "epochs": 2})
    assert result.model.SerializeToString() == rough.model.SerializeToString()
    assert any("nothing better" in note for note in result.report.notes)


def test_shared_kernels_stay_shared() -> None:
    network = models.build("resnet20_cifar10", 0)
    options: dict[str, Any] = {"recipe": "joint_svd", "rank": "ratio=0.1", "methods": "joint_both", "jobs": 1}
    pictures = [{"input": normal(16, 3, 32, 32, seed=3)}]
    plain = lr.compress(network, **options)
    tuned = lr.compress(network, **options, finetune="distill", train=pictures, epochs=1)
    assert plain.report.compressed.params == tuned.report.compressed.params
    assert [t.name for t in tuned.model.graph.initializer] == [t.name for t in plain.model.graph.initializer]


def test_normalisations_are_folded_after_training() -> None:
    options = ROUGH | DISTILL | {"epochs": 1, "fold_batchnorm": True}
    result = lr.compress(models.DIGITS, **options)
    assert "BatchNormalization" not in {node.op_type for node in result.model.graph.node}


# Labels


def test_labels_are_learnt(rough: lr.Result) -> None:
    options = {"finetune": "labels", "train": TEST, "epochs": 6, "augment": "none"}
    result = lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **options)
    assert accuracy(result) > accuracy(rough) + 0.05
    assert any("accuracy from" in note for note in result.report.notes)


def test_a_loss_of_ones_own(tmp_path: Path, rough: lr.Result) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def loss(outputs, labels):\n"
        "    (scores,) = outputs.values()\n"
        "    return torch.nn.functional.multi_margin_loss(scores, labels)\n"
    )
    options = {"finetune": "labels", "train": TEST, "epochs": 4, "loss": f"{tmp_path / 'mine.py'}:loss"}
    result = lr.compress(models.DIGITS, evaluate=TEST, **ROUGH, **options, augment="none")
    assert accuracy(result) > accuracy(rough)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"finetune": "labels", "train": CALIBRATE}, "samples with labels"),
        ({"finetune": "labels", "train": WRONG}, "labels from 0 to 11 were given: the model has 10 classes"),
        ({"finetune": "labels", "train": TEST, "loss": "BAD:one"}, "raised ZeroDivisionError"),
        ({"finetune": "labels", "train": TEST, "loss": "BAD:two"}, "returned float"),
        ({"finetune": "labels", "train": TEST, "loss": "BAD:three"}, "has no gradient"),
        (
            {"finetune": "distill", "train": CALIBRATE, "loss": "BAD:three"},
            "takes labels: give finetune labels, or leave loss out",
        ),
        ({"train": CALIBRATE, "epochs": 3}, "nothing is trained that train, epochs could be of: give finetune"),
        ({"finetune": "distill", "train": CALIBRATE, "orthogonality": 1.0}, "recipe orthogonal was expected"),
        ({"finetune": "labels", "train": RAGGED}, "'the labels' differ in shape"),
        ({"finetune": "distill"}, r"needs samples: give calibrate \(--calibrate DATA\) or train \(--train DATA\)"),
        ({"finetune": "magic", "train": CALIBRATE}, "finetune 'magic' was given: one of none, distill, labels"),
        ({"finetune": "labels", "train": TEST, "augment": "mixup"}, "it is for --finetune distill"),
        ({"finetune": "distill", "train": CALIBRATE, "augment": "blur"}, "augmentation 'blur' was given"),
        ({"finetune": "distill", "train": CALIBRATE, "trained": "nothing*"}, "names no weight"),
        ({"finetune": "distill", "train": CALIBRATE, "device": "cuda"}, "no such device"),
        ({"finetune": "distill", "train": [{"input": normal(4, 1, 8, 8)}]}, "too few to train on"),
        ({"finetune": "distill", "train": CALIBRATE, "epochs": 0}, "epochs 0 was given"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "def one(outputs, labels): return 1 / 0\ndef two(outputs, labels): return 0.5\n"
        "def three(outputs, labels): return (next(iter(outputs.values())).argmax(1) != labels).float().mean()\n"
    )
    if "loss" in options:
        options = options | {"loss": options["loss"].replace("BAD", str(tmp_path / "bad.py"))}
    with pytest.raises(LowRankError, match=said):
        lr.compress(models.DIGITS, **ROUGH, **options)


def test_without_torch_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lowrank.finetune.find_spec", lambda name: None)
    with pytest.raises(LowRankError, match=r"pip install 'onnx-lowrank\[finetune\]'"):
        lr.compress(models.DIGITS, **ROUGH, **DISTILL)


def test_the_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "small.onnx", tmp_path / "report.json"
    command = f"compress {models.DIGITS} {out} --rank ratio=0.2 --methods spatial_svd --jobs 1 --json {report} --evaluate {TEST}"
    assert cli.main([*command.split(), "--finetune", "distill", "--train", str(CALIBRATE), "--epochs", "3"]) == 0
    assert json.loads(report.read_text())["seconds"]["finetune"] > 0
    onnx.checker.check_model(onnx.load(out))
    assert "samples held out" in capsys.readouterr().out


# The loop


def small() -> tuple[Program, Program, Samples]:
    """A network, a worse one, and samples."""
    text = """net (float[N, 6] x) => (float[N, 4] y) {
        h = MatMul (x, a) n = BatchNormalization (h, one, none, none1, one1) r = Relu (n)
        c = MatMul (r, b) y = BatchNormalization (c, four, zero, zero1, four1)
    }"""
    still = {"one": np.ones(8, "f4"), "none": np.zeros(8, "f4"), "four": np.ones(4, "f4"), "zero": np.zeros(4, "f4")}
    still |= {f"{name}1": value for name, value in still.items()}
    teacher, student = (
        Program(
            g := plain_graph(load(parse(text, a=normal(6, 8, seed=s), b=normal(8, 4, seed=s + 1), **still))),
            weights_of(g),
        )
        for s in (0, 2)
    )
    return student, teacher, Samples({"x": normal(256, 6, seed=5) * 3}, None)


def weights(program: Program) -> np.ndarray:
    return np.concatenate([value.ravel() for value in program.values().values()])


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tests.finetune.test_training import Settings, small, torch, train, weights
torch.set_num_threads(1)
last = int(sys.argv[2])
def progress(stage, done, total):
    if done == last:
        os.kill(os.getpid(), signal.SIGKILL)
student, teacher, samples = small()
train(student, teacher, samples, Settings(epochs=30, batch=32, seed=1), checkpoints=Path(sys.argv[1]), progress=progress)
np.save(Path(sys.argv[1]) / "weights.npy", weights(student))
"""


def test_a_run_killed_and_started_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def start(last: int) -> int:
        seeded = {**os.environ, "PYTHONHASHSEED": str(abs(last))}  # the order of sets is another in each process
        words = [sys.executable, "-c", KILLED, str(tmp_path), str(last)]
        return subprocess.run(words, timeout=300, env=seeded).returncode

    assert start(100) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert start(150) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert start(-1) == 0
    assert not list(tmp_path.glob("*.pt"))
    student, teacher, samples = small()
    train(student, teacher, samples, Settings(epochs=30, batch=32, seed=1), progress=no_progress)
    np.testing.assert_array_equal(np.load(tmp_path / "weights.npy"), weights(student))


@pytest.mark.parametrize("change", ["settings", "weights", "samples", "damage"])
def test_a_checkpoint_of_another_run_is_not_gone_on_from(tmp_path: Path, change: str) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 60:
            raise Stop

    settings = Settings(epochs=10, batch=32, seed=1)
    student, teacher, data = small()
    with pytest.raises(Stop):
        train(student, teacher, data, settings, checkpoints=tmp_path, progress=stop)
    (left,) = tmp_path.glob("*.pt")
    student, teacher, data = small()
    if change == "settings":
        settings = Settings(epochs=10, batch=32, seed=2)
    elif change == "weights":
        with torch.no_grad():
            student.parameters["a"].add_(0.1)
    elif change == "samples":
        data = Samples({"x": data.arrays["x"] + 0.1}, None)
    else:
        left.write_bytes(left.read_bytes()[:100])
    seen: list[int] = []
    train(student, teacher, data, settings, checkpoints=tmp_path, progress=lambda stage, done, total: seen.append(done))
    assert seen[0] == 1  # from the beginning


def test_the_regularizer_is_made_small() -> None:
    student, teacher, data = small()
    sizes = []
    for weight in (0.0, 1.0):
        student, teacher, data = small()
        penalty = (lambda parameters: parameters["b"].square().sum()) if weight else None
        train(student, teacher, data, Settings(epochs=10, batch=32), regularizer=penalty, progress=no_progress)
        sizes.append(float(student.parameters["b"].detach().square().sum()))
    assert sizes[1] < sizes[0]


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    ends = []
    for part in (None, 8):
        student, teacher, data = small()
        train(student, teacher, data, Settings(epochs=2, batch=32, part=part, weight_decay=0.0), progress=no_progress)
        ends.append(weights(student))
    # the distance is over the variance of each part: near, not the same
    np.testing.assert_allclose(ends[0], ends[1], atol=0.05)


def test_the_ends_of_blocks_are_where_everything_passes() -> None:
    network = models.build("resnet20_cifar10", 0)
    result = lr.compress(network, rank="ratio=0.3", methods="spatial_svd", jobs=1)
    original, compressed = plain_graph(load(network)), plain_graph(load(result.model))
    ends = block_ends(original, compressed)
    kinds = {out: node.op_type for node in original.nodes for out in node.outputs}
    assert len(ends) == 8  # of nine blocks, the last ends with the network
    assert {kinds[name] for name in ends} == {"Relu"}
    feeds = {"input": normal(2, 3, 32, 32, seed=1)}
    teacher, student = Program(original), Program(compressed)
    with torch.no_grad():
        wanted = teacher(teacher.tensors(feeds), keep=ends)
        got = student(student.tensors(feeds), instead={name: wanted[name] for name in ends})
    # the last block ran on what the original had there
    tail = student.outputs[0]
    assert torch.nn.functional.mse_loss(got[tail], wanted[tail]) < wanted[tail].var()


def test_samples_too_large_for_memory_wait_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_lowrank.data import open_data
    from onnx_lowrank.graph.shapes import model_inputs

    inputs = model_inputs(load(models.DIGITS))
    data = open_data(TEST, inputs)
    whole = read_samples(data, tmp_path)
    monkeypatch.setattr(samples, "MEMORY", 20_000)
    waiting = read_samples(data, tmp_path)
    assert isinstance(waiting.arrays["input"], np.memmap)
    rows = np.array([5, 599, 0])
    for one, other in zip(whole.at(rows), waiting.at(rows), strict=True):
        np.testing.assert_equal(one, other)


# Augmentations


@pytest.mark.parametrize("name", sorted(augment.AUGMENTATIONS))
def test_pictures_vary_and_the_rest_does_not(name: str) -> None:
    feeds = {"picture": torch.from_numpy(normal(32, 3, 16, 16)), "numbers": torch.from_numpy(normal(32, 5))}
    varied = augment.varied(feeds, [name], np.random.default_rng(0))
    assert varied["picture"].shape == feeds["picture"].shape
    assert not torch.equal(varied["picture"], feeds["picture"])
    assert varied["numbers"] is feeds["numbers"]
    if name == "flip":
        pairs = zip(varied["picture"], feeds["picture"], strict=True)
        assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in pairs)


def labelled(
    text: str, inputs: dict[str, np.ndarray], labels: np.ndarray, **stored: np.ndarray
) -> tuple[Program, Samples]:
    graph = plain_graph(load(parse(text, **stored)))
    return Program(graph, weights_of(graph)), Samples(inputs, labels)


def test_labels_are_those_of_the_first_output_whatever_is_computed_first() -> None:
    text = """net (float[N, 6] x) => (float[N, 4] scores, float[N, 8] features) {
        features = MatMul (x, a) scores = MatMul (features, b) }"""
    x, a, b = normal(64, 6, seed=1), normal(6, 8), normal(8, 4, seed=2)
    program, data = labelled(text, {"x": x}, (x @ a @ b).argmax(1), a=a, b=b)
    settings = Settings(labels=True, distill=0.0, epochs=1, batch=16, learning_rate=1e-6)
    run = train(program, None, data, settings, progress=no_progress)
    assert run.scores[0][1] == 0.0  # every label is right from the start


def test_int32_labels_are_classes_too(tmp_path: Path) -> None:
    with np.load(TEST) as archive:
        np.savez(tmp_path / "narrow.npz", input=archive["input"], labels=archive["labels"].astype("int32"))
    options = {"finetune": "labels", "train": tmp_path / "narrow.npz", "epochs": 1, "augment": "none"}
    assert lr.compress(models.DIGITS, **ROUGH, **options).report.seconds["finetune"] > 0


NORMED = """net (float[N, 6, 4, 4] x) => (float[N, 3] y) {
    MEAN
    h = Conv (x, w) n = BatchNormalization (h, scale, shift, mean, variance)
    p = GlobalAveragePool (n) y = Flatten (p) }"""


@pytest.mark.parametrize(
    "mean",
    [
        "mean = Constant <value = float[3] {0.1, 0.2, 0.3}> ()",
        "mean = Identity (stored)",
        "mean = Identity (shift)",
    ],
)
def test_statistics_that_follow_the_batches_are_written_and_others_stay(mean: str) -> None:
    arrays = {
        "w": normal(3, 6, 1, 1),
        "scale": np.ones(3, "float32"),
        "shift": normal(3),
        "variance": np.ones(3, "float32"),
    }
    if "stored" in mean:
        arrays["stored"] = normal(3, seed=4)
    model = parse(NORMED.replace("MEAN", mean), **arrays)
    x = 3 + normal(64, 6, 4, 4, seed=2)
    graph = plain_graph(load(model))
    program = Program(graph, weights_of(graph))
    data = Samples({"x": x}, np.arange(64) % 3)
    settings = Settings(labels=True, distill=0.0, epochs=3, batch=16, batch_statistics=True, keep_last=True)
    train(program, None, data, settings, progress=no_progress)
    written = with_values(load(model), program.values()).proto
    with torch.no_grad():
        expected = program(program.tensors({"x": x[:4]}))["y"].numpy()
    assert_close(run(written, {"x": x[:4]}), [expected], 1e-5)


def test_a_model_of_fixed_batches_trains_on_whole_ones() -> None:
    text = "net (float[8, 6] x) => (float[8, 4] y) { s = Reshape (x, shape) y = MatMul (s, a) }"
    graph = plain_graph(load(parse(text, a=normal(6, 4), shape=np.array([8, 6]))))
    student, teacher = Program(graph, weights_of(graph)), Program(graph)
    with torch.no_grad():
        student.parameters["a"].mul_(0.5)
    data = Samples({"x": normal(200, 6)}, None)  # 25 of them held out, 24 looked at
    run = train(student, teacher, data, Settings(epochs=2, batch=20, part=8), progress=no_progress)
    assert run.best < Score(0.0, run.scores[0][2])


def test_a_run_that_ended_early_stays_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lowrank.finetune.train.PATIENCE", 0.0)
    looks = []
    for _ in range(3):
        student, teacher, data = small()
        settings = Settings(epochs=12, batch=32, learning_rate=1.0, seed=1)
        run = train(student, teacher, data, settings, checkpoints=tmp_path, keep=True, progress=no_progress)
        looks.append(run.scores)
    assert len(looks[0]) < 13
    assert looks[1] == looks[2] == looks[0]


def test_two_models_that_differ_in_what_does_not_train_do_not_share_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNX_LOWRANK_CACHE", str(tmp_path))
    names = []
    for rank in ("ratio=0.2", "ratio=0.3"):
        options = ROUGH | DISTILL | {"rank": rank, "trained": "fc*", "epochs": 1}
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: names.append(path.name))
        lr.compress(models.DIGITS, **options)
    kept = [name for name in names if name.endswith(".pt")]
    assert len(kept) == len(set(kept)) == 2


def test_a_folder_that_cannot_hold_checkpoints_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    student, teacher, data = small()
    run = train(
        student, teacher, data, Settings(epochs=2, batch=32), checkpoints=tmp_path / "file", progress=no_progress
    )
    assert run.epoch == 2
    assert "no checkpoint can be written" in caplog.text


def test_pictures_of_one_sample_vary_alike() -> None:
    pictures = torch.from_numpy(normal(8, 3, 16, 16))
    varied = augment.varied({"left": pictures, "right": pictures}, ["flip", "crop", "mixup"], np.random.default_rng(0))
    assert torch.equal(varied["left"], varied["right"])
    assert not torch.equal(varied["left"], pictures)

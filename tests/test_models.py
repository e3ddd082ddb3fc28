"""The networks under models/: the published sizes, seeds, spectra, ONNX Runtime, and the trained digits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import models
from models import digits, layers
from onnx_lowrank.types import LowRankError
from tests.helpers import SHARED, arrays, needs_shared
from tools import cifar

# torchvision (ImageNet); He et al. 2016 and its usual reimplementations (CIFAR).
PUBLISHED = {
    "alexnet": 61_100_840,
    "vgg16": 138_357_544,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet20_cifar10": 269_722,
    "resnet56_cifar10": 853_018,
    "resnet110_cifar10": 1_727_962,
    "resnet18_cifar10": 11_173_962,
    "resnet34_cifar10": 21_282_122,
    "resnet34_cifar100": 21_328_292,
    "vgg16_cifar10": 14_728_266,
    "alexnet_cifar10": 2_472_266,
    # by hand: nobody has published these
    "vgg_small_cifar10": 557_898,
    "alexnet_half_cifar10": 624_810,
    "resnet34_half_cifar10": 5_326_506,
}
SMALL = ["resnet20_cifar10", "resnet56_cifar10", "resnet110_cifar10", "alexnet_cifar10", "vgg16_cifar10"]
TRAINED = ["resnet20_cifar10", "vgg_small_cifar10", "alexnet_half_cifar10"]
COUNT = 400
STATISTICS = ("running_mean", "running_var")


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def trainable(model: onnx.ModelProto) -> int:
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    return sum(int(np.prod(tensor.dims)) for tensor in tensors if not tensor.name.endswith(STATISTICS))


def falls_like(matrix: np.ndarray) -> float:
    """The exponent p of singular values i ** p, fitted to the first half of them."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    half = len(values) // 2
    return float(np.polyfit(np.log(np.arange(1, half + 1)), np.log(values[:half]), 1)[0])


def test_every_network_has_a_published_size() -> None:
    assert set(models.NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_network_has_as_many_parameters_as_published(name: str) -> None:
    asked: dict[str, int] = {}

    def shapes_only(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
        assert name not in asked
        asked[name] = int(np.prod(shape))
        return np.broadcast_to(np.float32(0), shape)

    models.network(name, shapes_only)
    assert sum(count for weight, count in asked.items() if not weight.endswith(STATISTICS)) == PUBLISHED[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_valid_and_runs_with_any_batch_size(name: str) -> None:
    model = models.build(name)
    onnx.checker.check_model(model, full_check=True)
    assert trainable(model) == PUBLISHED[name]
    runtime = session(model)
    pictures = np.random.default_rng(1).standard_normal((2, 3, 32, 32), dtype=np.float32)
    (two,) = runtime.run(["output"], {"input": pictures})
    (one,) = runtime.run(["output"], {"input": pictures[:1]})
    assert one.shape == (1, 10) and two.shape == (2, 10)
    assert np.isfinite(two).all()
    # Neither exploding nor vanishing through up to 110 layers.
    assert 0.01 < two.std() < 100
    # float32 sums of at most 4608 terms in another order, relative to the largest output.
    np.testing.assert_allclose(one, two[:1], rtol=0, atol=4608 * np.finfo(np.float32).eps * np.abs(two).max())
    assert not np.allclose(two[0], two[1], rtol=1e-4)


@pytest.mark.parametrize(("name", "classes"), [("resnet18", 1000), ("resnet50", 1000)])
def test_an_imagenet_residual_network_runs(name: str, classes: int) -> None:
    model = models.build(name)
    onnx.checker.check_model(model, full_check=True)
    pictures = np.random.default_rng(1).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (output,) = session(model).run(["output"], {"input": pictures})
    assert output.shape == (1, classes)
    assert np.isfinite(output).all()
    assert 0.01 < output.std() < 100


@needs_shared
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_is_small_and_knows_pictures_as_its_file_says(name: str) -> None:
    path = models.DIGITS.with_name(f"{name}.onnx")
    assert path.stat().st_size < 3e6
    model = onnx.load(path)
    assert trainable(model) == PUBLISHED[name]
    claimed = float({entry.key: entry.value for entry in model.metadata_props}["test_accuracy"])
    pictures, labels = (part[:COUNT] for part in cifar.jpeg(SHARED / "cifar10" / "jpeg_test_5000.npz"))
    (scores,) = session(model).run(None, {"input": cifar.inputs(pictures)})
    # four standard errors of a share of so many
    assert np.mean(scores.argmax(1) == labels) == pytest.approx(
        claimed, abs=4 * (claimed * (1 - claimed) / COUNT) ** 0.5
    )


def test_a_model_says_what_it_is() -> None:
    model = models.build("resnet20_cifar10", seed=3)
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    assert model.producer_name == "onnx_lowrank.models"
    assert model.doc_string == "resnet20_cifar10, untrained: weights drawn at random with seed 3."
    (entry,), (exit_,) = model.graph.input, model.graph.output
    assert (entry.name, exit_.name) == ("input", "output")
    assert [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] == ["N", 3, 32, 32]
    assert [dim.dim_param or dim.dim_value for dim in exit_.type.tensor_type.shape.dim] == ["N", 10]
    assert {tensor.data_type for tensor in model.graph.initializer if "weight" in tensor.name} == {1}


@pytest.mark.parametrize("name", SMALL)
def test_names_are_unique_and_meaningful(name: str) -> None:
    model = models.build(name)
    nodes = [node.name for node in model.graph.node]
    assert len(set(nodes)) == len(nodes)
    for node in model.graph.node:
        known = ("input", ".out")
        assert all(tensor.endswith(known) or tensor.startswith(node.name) for tensor in node.input)
        assert node.output[0] in (f"{node.name}.out", "output")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights() -> None:
    first, again, other = (models.build("resnet20_cifar10", seed=seed).SerializeToString() for seed in (0, 0, 1))
    assert first == again
    weights = [numpy_helper.to_array(onnx.ModelProto.FromString(data).graph.initializer[0]) for data in (first, other)]
    assert weights[0].shape == weights[1].shape
    assert np.abs(weights[0] - weights[1]).max() > 0.1 * np.abs(weights[0]).max()


def test_statistics_of_batch_normalizations_are_positive() -> None:
    model = models.build("resnet20_cifar10")
    variances = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("running_var")]
    assert len(variances) == 19
    assert all(np.all((v > 0.1) & (v < 10)) for v in variances)


def test_an_option_a_shortcut_takes_every_second_position_and_pads_channels_on_both_sides() -> None:
    graph, x = layers.start("shortcut", (4, 5, 5))
    model = layers.export(layers.finish(graph, graph.subsample_and_pad(x, "shortcut", 8, 2)), "")
    picture = np.random.default_rng(0).standard_normal((1, 4, 5, 5), dtype=np.float32)
    (output,) = session(model).run(None, {"input": picture})
    expected = np.zeros((1, 8, 3, 3), np.float32)
    expected[:, 2:6] = picture[:, :, ::2, ::2]
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (256, 128, 3, 3), (256, 64, 1, 1), (500, 1000)])
def test_singular_values_fall_like_a_power_in_every_unfolding(shape: tuple[int, ...]) -> None:
    weight = layers.power_law(np.random.default_rng(0), shape)
    out, channels = shape[:2]
    assert weight.dtype == np.float32 and weight.shape == shape
    unfoldings = [weight.reshape(out, -1), np.moveaxis(weight, 1, 0).reshape(channels, -1)]
    if len(shape) == 4:
        # (O, I, kh, kw) -> (O*kh, I*kw)
        unfoldings.append(weight.transpose(0, 2, 1, 3).reshape(out * shape[2], -1))
    for matrix in unfoldings:
        assert -0.85 < falls_like(matrix) < -0.5
    # Gaussian weights of the same shape are flat: the check tells them apart.
    flat = np.random.default_rng(0).standard_normal(shape).reshape(out, -1)
    assert falls_like(flat) > -0.4


def test_weights_have_he_variance_spread_evenly_over_channels() -> None:
    weight = layers.power_law(np.random.default_rng(0), (256, 128, 3, 3)).astype(np.float64)
    # The energy is a weighted sum of squares worth about 2000 independent ones: 3 % deviation, five of them allowed.
    assert np.mean(weight**2) == pytest.approx(2 / (128 * 9), rel=0.16)
    rows = np.mean(weight**2, axis=(1, 2, 3))
    assert rows.max() < 10 * rows.min()


def test_an_unknown_name_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(LowRankError, match="no network is called 'lenet': choose one of alexnet, vgg16, resnet18"):
        models.build("lenet")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"weight 'conv1.weight' is missing, not the expected \(32, 1, 3, 3\)"),
        ({"conv1.weight": np.zeros((32, 3, 3))}, r"weight 'conv1.weight' has shape \(32, 3, 3\), not the expected"),
    ],
)
def test_stored_weights_must_fit_the_network(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        digits.network(layers.stored(arrays))


def test_the_command_writes_a_model_and_refuses_a_bad_name_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "models", *arguments]
        return subprocess.run(command, cwd=Path(models.__file__).parents[1], capture_output=True, text=True)

    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    assert run("resnet20_cifar10", str(good), "--seed", "1").returncode == 0
    assert good.read_bytes() == models.build("resnet20_cifar10", seed=1).SerializeToString()
    refused = run("resnet21", str(bad))
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1 and "resnet20_cifar10" in refused.stderr
    assert not bad.exists()
    assert run("resnet20_cifar10", str(tmp_path / "missing" / "x.onnx")).returncode == 2


def test_the_trained_digits_are_as_accurate_as_recorded() -> None:
    assert models.DIGITS.stat().st_size < 1_000_000
    model = onnx.load(models.DIGITS)
    onnx.checker.check_model(model, full_check=True)
    recorded = {entry.key: entry.value for entry in model.metadata_props}
    data = arrays(models.DIGITS_TEST)
    (scores,) = session(model).run(["output"], {"input": data["input"]})
    accuracy = np.mean(scores.argmax(axis=1) == data["labels"])
    # One picture more or less: another processor sums in another order.
    assert accuracy == pytest.approx(float(recorded["test_accuracy"]), abs=1.01 / len(data["labels"]))
    assert accuracy >= 0.98
    assert int(recorded["test_samples"]) == len(data["labels"]) == 600
    stated = f"Test accuracy {100 * float(recorded['test_accuracy']):.2f} %"
    assert stated in models.DIGITS.with_name("README.md").read_text(encoding="utf-8")


def test_the_data_of_the_digits_are_what_the_model_takes_and_do_not_overlap() -> None:
    calibrate, test = arrays(models.DIGITS_CALIBRATE), arrays(models.DIGITS_TEST)
    assert list(calibrate) == ["input"] and sorted(test) == ["input", "labels"]
    assert calibrate["input"].shape == (512, 1, 8, 8) and test["input"].shape == (600, 1, 8, 8)
    assert calibrate["input"].dtype == test["input"].dtype == np.float32 and test["labels"].dtype == np.int64
    assert test["input"].min() == 0 and test["input"].max() == 1
    assert set(test["labels"].tolist()) == set(range(10))
    seen = {picture.tobytes() for picture in calibrate["input"]}
    assert not any(picture.tobytes() in seen for picture in test["input"])


def test_the_digits_keep_their_batch_normalizations_and_one_residual_addition() -> None:
    ops = [node.op_type for node in onnx.load(models.DIGITS).graph.node]
    assert {op: ops.count(op) for op in ("Conv", "BatchNormalization", "Add", "MaxPool", "Gemm")} == {
        "Conv": 6,
        "BatchNormalization": 6,
        "Add": 1,
        "MaxPool": 1,
        "Gemm": 1,
    }

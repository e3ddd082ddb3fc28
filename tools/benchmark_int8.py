"""INT8 alone and on top of decompositions, beside the float model: accuracy, bytes, time, all interleaved.

    python -m tools.benchmark_int8 MODEL OUT [--data ../shared/data] [--budget latency=0.43 ...] [--jpeg] [--options "--methods ..."]

INT8 alone is what a user would pick today: onnxruntime.quantization, QDQ, a scale for each channel of a kernel, unsigned
activations, ranges by MinMax on 512 samples of the same calibration data, after the normalisations were folded. Each `--budget` (several with a comma
between) makes a row. CIFAR-10: calibrated on 2,000 training pictures, 500 lossless or 5,000 JPEG test pictures. OUT/train.npz are all training
pictures without their labels, for `--options "--finetune distill --train OUT/train.npz"`.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from onnx_lowrank.cli import main as command
from onnx_lowrank.graph.batchnorm import fold_batchnorm
from onnx_lowrank.graph.model import load
from tools import cifar

ROUNDS = 200
CALIBRATION = 2000
RANGES = 512


class Reader(CalibrationDataReader):
    """Batches, once."""

    def __init__(self, batches: Iterable[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def alone(model: Path, out: Path, pictures: np.ndarray) -> Path:
    """Write to `out` the model as onnxruntime.quantization makes it, with ranges from the first ``RANGES`` pictures."""
    folded = load(model).copy()
    fold_batchnorm(folded)  # quantize_static wants it done, and its own pre-processing does it by ONNX Runtime
    first, name = out.with_suffix(".folded.onnx"), folded.graph.input[0].name
    onnx.save(folded.proto, first)
    pictures = pictures[:RANGES]
    quantize_static(
        first,
        out,
        Reader({name: pictures[i : i + 32]} for i in range(0, len(pictures), 32)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return out


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(model: ort.InferenceSession, pictures: np.ndarray) -> np.ndarray:
    name = model.get_inputs()[0].name
    parts = [model.run(None, {name: pictures[i : i + 50]})[0] for i in range(0, len(pictures), 50)]
    return np.concatenate(parts).argmax(1)


def times(models: list[ort.InferenceSession], picture: np.ndarray) -> np.ndarray:
    """Milliseconds of each model in each round, interleaved; (ROUNDS, models)."""
    feeds = [{model.get_inputs()[0].name: picture} for model in models]
    found = np.zeros((ROUNDS + 10, len(models)))
    for row in found:
        for place, (model, feed) in enumerate(zip(models, feeds, strict=True)):
            start = time.perf_counter()
            model.run(None, feed)
            row[place] = time.perf_counter() - start
    return 1e3 * found[10:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--budget", action="append", default=[])
    parser.add_argument("--jpeg", action="store_true")
    parser.add_argument("--options", default="")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    folder = args.data / "cifar10"
    if args.jpeg:
        (train, _), (test, labels) = (
            cifar.jpeg(folder / "jpeg_train_50000.npz"),
            cifar.jpeg(folder / "jpeg_test_5000.npz"),
        )
    else:
        (train, _), (test, labels) = cifar.lossless(folder / "train_2000.npz"), cifar.lossless(folder / "test_500.npz")
    np.savez(args.out / "calibrate.npz", images=train[:CALIBRATION])
    np.savez(args.out / "train.npz", images=train)
    np.savez(args.out / "test.npz", images=test, labels=labels)
    preprocess = Path(__file__).parents[1] / "tests" / "data" / "cifar10.toml"
    data = ["--calibrate", args.out / "calibrate.npz", "--evaluate", args.out / "test.npz", "--preprocess", preprocess]
    paths = {
        "float": args.model,
        "INT8 alone": alone(args.model, args.out / "alone.onnx", cifar.inputs(train[:RANGES])),
    }
    for budget in ["", *args.budget]:
        title = f"ours, {budget or 'INT8 alone'}"
        path = args.out / f"{budget.replace('=', '').replace(',', '_') or 'int8'}.onnx"
        wanted = [word for each in budget.split(",") if each for word in ("--budget", each)]
        code = command(
            ["compress", str(args.model), str(path), *map(str, data), "--quantize", "int8", "--quiet", *wanted]
            + (shlex.split(args.options) if budget else [])
        )
        paths[title + (" (unmet)" if code else "")] = path.with_suffix(".unmet.onnx") if code else path
    models, pictures = [session(path) for path in paths.values()], cifar.inputs(test)
    found, spent = [answers(model, pictures) for model in models], times(models, pictures[:1])
    print("| | top-1 | agreement | bytes | of INT8 alone | ms | faster than float | faster than INT8 alone |")
    print("|---|---|---|---|---|---|---|---|")
    sizes = [path.stat().st_size for path in paths.values()]
    for place, title in enumerate(paths):
        ratios = [np.median(spent[:, other] / spent[:, place]) for other in (0, 1)]
        print(
            f"| {title} | {np.mean(found[place] == labels):.4f} | {np.mean(found[place] == found[0]):.3f} | {sizes[place]:,} | "
            f"{sizes[1] / sizes[place]:.2f} times smaller | {np.median(spent[:, place]):.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )


if __name__ == "__main__":
    main()

"""Train a CIFAR-10 network of `models`, on the ONNX graph itself: from scratch, or from a model that was trained on other pictures.

    python -m tools.train_cifar NAME OUT.onnx [--epochs 15] [--start FILE.onnx --learning-rate 5e-4] [--data ../shared/data]

The 50,000 training pictures are JPEG files; accuracy is of 5,000 test pictures of the same kind. One in eight training pictures
is held out, and says which epoch is kept. The same seed, threads and version of torch give the same file.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import onnx
import torch

import models
from onnx_lowrank.finetune.program import Program, weights_of
from onnx_lowrank.finetune.samples import Samples
from onnx_lowrank.finetune.train import Settings, train
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.plain import plain_graph, with_values
from onnx_lowrank.types import no_progress
from tools import cifar


def restart(program: Program) -> None:
    """He's variance for kernels, nothing for biases, one for scales: the builders draw power laws."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in program.parameters.items():
            if value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
            else:
                value.fill_(float(name.endswith("weight")))
        for name, statistic in program.statistics.items():
            statistic.fill_(float(name.endswith("var")))


def accuracy(program: Program, images: np.ndarray, labels: np.ndarray) -> float:
    right = 0
    with torch.no_grad():
        for first in range(0, len(images), 500):
            (scores,) = program({"input": torch.from_numpy(images[first : first + 500])}).values()
            right += int((scores.argmax(1).numpy() == labels[first : first + 500]).sum())
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name in models.NAMES if "cifar10" in name])
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="a trained model of the same task, in place of the builder's")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images, labels = cifar.jpeg(args.data / "cifar10" / "jpeg_train_50000.npz")
    model = load(args.start or models.build(args.name, 0))
    graph = plain_graph(model)
    program = Program(graph, weights_of(graph))
    if not args.start:
        restart(program)
    settings = Settings(
        labels=True,
        distill=0.0,
        epochs=args.epochs,
        batch=128,
        learning_rate=args.learning_rate,
        weight_decay=5e-2,
        augment=("flip", "crop"),
        batch_statistics=True,
        precision=args.precision,
    )
    start = time.perf_counter()
    samples = Samples({"input": cifar.inputs(images)}, labels)
    train(program, None, samples, settings, checkpoints=args.out.parent, progress=no_progress)
    images, labels = cifar.jpeg(args.data / "cifar10" / "jpeg_test_5000.npz")
    found = accuracy(program, cifar.inputs(images), labels)
    trained = with_values(model, program.values()).proto
    how = f"{args.name}, trained on CIFAR-10 (JPEG) by tools/train_cifar.py" + (
        f" from {args.start.name}" if args.start else ""
    )
    trained.doc_string = f"{how}; test accuracy {found:.4f}."
    onnx.helper.set_model_props(trained, {"test_accuracy": f"{found:.4f}"})
    onnx.save(trained, args.out)
    print(f"{args.name}: {found:.2%} of 5,000 test pictures (JPEG), {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

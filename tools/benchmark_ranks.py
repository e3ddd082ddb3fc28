"""Ranks under a constraint: ENC's solvers and metrics beside this tool's default, and the time of the exact knapsack.

    python -m tools.benchmark_ranks [--data ../shared/data]

ResNet-56 on CIFAR-10 at half of the MACs. ENC's setting: spatial SVD of the weights, the first layer by channels, every rank,
nothing fitted or fine-tuned. *Map* has no metric; *Model* takes the set of ranks of the highest metric (PCA energy; measured
single-layer accuracies; both combined); *Inf* has the network choose among the best twenty. 2,000 unlabelled training
pictures serve for the measured metrics and the choice of *Inf*, and for the default's fits; 500 test pictures for the
accuracy. Then ENC's model for VGG-16 (random weights), timed without the singular values.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import models
import onnx_lowrank as lr
from onnx_lowrank.budgets.enc import enc_model
from onnx_lowrank.config import make_config
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.recipes import find_recipe
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Budget, Cost, no_progress
from tools.cifar import inputs, lossless

ENC = {"recipe": "automatic_rank"}
WAYS: dict[str, dict[str, Any]] = {
    "ENC Map": {**ENC, "solver": "enc_map"},
    "ENC Model, A_p": {**ENC, "solver": "enc_model"},
    "ENC Inf, A_p": {**ENC, "solver": "enc_inf"},
    "ENC Model, A_m": {**ENC, "solver": "enc_model", "damage": "accuracy"},
    "ENC Model, A_c": {**ENC, "solver": "enc_model", "damage": "combined"},
    "ENC Inf, A_c": {**ENC, "solver": "enc_inf", "damage": "combined"},
    "default": {},
}


def pictures(file: Path) -> dict[str, np.ndarray]:
    images, labels = lossless(file)
    return {"input": inputs(images), "labels": labels}


def batches(data: dict[str, np.ndarray], size: int = 50) -> list[Any]:
    starts = range(0, len(data["labels"]), size)
    return [({"input": data["input"][i : i + size]}, data["labels"][i : i + size]) for i in starts]


def accuracies(data: Path) -> None:
    path = data / "models" / "cifar10_resnet56" / "model_bn.onnx"
    fit = [feeds for feeds, _ in batches(pictures(data / "cifar10" / "train_2000.npz"))]
    test = batches(pictures(data / "cifar10" / "test_500.npz"))
    print("| way | MACs | top-1 | agreement | speedup | seconds |\n" + "|---" * 6 + "|")
    for way, options in WAYS.items():
        start = time.perf_counter()
        report = lr.compress(path, budget={"macs": 0.5}, calibrate=fit, evaluate=test, **options).report
        seconds = time.perf_counter() - start
        a, share = report.accuracy, report.compressed.macs / report.original.macs
        figures = f"{a.compressed:.3f} | {a.others['agreement']:.3f} | {report.latency[0].speedup:.2f}"
        print(f"| {way} | {share:.3f} | {figures} | {seconds:.0f} |", flush=True)


def seconds_on_vgg(ratio: float) -> None:
    recipe = find_recipe("automatic_rank")
    config = recipe.configure(make_config(budget={"macs": ratio}, recipe="automatic_rank"))
    planner = Planner(open_subject(models.build("vgg16", 0), config), config, no_progress, recipe.policy(config))
    candidates = planner.sets.all()
    original = planner.subject.cost
    rest = original - sum((group[0].cost for group in candidates), Cost(0, 0))
    start = time.perf_counter()
    picked = enc_model(candidates, [Budget("macs", ratio)], rest, original)
    seconds = time.perf_counter() - start
    share = sum((c.cost for c in picked), rest).macs / original.macs
    print(f"VGG-16, {sum(map(len, candidates)):,} candidates: MACs {share:.4f}, {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    args = parser.parse_args()
    for ratio in (0.25, 0.5):
        seconds_on_vgg(ratio)
    accuracies(args.data)


if __name__ == "__main__":
    main()

"""The published pipelines with their training, and fine-tuning with labels, on networks trained from scratch.

    python -m tools.benchmark_recipes OUT [PART ...] [--data ../shared/data] [--epochs N] [--networks models] [--precision bfloat16]

Parts: `labels` (ResNet-20, the calibrated decomposition and fine-tuning at several shares of the MACs), `vbmf_cp` (AlexNet-style;
ranks chosen before each layer, all at the start, and by sensitivity), `orthogonal` (VGG-style and ResNet-20; with the regulariser
and without, at two ratios) and `joint_svd` (ResNet-34 of half the width, which `tools.train_cifar` trains; beside spatial SVD at the
same size). CIFAR-10 as JPEG files: 50,000 training pictures, 5,000 test pictures, all paired. Each row is printed when it is done.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnx_lowrank as lr
from tools import cifar

CALIBRATION = 2000
"""Training pictures, without their labels, that layers are fitted on."""

SHARES = (0.5, 0.4, 0.28, 0.2)
"""Of the MACs, for the curve with labels."""

RATIOS = {"low": "weakened_vbmf=0.5", "high": "vbmf"}
"""Rank estimators of two compression ratios for `orthogonal`."""

SMALL = 22
"""How many times fewer parameters for `joint_svd`."""


class Table:
    """Runs of one table, with the options that all have in common."""

    def __init__(self, out: Path, data: Path, networks: Path, epochs: int | None, precision: str) -> None:
        self.out, self.networks, self.epochs = out, networks, epochs
        pictures = {name: out / f"{name}.npz" for name in ("jpeg_train_50000", "jpeg_test_5000", "calibrate")}
        if not all(path.exists() for path in pictures.values()):
            images, labels = cifar.jpeg(data / "cifar10" / "jpeg_train_50000.npz")
            np.savez(pictures["jpeg_train_50000"], images=images, labels=labels)
            np.savez(pictures["calibrate"], images=images[:CALIBRATION])
            images, labels = cifar.jpeg(data / "cifar10" / "jpeg_test_5000.npz")
            np.savez(pictures["jpeg_test_5000"], images=images, labels=labels)
        self.calibrate = str(pictures["calibrate"])
        self._common = {
            "evaluate": str(pictures["jpeg_test_5000"]),
            "train": str(pictures["jpeg_train_50000"]),
            "preprocess": str(Path(__file__).parents[1] / "tests" / "data" / "cifar10.toml"),
            "finetune": "labels",
            "precision": precision,
        }

    def row(self, network: str, title: str, epochs: int, **options: Any) -> None:
        """Compress with training, and print what came of it."""
        start = time.perf_counter()
        result = lr.compress(
            str(self.networks / f"{network}.onnx"), **{**self._common, "epochs": self.epochs or epochs, **options}
        )
        report = result.report
        a, before, after = report.accuracy, report.original, report.compressed
        result.save(self.out / f"{network}.{title}.onnx".replace(" ", "_").replace(",", ""))
        print(
            f"| {network} | {title} | {after.macs / before.macs:.3f} | {after.params / before.params:.3f} | {a.original:.4f} | "
            f"{a.compressed:.4f} | {-a.drop * 100:+.2f} | {report.latency[0].speedup:.2f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )
        for note in result.plan.notes:
            if "rank" in note or "orthogonal factors" in note or "trained for" in note:
                print(f"<!-- {note} -->", flush=True)


def labels(table: Table) -> None:
    for share in SHARES:
        options = {"calibrate": table.calibrate, "methods": "cp3,separable", "budget": {"macs": share}}
        table.row("resnet20_cifar10", f"macs={share}", 10, **options)


def vbmf_cp(table: Table) -> None:
    for rank in ("vbmf", "vbmf_at_start", "sensitivity=0.05", "sensitivity=0.1", "sensitivity=0.2"):
        table.row("alexnet_half_cifar10", rank, 6, recipe="vbmf_cp", rank=rank, learning_rate=5e-4, train_batch=128)


def orthogonal(table: Table) -> None:
    for network in ("vgg_small_cifar10", "resnet20_cifar10"):
        for ratio, rank in RATIOS.items():
            for weight in (1.0, 0.0):
                options = {"recipe": "orthogonal", "rank": rank, "orthogonality": weight, "train_batch": 128}
                table.row(network, f"{ratio} ratio, lambda {weight:g}", 3, **options)


def joint_svd(table: Table) -> None:
    network = "resnet34_half_cifar10"
    path = str(table.networks / f"{network}.onnx")
    low, high = 0.0, 1.0
    for _ in range(12):  # the rate of the paper whose factor is nearest to the one asked for
        rate = (low + high) / 2
        plan = lr.analyze(path, recipe="joint_svd", rank=f"ratio={rate:.4f}")
        low, high = (low, rate) if plan.ratio("params") > 1 / SMALL else (rate, high)
    options = {"recipe": "joint_svd", "rank": f"ratio={low:.4f}", "train_batch": 128}
    for scheme in ("joint_left", "joint_both"):
        table.row(network, scheme, 3, methods=scheme, **options)
    plain = {"methods": "spatial_svd", "budget": {"params": 1 / SMALL}, "train_batch": 128}
    table.row(network, "spatial_svd", 3, **plain)
    table.row(network, "spatial_svd, calibrated", 3, calibrate=table.calibrate, **plain)


PARTS = {"labels": labels, "vbmf_cp": vbmf_cp, "orthogonal": orthogonal, "joint_svd": joint_svd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--networks", type=Path, default=Path("models"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(args.out, args.data, args.networks, args.epochs, args.precision)
    print("| network | | MACs | parameters | before | after | points | speedup | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for part in args.parts or PARTS:
        PARTS[part](table)


if __name__ == "__main__":
    main()

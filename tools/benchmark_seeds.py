"""Loss of top-1 over several runs of chance: one run on a few hundred pictures says little about a few tenths of a point.

    python -m tools.benchmark_seeds OUT [--data ../shared/data] [--network cifar10_resnet56] [--macs 0.4 0.3] [--seeds 5]
                                     [--align 8] [--drop-dead-channels]

Every run compresses with another seed (positions that are looked at, order of the samples, starts of fits), without labels.
Each picture's loss is the mean over the runs, and the interval is that of the mean over pictures: what is known of the loss on
pictures like these. On the lossless pictures and on those in JPEG, which are not what was calibrated on. Results are kept in
OUT, and a second run goes on where the first one stopped. Needs Pillow.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import onnx_lowrank as lr
from onnx_lowrank.runtime import RunSettings, Session
from tools.benchmark_accuracy import batches
from tools.cifar import inputs, jpeg, lossless

BATCH = 100
SETS = ("lossless", "jpeg")
Pictures = dict[str, tuple[np.ndarray, np.ndarray]]
"""Inputs and labels."""


def answers(model: Path, samples: np.ndarray) -> np.ndarray:
    """Logits (N, classes)."""
    session = Session(model, RunSettings())
    return np.concatenate([session.run(feeds)[0] for feeds in batches("input", samples, size=BATCH)])


def run(path: Path, train: np.ndarray, tests: Pictures, record: Path, **options: Any) -> None:
    """One compression, and the answers of what comes out."""
    feeds = batches("input", train, size=BATCH)
    made = lr.compress(path, calibrate=feeds, methods="cp3,separable", **options)
    model = record.with_suffix(".onnx")
    made.save(model)
    np.savez(record, **{name: answers(model, samples) for name, (samples, _) in tests.items()})


def rows(records: list[Path], tests: Pictures, dense: dict[str, np.ndarray]) -> list[str]:
    """What the runs lose, for each set of pictures."""
    lines = []
    for name, (_, labels) in tests.items():
        made = np.stack([np.load(record)[name] for record in records])
        before, after = dense[name].argmax(axis=1), made.argmax(axis=2)
        right = 100 * (after == labels).mean(axis=1)
        same = 100 * (after == before).mean(axis=1)
        noise = np.square(made - dense[name]).mean(axis=(1, 2)) / dense[name].var()
        lost = 100 * ((before == labels) - (after == labels).mean(axis=0))
        within = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
        top1, agreement = (", ".join(f"{value:.1f}" for value in values) for values in (right, same))
        loss = f"{lost.mean():.2f} ({lost.mean() - within:.2f} to {lost.mean() + within:.2f})"
        lines.append(
            f"{name}, {len(labels)} | {100 * (before == labels).mean():.1f} | {top1} | {agreement} | {noise.mean():.4f} | {loss}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--network", default="cifar10_resnet56", choices=["cifar10_resnet20", "cifar10_resnet56"])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.4, 0.3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--align", type=int, default=8, help="multiple that ranks are kept to")
    parser.add_argument("--drop-dead-channels", action="store_true", help="leave them out first")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.data / "cifar10"
    path = args.data / "models" / args.network / "model_bn.onnx"
    train = inputs(lossless(folder / "train_2000.npz")[0])
    read = lossless(folder / "test_500.npz"), jpeg(folder / "jpeg_test_5000.npz")
    tests = {name: (inputs(images), labels) for name, (images, labels) in zip(SETS, read, strict=True)}
    dense = {name: answers(path, samples) for name, (samples, _) in tests.items()}
    print("| MACs | pictures | original | top-1 | agreement | noise | points lost (95 %) |\n|" + "---|" * 7)
    for macs in args.macs:
        stem = f"{args.network}.{macs:g}.align{args.align}{'.dropped' * args.drop_dead_channels}"
        records = [args.out / f"{stem}.{seed}.npz" for seed in range(args.seeds)]
        for seed, record in enumerate(records):
            if not record.exists():
                dropped = args.drop_dead_channels
                run(
                    path,
                    train,
                    tests,
                    record,
                    budget={"macs": macs},
                    align=args.align,
                    seed=seed,
                    drop_dead_channels=dropped,
                )
        for line in rows(records, tests, dense):
            print(f"| {macs:.0%} | {line} |", flush=True)


if __name__ == "__main__":
    main()

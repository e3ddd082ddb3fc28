"""Channels that carry nothing, in trained networks: how many there are, and what they cost.

    python -m tools.benchmark_dead_channels [--data ../shared/data] [--models mobilenet_v1_1.0_224 ...]

Looked for on some pictures; how far the outputs are off, as a share of their variance, is measured on others. Once every channel that
carries nothing is dropped, once whole blocks of this machine's kernels only, which is what time depends on. Needs Pillow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnx_lowrank.channels import without_dead_channels
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.find import model_cost
from onnx_lowrank.graph.model import serialize
from onnx_lowrank.runtime import RunSettings, Session, block_size, time_pair
from onnx_lowrank.subject import open_subject, shapes_of
from onnx_lowrank.types import no_progress
from tools.benchmark_accuracy import TASKS, Samples, Task, batches, photographs


def scaled(name: str, side: int, centre: float) -> Callable[[Path], tuple[Samples, Samples]]:
    """Photographs of one size, numbers about 0, in two halves."""

    def load(data: Path) -> tuple[Samples, Samples]:
        rows = [(np.asarray(p.resize((side, side)), np.float32) - centre) / 128 for p, _ in photographs(data)]
        stacked = np.ascontiguousarray(np.stack(rows[:300]).transpose(0, 3, 1, 2))
        return batches(name, stacked[:200], size=1), batches(name, stacked[200:], size=1)

    return load


MODELS = {
    **{
        name: TASKS[name]
        for name in ("cifar10_resnet20", "cifar10_resnet56", "mobilenet_v1_1.0_224", "ultraface_rfb320")
    },
    "mobilenet_v1_0.25_128": Task("model.onnx", 1, scaled("input", 128, 128)),
    "tddfa_mb05": Task("model_folded.onnx", 1, scaled("input", 120, 127.5)),
    "ppocrv3_det": Task("model.onnx", 1, scaled("x", 320, 120)),
}


def row(path: Path, task: Task, data: Path, block: int) -> str:
    calibrate, test = task.samples(data)
    subject = open_subject(path, make_config(calibrate=calibrate))
    given, inputs, sizes = subject.model, subject.inputs, subject.sample_shapes
    shapes = shapes_of(given, inputs, sizes)
    lean, dropped = without_dead_channels(given, shapes, calibrate, block, no_progress)
    macs = model_cost(lean, shapes_of(lean, inputs, sizes))[0].macs
    tests = [batch[0] if isinstance(batch, tuple) else batch for batch in test]
    sessions = [Session(serialize(model), RunSettings(threads=1)) for model in (given, lean)]
    before, after = ([session.run(feeds)[0] for feeds in tests] for session in sessions)
    noise = sum(float(np.square(a - b).sum()) for a, b in zip(before, after, strict=True))
    energy = sum(float(np.square(a - a.mean()).sum()) for a in before)
    timing = time_pair(sessions[0], sessions[1], {name: value[:1] for name, value in tests[0].items()})
    return (
        f"{block} | {dropped.channels} | {macs / subject.cost.macs:.1%} | {noise / energy:.1e} | {timing.speedup:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    print("| model | blocks of | dropped | MACs | noise | speedup |\n|" + "---|" * 6)
    for name in args.models:
        path = args.data / "models" / name / MODELS[name].file
        for block in (1, block_size()):
            print(f"| {name} | {row(path, MODELS[name], args.data, block)} |", flush=True)


if __name__ == "__main__":
    main()

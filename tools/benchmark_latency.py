"""Latency as a budget: asked, predicted and measured; and plans by latency beside plans by MACs.

    python -m tools.benchmark_latency OUT [--data ../shared/data] [--models cifar10_resnet56 ...] [--ratio 0.6]

Kernels are those of the weights alone: time does not depend on them. The first table compresses each model to the share of
its latency that is asked for, by the command's own way, and says what was predicted and what was measured at the end. For the
second, a plan is made that keeps that share of the MACs, and the fastest one of no more predicted damage; both are timed in
turn, three times. VGG-16 is built, with random weights; models that are made are kept in OUT. One thread, batch 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnx

import models
import onnx_lowrank as lr
from onnx_lowrank.budgets.knapsack import OutOfReach
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.save import save
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.runtime import RunSettings, Session, time_pair
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Budget, Plan, no_progress

FILES = {
    "cifar10_resnet56": "model_bn.onnx",
    "mobilenet_v1_1.0_224": "model.onnx",
    "vgg16": "",
    "yolox_nano": "model.onnx",
}
RUNS = 3
STEPS = 10


def path_of(name: str, file: str, data: Path, out: Path) -> Path:
    """A model of the development data, or of `models` where no file is named."""
    if file:
        return data / "models" / name / file
    path = out / f"{name}.onnx"
    if not path.exists():
        onnx.save(models.build(name, 0), path)
    return path


def asked(name: str, path: Path, ratio: float) -> str:
    """Ask for a share of the latency."""
    start = time.perf_counter()
    result = lr.compress(path, budget={"latency": ratio})
    seconds = time.perf_counter() - start
    (budget,) = result.report.budgets
    size, before = result.report.compressed, result.report.original
    predicted = "-" if budget.predicted is None else f"{budget.predicted:.3f}"
    why = "" if budget.met else next((note for note in result.report.notes if "cannot be met" in note), "")
    return (
        f"| {name} | {ratio} | {predicted} | {budget.reached:.3f} | {'met' if budget.met else f'not met: {why}'} | "
        f"{size.macs / before.macs:.3f} | {result.report.seconds['latency']:.0f} | {seconds:.0f} |"
    )


def fastest(planner: Planner, damage: float) -> Plan:
    """The plan of least predicted latency whose damage is at most `damage`."""
    low, high, best = 0.0, 1.0, planner.dense()
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            plan = planner.solve([Budget("latency", middle)])
        except OutOfReach:
            low = middle
            continue
        if plan.error <= damage:
            best, high = plan, middle
        else:
            low = middle
    return best


def beside(name: str, path: Path, ratio: float, out: Path) -> str:
    """A plan by MACs and one by latency, of the same damage, timed in turn."""
    config = make_config(budget={"latency": ratio})
    planner = Planner(open_subject(path, config), config, no_progress)
    planner.counts("latency")
    by_macs = planner.solve([Budget("macs", ratio)])
    for _ in range(2):  # as under a budget: what the whole plan is seen to take is learned, and the plan made again
        planner.check(fastest(planner, by_macs.error))
    by_latency = fastest(planner, by_macs.error)
    sessions = []
    for way, plan in (("macs", by_macs), ("latency", by_latency)):
        save(planner.carry_out(plan, fit=False)[0], out / f"{name}.{way}.onnx")
        sessions.append(Session(out / f"{name}.{way}.onnx", RunSettings()))
    original = Session(path, RunSettings())
    feeds = planner.subject.feeds()
    gains = [time_pair(sessions[0], sessions[1], feeds).speedup for _ in range(RUNS)]
    speeds = [time_pair(original, session, feeds).speedup for session in sessions]
    shares = f"{by_macs.ratio('macs'):.2f} | {by_latency.ratio('macs'):.2f}"
    return (
        f"| {name} | {by_macs.error:.3g} | {by_latency.error:.3g} | {shares} | {speeds[0]:.2f} | {speeds[1]:.2f} | "
        + ", ".join(f"{gain:.2f}" for gain in gains)
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--models", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--ratio", type=float, default=0.6)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = {name: path_of(name, FILES[name], args.data, args.out) for name in args.models}
    print("| model | asked | predicted | measured | | MACs | seconds on latency | seconds |\n" + "|---" * 8 + "|")
    for name, path in paths.items():
        print(asked(name, path, args.ratio), flush=True)
    print(
        "\n| model | damage by MACs | by latency | MACs by MACs | by latency | speedup by MACs | by latency "
        f"| by latency over by MACs, {RUNS} runs |\n" + "|---" * 8 + "|"
    )
    for name, path in paths.items():
        print(beside(name, path, args.ratio, args.out), flush=True)


if __name__ == "__main__":
    main()

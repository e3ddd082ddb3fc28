"""Plans made for MNN beside plans made for ONNX Runtime's CPU, both timed on MNN.

    python -m tools.benchmark_mnn OUT [--data ../shared/data] [--models vgg16_cifar10 ...] [--ratio 0.6]

For each model a plan is made with ``--budget latency=RATIO --target mnn``, as compress makes it; and two by the times of ONNX Runtime
on this machine: the fastest there of no more predicted damage, and one of the same MACs. Kernels are those of the weights
alone: time does not depend on them. All are timed on MNN in turn with the original and with one another; the interval is that of
the median of ratios, at 95 %. VGG-16 is built, with random weights; models that are made are kept in OUT. One thread, batch 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from onnx_lowrank.budgets.knapsack import OutOfReach
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.save import save
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.runtime import mnn_version, time_pair, version
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Budget, Plan, no_progress
from tools.benchmark_latency import fastest, path_of

FILES = {"cifar10_resnet56": "model_bn.onnx", "vgg16_cifar10": ""}
ROUNDS, SECONDS = 2000, 15.0
STEPS = 10


def of_macs(planner: Planner, share: float) -> Plan:
    """The plan by latency whose MACs are nearest to a share, from below."""
    low, high, best = 0.0, 1.0, planner.dense()
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            plan = planner.solve([Budget("latency", middle), Budget("macs", share)])
        except OutOfReach:
            low = middle
            continue
        if plan.ratio("macs") >= 0.98 * share:
            best, high = plan, middle
        else:
            low = middle
    return best


def learned(planner: Planner, make: Callable[[], Plan]) -> Plan:
    """As under a budget: what whole plans are seen to take is learned, and the plan made again."""
    for _ in range(2):
        planner.check(make())
    return make()


def row(name: str, path: Path, ratio: float, out: Path) -> str:
    start = time.perf_counter()
    config = make_config(budget={"latency": ratio}, target="mnn")
    there = Planner(open_subject(path, config), config, no_progress)
    there.counts("latency")
    table = time.perf_counter() - start
    (for_mnn, *_) = there.alternatives([Budget("latency", ratio)])
    config = make_config(budget={"latency": ratio})
    here = Planner(open_subject(path, config), config, no_progress)
    here.counts("latency")
    plans = {
        "mnn": for_mnn,
        "damage": learned(here, lambda: fastest(here, for_mnn.error)),
        "macs": learned(here, lambda: of_macs(here, for_mnn.ratio("macs"))),
    }
    engine = there.engine
    assert engine is not None
    feeds = there.subject.feeds()
    sessions = {}
    for key, plan in plans.items():
        save(there.carry_out(plan, fit=False)[0], out / f"{name}.{key}.onnx")
        sessions[key] = engine.session(out / f"{name}.{key}.onnx")
    cells = [name, f"{table:.0f}"]
    for key, plan in plans.items():
        timing = time_pair(engine.original, sessions[key], feeds, rounds=ROUNDS, seconds=SECONDS)
        low, high = timing.speedup_interval
        cells += [f"{plan.error:.3g}", f"{plan.ratio('macs'):.2f}", f"{timing.speedup:.2f} ({low:.2f} to {high:.2f})"]
    for key in ("damage", "macs"):
        timing = time_pair(sessions[key], sessions["mnn"], feeds, rounds=ROUNDS, seconds=SECONDS)
        low, high = timing.speedup_interval
        cells.append(f"{timing.speedup:.2f} ({low:.2f} to {high:.2f})")
    methods: dict[str, int] = {}
    for choice in for_mnn.choices:
        methods[choice.decomposition] = methods.get(choice.decomposition, 0) + len(choice.layers)
    cells.append(", ".join(f"{count} {method}" for method, count in sorted(methods.items())))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--models", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--ratio", type=float, default=0.6)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"MNN {mnn_version()}, ONNX Runtime {version()}, latency={args.ratio:g}\n")
    columns = ["model", "seconds on the table"]
    for way in ("for MNN", "for ORT, same damage", "for ORT, same MACs"):
        columns += [f"{way}: damage", "MACs", "speedup"]
    columns += ["for MNN over same damage", "over same MACs", "what MNN's plan is made of"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in args.models:
        print(row(name, path_of(name, FILES[name], args.data, args.out), args.ratio, args.out), flush=True)


if __name__ == "__main__":
    main()

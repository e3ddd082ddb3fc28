"""Training on the ONNX graph: distillation after a calibrated decomposition, and its speed beside native torch.

    python -m tools.benchmark_training OUT [--data ../shared/data] [--budgets 0.25 0.2 0.15] [--parts speed distill]

Speed: forward, backward and step of ResNet-20 for CIFAR-10 on the ONNX graph and as a torch module of the same layers, batches of
64, interleaved. Distillation: `--methods cp3,separable --budget macs=R`, calibrated on 2,000 unlabelled pictures, then
`--finetune distill` on the same pictures; 500 test pictures, lossless.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import models
import onnx_lowrank as lr
from onnx_lowrank.finetune.program import Program, weights_of
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.plain import plain_graph

BATCH = 64
ROUNDS = 15


class Block(torch.nn.Module):
    """Two 3x3 convolutions and a shortcut, which takes every other pixel and adds channels of zeros where the width changes."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inner, out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(out)
        self.conv2 = torch.nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(out)
        self.stride, self.more = stride, (out - inner) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(self.bn2(self.conv2(y)) + x)


def native() -> torch.nn.Module:
    blocks: list[torch.nn.Module] = []
    inner = 16
    for out, stride in ((16, 1), (32, 2), (64, 2)):
        blocks += [Block(inner, out, stride), Block(out, out, 1), Block(out, out, 1)]
        inner = out
    stem = [torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)]
    return torch.nn.Sequential(*stem, *blocks, *head).eval()


def speed() -> None:
    """Pictures a second of both, and how much longer the graph takes."""
    graph = plain_graph(load(models.build("resnet20_cifar10", 0)))
    program, module = Program(graph, weights_of(graph)), native()
    assert sum(p.numel() for p in program.parameters.values()) == sum(p.numel() for p in module.parameters())
    x, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    runs = {
        "graph": (lambda: next(iter(program({"input": x}).values())), list(program.parameters.values())),
        "native": (lambda: module(x), list(module.parameters())),
    }
    optimizers = {name: torch.optim.AdamW(parameters, 1e-4) for name, (_, parameters) in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 2):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            F.cross_entropy(run(), labels).backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    print(
        f"ResNet-20, batches of {BATCH}, {torch.get_num_threads()} threads: graph {BATCH / middle['graph']:.0f} pictures/s, "
        f"native {BATCH / middle['native']:.0f}; the graph takes {middle['graph'] / middle['native']:.2f} times as long"
    )


def distill(data: Path, out: Path, budgets: list[float]) -> None:
    """Accuracy after the decomposition and after distillation."""
    given = data / "models" / "cifar10_resnet20" / "model_bn.onnx"
    cifar = data / "cifar10"
    preprocess = str(Path(__file__).parents[1] / "tests" / "data" / "cifar10.toml")
    print(
        "| MACs | top-1 before | decomposed | agreement | distilled | agreement | speedup | seconds | of which training |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for budget in budgets:
        common = {
            "calibrate": str(cifar / "train_2000.npz"),
            "evaluate": str(cifar / "test_500.npz"),
            "preprocess": preprocess,
        }
        options = {"budget": {"macs": budget}, "methods": "cp3,separable"}
        first = lr.compress(given, **common, **options)
        start = time.perf_counter()
        second = lr.apply(given, first.plan, **common, finetune="distill")
        seconds = time.perf_counter() - start
        second.save(out / f"resnet20.{budget}.onnx")
        a, b, report = first.report.accuracy, second.report.accuracy, second.report
        print(
            f"| {report.compressed.macs / report.original.macs:.3f} | {a.original:.3f} | {a.compressed:.3f} | "
            f"{a.others['agreement']:.3f} | {b.compressed:.3f} | {b.others['agreement']:.3f} | "
            f"{report.latency[0].speedup:.2f} | {seconds:.0f} | {report.seconds['finetune']:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.25, 0.2, 0.15])
    parser.add_argument("--parts", nargs="*", default=["speed", "distill"], choices=["speed", "distill"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if "speed" in args.parts:
        speed()
    if "distill" in args.parts:
        distill(args.data, args.out, args.budgets)


if __name__ == "__main__":
    main()

"""Joint decompositions beside separate ones at the same number of parameters, and what sharing costs at run time.

    python -m tools.benchmark_joint OUT [--data ../shared/data] [--params 0.35] [--ways separate ...]

ResNet-56 on CIFAR-10, 2,000 unlabelled training pictures for the fits, 500 test pictures for the accuracy. *separate*: each
layer by the best of the default methods; *spatial*: by the plain form of what the joint schemes share; *joint*: the three joint
schemes; *joint or spatial* and *both*: they compete in one plan. Then, on
untrained networks: a joint model timed in turn with the same model whose shared kernels are copied out, and the
alternations of Bi-JSVD on the largest section of ResNet-34.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx

import models
import onnx_lowrank as lr
from onnx_lowrank.config import METHODS, make_config
from onnx_lowrank.decompositions.joint_svd import ALTERNATIONS, JointBoth
from onnx_lowrank.runtime import RunSettings, Session, time_pair
from onnx_lowrank.subject import open_subject
from tools.cifar import inputs, lossless

JOINT = ("joint_left", "joint_right", "joint_both")
SPATIAL = ("svd", "spatial_svd")
WAYS = {
    "separate": METHODS,
    "spatial": SPATIAL,
    "joint": JOINT,
    "joint or spatial": (*SPATIAL, *JOINT),
    "both": (*METHODS, *JOINT),
}


def pictures(file: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = lossless(file)
    return inputs(images), labels


def accuracies(data: Path, out: Path, params: float, ways: list[str]) -> None:
    path = data / "models" / "cifar10_resnet56" / "model_bn.onnx"
    train, _ = pictures(data / "cifar10" / "train_2000.npz")
    test, labels = pictures(data / "cifar10" / "test_500.npz")
    fit = [{"input": train[i : i + 50]} for i in range(0, len(train), 50)]
    check = [({"input": test[i : i + 50]}, labels[i : i + 50]) for i in range(0, len(test), 50)]
    print(
        "| way | parameters | MACs | top-1 | agreement | speedup | seconds | layers |\n" + "|---" * 8 + "|", flush=True
    )
    for way in ways:
        start = time.perf_counter()
        result = lr.compress(path, budget={"params": params}, calibrate=fit, evaluate=check, methods=WAYS[way])
        seconds = time.perf_counter() - start
        result.save(out / f"resnet56.{way}.onnx")
        report, a = result.report, result.report.accuracy
        shares = [getattr(report.compressed, m) / getattr(report.original, m) for m in ("params", "macs")]
        used = Counter(layer.decomposition for layer in report.layers)
        print(
            f"| {way} | {shares[0]:.3f} | {shares[1]:.3f} | {a.compressed:.3f} | {a.others['agreement']:.3f} | "
            f"{report.latency[0].speedup:.2f} | {seconds:.0f} | {', '.join(f'{n} {k}' for k, n in used.most_common())} |",
            flush=True,
        )


def copied_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with a kernel of its own for every node."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored, seen = {t.name: t for t in copy.graph.initializer}, set()
    for index, node in enumerate(copy.graph.node):
        for place, name in enumerate(node.input):
            if name in stored and name in seen:
                own = onnx.TensorProto()
                own.CopyFrom(stored[name])
                own.name = node.input[place] = f"{name}_{index}"
                copy.graph.initializer.append(own)
            seen.add(name)
    return copy


def run_time(out: Path) -> None:
    for scheme in JOINT:
        network = models.build("resnet34_cifar10", 0)
        result = lr.compress(network, recipe="joint_svd", rank="ratio=0.125", methods=scheme)
        paths = [out / f"{scheme}.shared.onnx", out / f"{scheme}.copied.onnx"]
        onnx.save(result.model, paths[0])
        onnx.save(copied_out(result.model), paths[1])
        feeds = {"input": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
        shared, copied = (Session(path, RunSettings()) for path in paths)
        timing = time_pair(shared, copied, feeds)
        sizes = [path.stat().st_size for path in paths]
        print(
            f"{scheme}: copied out / shared, time {1 / timing.speedup:.3f}, bytes {sizes[1] / sizes[0]:.2f}", flush=True
        )


def alternations() -> None:
    subject = open_subject(models.build("resnet34_cifar10", 0), make_config())
    largest = max(subject.sections, key=lambda section: sum(layer.spec.params for layer in section.layers))
    weights = [layer.read_weight() for layer in largest.layers]
    start = time.perf_counter()
    trace = JointBoth().objective(weights, 40, ALTERNATIONS)
    seconds = time.perf_counter() - start
    falls = all(after <= before for before, after in itertools.pairwise(trace))
    print(f"{len(weights)} kernels {weights[0].shape}: {len(trace)} alternations in {seconds:.1f} s, falling: {falls}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--params", type=float, default=0.35)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    alternations()
    run_time(args.out)
    accuracies(args.data, args.out, args.params, args.ways)


if __name__ == "__main__":
    main()

"""How fast chains are in the place of one layer: by format, by rank in and out of step with the kernels, in floats and in eight bits.

    python -m tools.benchmark_layers OUT [--layers 64x8 32x16] [--methods cp3 spatial_svd tucker2] [--shares 0.5 0.3]

A network of four like 3x3 convolutions with ReLU (CHANNELSxSIZE), each decomposed by the same format to the rank that is nearest to a
share of the MACs among multiples of 16, and to that less 3. Times are those of the whole network, one thread, batch 1, in turn with
the dense one in the same precision; the last columns are in eight bits, made by onnxruntime.quantization of either. Kernels are drawn.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import onnx

from models import layers
from onnx_lowrank.candidates import Group, price
from onnx_lowrank.config import make_config
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.graph.save import save
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.runtime import RunSettings, Session, time_pair
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Rank, no_progress
from tools.benchmark_int8 import alone

LAYERS, BLOCK, OFF = 4, 16, 3


def network(channels: int, size: int) -> onnx.ModelProto:
    weights = layers.seeded(np.random.default_rng(0))
    graph, x = layers.start("layers", (channels, size, size))
    for i in range(LAYERS):
        x = graph.relu(graph.conv(x, f"conv{i}", weights, channels, 3, pad=1), f"relu{i}")
    return layers.export(layers.finish(graph, x), "")


def nearest(group: Group, method: str, share: float) -> Rank:
    """The rank in whole blocks, the same share of each mode, whose MACs are nearest to a share of the layer's."""
    highest = lift.max_rank(find_decomposition(method), [group.layers[0].spec])
    steps = range(1, max(highest) // BLOCK + 1)
    ranks = {tuple(max(BLOCK, round(most * i / len(steps) / BLOCK) * BLOCK) for most in highest) for i in steps}
    return min(
        sorted(ranks), key=lambda rank: abs(price(group, method, rank, 0.0).cost.macs / group.dense.cost.macs - share)
    )


def written(planner: Planner, method: str, rank: Rank, path: Path) -> Path:
    choices = [price(group, method, rank, 0.0) for group in planner.subject.groups]
    save(planner.carry_out(planner.plan(choices))[0], path)
    return path


def speedup(dense: Path, small: Path, feeds: dict[str, np.ndarray]) -> float:
    settings = RunSettings()
    return time_pair(Session(dense, settings), Session(small, settings), feeds, rounds=400).speedup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", nargs="+", default=["16x32", "32x16", "64x8", "64x32", "256x16"])
    parser.add_argument("--methods", nargs="+", default=["cp3", "spatial_svd", "tucker2", "channel_svd"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.3])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    print("| layers | method | rank | MACs | faster | at 3 less | in eight bits |\n" + "|---" * 7 + "|")
    for layer in args.layers:
        channels, size = map(int, layer.split("x"))
        pictures = np.random.default_rng(1).standard_normal((32, channels, size, size), dtype=np.float32)
        feeds = {"input": pictures[:1]}
        dense = args.out / f"{layer}.onnx"
        onnx.save(network(channels, size), dense)
        quantised = alone(dense, args.out / f"{layer}.int8.onnx", pictures)
        config = make_config()
        planner = Planner(open_subject(dense, config), config, no_progress)
        group = planner.subject.groups[0]
        for method in args.methods:
            for share in args.shares:
                rank = nearest(group, method, share)
                small = written(planner, method, rank, args.out / f"{layer}.{method}.{share}.onnx")
                uneven = written(planner, method, tuple(r - OFF for r in rank), args.out / "uneven.onnx")
                eight = alone(small, args.out / f"{layer}.{method}.{share}.int8.onnx", pictures)
                shown = " x ".join(map(str, rank))
                gains = speedup(dense, small, feeds), speedup(dense, uneven, feeds), speedup(quantised, eight, feeds)
                macs = price(group, method, rank, 0.0).cost.macs / group.dense.cost.macs
                print(
                    f"| {channels} to {channels}, {size} x {size} | `{method}` | {shown} | {macs:.2f} | "
                    + " | ".join(f"{gain:.2f}" for gain in gains)
                    + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

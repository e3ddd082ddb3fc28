"""What calibration takes, beside a plain pass of the same pictures: second moments of the inputs of every layer.

    python -m tools.benchmark_calibration [NETWORK] [--samples 512]

An untrained network of `models/`, pictures of noise; the plain pass before and after, by ONNX Runtime with as many threads.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

import numpy as np

import models
from onnx_lowrank.calibration.calibrate import collect
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.model import serialize
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import no_progress

BATCH = 8
"""What the command takes for pictures of 224 x 224."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default="resnet50")
    parser.add_argument("--samples", type=int, default=512)
    args = parser.parse_args()
    subject = open_subject(models.build(args.network), make_config(input_shape={}))
    (spec,) = subject.inputs
    shape, rng = subject.sample_shapes[spec.name][1:], np.random.default_rng(0)
    feeds = [{spec.name: rng.standard_normal((BATCH, *shape), np.float32)} for _ in range(args.samples // BATCH)]
    session = Session(serialize(subject.model), RunSettings(threads=os.cpu_count() or 1))

    def plain() -> None:
        for batch in feeds:
            session.run(batch)

    names = [name for group in subject.groups for name in group.names]
    calibrate = partial(collect, subject.model, subject.found, names, feeds, seed=0, progress=no_progress)
    spent = []
    for work in (plain, calibrate, plain):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    before, taken, after = spent
    print(f"{args.network}, {len(feeds) * BATCH} pictures, {len(names)} layers")
    print(
        f"plain pass {before:.1f} and {after:.1f} s; calibration {taken:.1f} s: {2 * taken / (before + after):.2f} times"
    )


if __name__ == "__main__":
    main()

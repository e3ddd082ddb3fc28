"""Same model, options and seed: the same bytes, in another process, under another hash seed, with another number of jobs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.decompositions import DECOMPOSITIONS, is_joint
from onnx_lowrank.work import parallel
from tests.helpers import normal, parse

SMALL = """g (float[N,6,8,8] x) => (float[N,10] y) {
  [stem] s = Conv <pads=[1,1,1,1]> (x, k0, b0) r0 = Relu (s)
  [one] a = Conv <pads=[1,1,1,1]> (r0, k1) r1 = Relu (a)
  [two] b = Conv <pads=[1,1,1,1]> (r1, k2) r2 = Relu (b)
  [three] c = Conv <pads=[1,1,1,1]> (r2, k3) r3 = Relu (c)
  [mean] m = GlobalAveragePool (r3) f = Flatten (m)
  [head] y = Gemm <transB=1> (f, w, v)
}"""

METHODS = tuple(name for name in DECOMPOSITIONS if not is_joint(name))
JOINT = tuple(name for name in DECOMPOSITIONS if is_joint(name))
WAYS = [
    *(("digits", name) for name in (*METHODS, "default", "calibrated")),
    *(("small", name) for name in (*METHODS, *JOINT, "default", "calibrated")),
]


def small() -> onnx.ModelProto:
    kernels = {f"k{i}": normal(16, 16, 3, 3, seed=i) for i in (1, 2, 3)}
    return parse(SMALL, k0=normal(16, 6, 3, 3), b0=normal(16), w=normal(10, 16), v=normal(10), **kernels)


def samples(name: str) -> list[dict[str, np.ndarray]]:
    if name == "small":
        return [{"x": normal(16, 6, 8, 8, seed=9)}]
    with np.load(models.DIGITS.with_name("digits_calibrate.npz")) as data:
        return [{"input": data["input"][:8]}]


def compressed(name: str, way: str, jobs: int) -> dict[str, Any]:
    """What comes of a model: a digest of its bytes, and how many layers were changed."""
    options: dict[str, Any] = {"budget": {"macs": 0.7}, "seed": 3, "jobs": jobs}
    if way in DECOMPOSITIONS:
        options["methods"] = way
    if way in JOINT:
        options |= {"budget": {"params": 0.9}, "align": 1}
    if way == "calibrated":
        options |= {"calibrate": samples(name)}
    if name == "digits" and way in ("cp3", "cp4", "calibrated"):
        options |= {"include": ["conv4", "fc"], "budget": {"macs": 0.97}, "align": 32}  # long fits
    result = lr.compress(small() if name == "small" else models.DIGITS, **options)
    return {
        "bytes": hashlib.sha256(result.model.SerializeToString()).hexdigest(),
        "layers": len(result.report.layers),
    }


def child(jobs: int) -> None:
    """Every way, in a process of its own; what came of each to standard output."""
    parallel.WORTH_A_PROCESS = 0  # so that small models start processes too
    pool, started = parallel.joblib.Parallel, []

    def counted(**given: Any) -> Any:
        started.append(given)
        return pool(**given)

    parallel.joblib.Parallel = counted
    seen = {f"{name} {way}": compressed(name, way, jobs) for name, way in WAYS}
    print(json.dumps(seen | {"pools": len(started)}))  # noqa: T201


@pytest.fixture(scope="module")
def runs() -> tuple[dict[str, Any], dict[str, Any]]:
    """One job, and two under another hash seed."""
    found = []
    for jobs in (1, 2):
        code = f"from tests.test_determinism import child; child({jobs})"
        # as many threads for both, as promised; one, so that they do not wait for each other
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "PYTHONHASHSEED": str(jobs)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[0], found[1]


def test_processes_were_started_for_two_jobs_and_none_for_one(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert runs[0]["pools"] == 0
    assert runs[1]["pools"] > 10


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_the_same_bytes_in_every_process_and_with_any_number_of_jobs(
    name: str, way: str, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    one, two = (run[f"{name} {way}"] for run in runs)
    assert one["layers"] > 0, "nothing was changed: the comparison could not fail"
    assert one == two

"""One process, processes of joblib and workers of Dask on the same plan, beside what this machine gives two processes at all.

    python -m tools.benchmark_cluster [--network vgg16] [--methods cp3] [--budget 0.5] [--include 'conv[1-3]*'] [--repeats 1]

Times, in turn and with the cache off, the plan (opening the model, every layer's candidates, the allocation) and its carrying out
(the kernels): ``--jobs 1``, ``--jobs 2``, and two Dask workers with one thread each that are running already, as separate
processes on the loopback interface. The ceiling is how much faster two
processes that know nothing of each other factorise matrices than one does twice as many, measured before and after. The seconds of
all processors that the processes of a way used tell what sharing the work costs, on a busy machine too. Results that differ are
an error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

os.environ["ONNX_LOWRANK_CACHE"] = ""

import models
import onnx_lowrank as lr
from onnx_lowrank.cache import fingerprint
from onnx_lowrank.config import Config, make_config
from onnx_lowrank.graph.model import serialize
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.planning.plans import plan_to_dict
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import no_progress
from onnx_lowrank.work import parallel

ALONE = (
    "from threadpoolctl import threadpool_limits; import numpy as np\n"
    "a = np.random.default_rng(0).standard_normal((900, 900))\n"
    "with threadpool_limits(1):\n    print(flush=True); input()\n    for _ in range({}): np.linalg.svd(a)\n"
)


def seconds_of(shares: list[int]) -> float:
    """How long processes take that factorise so many matrices each."""
    runs = [
        subprocess.Popen([sys.executable, "-c", ALONE.format(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for n in shares
    ]
    for run in runs:
        assert run.stdout is not None
        run.stdout.readline()
    began = time.perf_counter()
    for run in runs:
        assert run.stdin is not None
        run.stdin.write(b"\n")
        run.stdin.flush()
    for run in runs:
        run.wait()
    return time.perf_counter() - began


def ceiling(matrices: int = 12) -> float:
    """How much faster two processes are than one, on work that shares nothing."""
    return seconds_of([matrices]) / seconds_of([matrices // 2, matrices // 2])


def processor_seconds() -> float:
    """Of this process and of all that it started, those that ended too."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def planned_and_carried_out(path: str, config: Config) -> tuple[tuple[float, float], str]:
    """Seconds for a plan and for its kernels, and a hash of both."""
    began = time.perf_counter()
    planner = Planner(open_subject(path, config), config, no_progress)
    plan = planner.solve(config.budget)
    planned = time.perf_counter()
    model, _ = planner.carry_out(plan)
    done = time.perf_counter()
    return (planned - began, done - planned), fingerprint(json.dumps(plan_to_dict(plan)), serialize(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="vgg16")
    parser.add_argument("--methods", default="cp3")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the MACs")
    parser.add_argument("--include", default="*", help="layers")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        subprocess.run([sys.executable, "-m", "models", arguments.network, str(path)], check=True)
        scheduler = subprocess.Popen(
            [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file",
             f"{folder}/scheduler.json", "--dashboard-address", "127.0.0.1:0"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert scheduler.stderr is not None
        address = next(line.split()[-1] for line in scheduler.stderr if "Scheduler at:" in line)
        workers = subprocess.Popen(
            [sys.executable, "-m", "dask", "worker", address, "--nthreads", "1", "--nworkers", "2", "--no-dashboard"],
            stderr=subprocess.DEVNULL,
        )
        ways = {"1 process": {"jobs": 1}, "2 processes": {"jobs": 2}, "2 Dask workers": {"cluster": address}}
        options = {"methods": arguments.methods, "budget": {"macs": arguments.budget}, "include": arguments.include}
        try:
            least, parallel.WORTH_A_PROCESS = parallel.WORTH_A_PROCESS, 0
            lr.analyze(models.DIGITS, cluster=address, budget={"macs": 0.5})  # the workers have imported what they need
            parallel.WORTH_A_PROCESS = least
            print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ceiling {ceiling():.2f}", flush=True)
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            made = set()
            for _ in range(arguments.repeats):
                for way, where in ways.items():
                    used = processor_seconds()
                    seconds, outcome = planned_and_carried_out(str(path), make_config(**options, **where))
                    times[way].append(seconds)
                    made.add(outcome)
                    used = processor_seconds() - used
                    print(f"{way}: {seconds[0]:.1f} s + {seconds[1]:.1f} s, {used:.1f} s of processors", flush=True)
            print(f"load {os.getloadavg()[0]:.1f}; ceiling {ceiling():.2f}")
            one, two, dask = (np.median(each, axis=0) for each in times.values())
            for what, *each in (("plan", one[0], two[0], dask[0]), ("all", one.sum(), two.sum(), dask.sum())):
                print(
                    f"{what}: 2 processes {each[0] / each[1]:.2f} times as fast as 1; Dask {each[2] / each[1]:.2f} times as long"
                )
            assert len(made) == 1, "the results differ"
        finally:
            workers.terminate()
            workers.wait()
            scheduler.terminate()
            scheduler.wait()


if __name__ == "__main__":
    main()

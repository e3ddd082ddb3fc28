"""This tool beside others: accuracy, MACs, parameters, bytes, latency, run time and memory, in one run on one machine.

    python -m tools.benchmark OUT [--peers VENV/bin/python] [--models cifar10_resnet20 ...] [--ways ours int8 ...]

Two readings: every way at the same share of the MACs (`--share`), and the least share of the grid at which a way loses at most one
point of top-1 or agrees with the original on 99 % of the test pictures. No way is fine-tuned or sees a label. Each runs in a process
of its own; a way that fails is a row that says so. Models and results stay in OUT, and the same command goes on
where it was interrupted; latency is measured last, all models in turn. Without `--peers` the peers' environment is made in OUT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tools import cifar
from tools.benchmark import measure
from tools.benchmark.shares import scan
from tools.benchmark.table import machine, table
from tools.benchmark.ways import WAYS, Way

ROOT = Path(__file__).parents[2]
MODELS = {
    "cifar10_resnet20": "model_bn.onnx",
    "cifar10_resnet56": "model_bn.onnx",
    "mlperf_resnet8_cifar10": "model.onnx",
}
PEERS = (
    "tensorly==0.10.0",
    # 0.10.1 and the aidge_compression of PyPI have different versions of pybind11, 0.10.0.post3 another layout of tensors
    "aidge_core==0.10.0",
    "aidge_backend_cpu==0.10.0",
    "aidge_onnx==0.10.0",
    "aidge_compression==0.0.5.dev0",
    "pillow",
)
GRID = tuple(round(0.95 - 0.05 * i, 2) for i in range(16))
ROUNDS = 300


def peers_python(given: Path | None, out: Path) -> Path:
    """The interpreter that peers run with; the environment is made if there is none. What cannot be installed fails later, as a row."""
    if given:
        return given
    python = out / "peers" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", out / "peers"], check=True)
        for package in (str(ROOT), *PEERS):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=False)
    return python


class Worker:
    """A way at work on a model; the process starts with the first share."""

    def __init__(self, name: str, model: Path, samples: Path, folder: Path, peers: Path) -> None:
        python = peers if WAYS[name].peer else Path(sys.executable)
        self._command = [str(python), "-m", "tools.benchmark.worker", name, *map(str, (model, samples, folder))]
        self._process: Any = None
        self._log = folder / "log.txt"

    def make(self, share: str) -> dict[str, Any]:
        start, fresh = time.perf_counter(), self._process is None
        try:
            if self._process is None:
                log = self._log.open("a")
                self._process = subprocess.Popen(
                    self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            self._process.stdin.write(share + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is the answer
        except OSError as error:
            return {"failed": f"{self._command[0]}: {error.strerror}"}
        line = self._process.stdout.readline()
        seconds = time.perf_counter() - start
        if not line:
            self.close()
            tail = self._log.read_text(errors="replace").strip().splitlines()
            return {"failed": f"the process ended: {tail[-1][:200] if tail else 'no message'}"}
        answer = {**json.loads(line), "seconds": seconds, "alone": fresh}
        if "failed" in answer:
            self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


class Test:
    """The pictures, and what the original makes of them."""

    def __init__(self, model: Path, data: Path, out: Path) -> None:
        scaled = "mlperf" not in model.parent.name
        self.name = onnx.load(model).graph.input[0].name
        pictures, self.labels = cifar.lossless(data / "cifar10" / "test_500.npz")
        self.pictures = cifar.inputs(pictures, scaled=scaled)
        self.samples = out / "samples.npz"
        if not self.samples.exists():
            np.savez(
                self.samples,
                **{self.name: cifar.inputs(cifar.lossless(data / "cifar10" / "train_2000.npz")[0], scaled=scaled)},
            )
        self.dense = measure.answers(model, self.pictures)

    def result(self, model: Path) -> dict[str, Any]:
        found, proto = measure.answers(model, self.pictures), onnx.load(model)
        change = (found == self.labels).astype(float) - (self.dense == self.labels)
        return {
            "top1": float(np.mean(found == self.labels)),
            "loss": float(-change.mean()),
            "loss_error": float(change.std() / len(change) ** 0.5),
            "agreement": float(np.mean(found == self.dense)),
            "macs": measure.macs(proto, self.pictures[:1]),
            "params": measure.params(proto),
            "bytes": model.stat().st_size,
        }


def run(way: Way, worker: Worker, test: Test, folder: Path, share: str) -> dict[str, Any]:
    """The result at a share: that of an earlier run, or made now. What failed is tried again by a later run."""
    record = folder / f"{share}.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"failed": ""}
    if "failed" not in known:
        return known
    made = worker.make(share)
    try:
        made |= {} if "failed" in made else test.result(folder / made["file"])
    except Exception as error:  # a peer's model may be one that ONNX Runtime does not take
        made["failed"] = f"the model does not run: {str(error).splitlines()[0][:200]}"
    new = record.with_suffix(".new")
    new.write_text(json.dumps(made, indent=1))
    new.replace(record)  # whole, or not there
    figures = (
        made.get("failed") or f"top-1 {made['top1']:.3f}, agreement {made['agreement']:.3f}, {made['seconds']:.0f} s"
    )
    print(f"{folder.parent.name}, {way.title}, {share}: {figures}", flush=True)
    return made


def compare(key: str, model: Path, test: Test, place: Path, peers: Path, fixed: str, args: argparse.Namespace) -> None:
    """Both readings of one way on one model."""
    way, folder = WAYS[key], place / key
    folder.mkdir(exist_ok=True)
    worker = Worker(key, model, test.samples, folder, peers)
    first = run(way, worker, test, folder, fixed if way.shares else "-")
    if way.shares and ("failed" not in first or "of the MACs" in first["failed"]):
        scan(way.dear, lambda share: run(way, worker, test, folder, f"{share:g}"), args.grid, args.share)
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--peers", type=Path, help="Python of an environment that has this package and the peers")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs, in the first reading (default: 0.5)")
    parser.add_argument(
        "--grid", nargs="*", type=float, default=GRID, help="shares of the second reading; none: leave it out"
    )
    parser.add_argument(
        "--table", action="store_true", help="measure latency of what is there and print the tables, nothing else"
    )
    args = parser.parse_args()
    out, fixed = args.out.resolve(), f"{args.share:g}"
    out.mkdir(parents=True, exist_ok=True)
    peers = args.peers if args.table else peers_python(args.peers and args.peers.absolute(), out)
    for name in args.models:
        model, place = (args.data / "models" / name / MODELS[name]).resolve(), out / name
        place.mkdir(exist_ok=True)
        test = Test(model, args.data, place)
        (place / "original.json").write_text(json.dumps(test.result(model)))
        for key in () if args.table else args.ways:
            compare(key, model, test, place, peers, fixed, args)
        print(table(name, model, place, fixed, test.pictures[:1], ROUNDS), flush=True)
    print(machine(peers))


if __name__ == "__main__":
    main()

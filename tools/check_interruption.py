"""Runs killed at random moments, one after the other: nothing partial, every rerun completes, little is done twice.

    python -m tools.check_interruption [--kills 200] [--seed 0] [--model M.onnx] [--options "--calibrate data.npz ..."]

A run is a fork of this process, killed by SIGKILL after a random time of up to as long as a whole run takes; the next goes on with
its cache. Where one comes to its end first, its file is compared with that of an undisturbed run, and all begins anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import models
from onnx_lowrank import cli
from onnx_lowrank.cache import FOLDER, LIMIT
from onnx_lowrank.types import Candidate
from onnx_lowrank.work import parallel

OPTIONS = "--budget macs=0.6 --methods svd,cp3,spatial_svd --align 16"


def run_here(log: Path, arguments: list[str]) -> None:
    """In a fork: a run of the command line that tells which pieces of work it begins."""
    work = parallel.on_one_thread

    def told(function: Callable[[Any], Any], given: Any) -> Any:
        choice = next((f"{x.decomposition} {x.rank}" for x in given if isinstance(x, Candidate)), "")
        with open(log, "a") as file:
            file.write(f"{function.__name__} {given[0].names} {choice}\n")
        return work(function, given)

    parallel.on_one_thread = told
    code = 99
    try:
        code = cli.main([*arguments, "--quiet", "--jobs", "1"])
    finally:
        sys.stderr.flush()
        os._exit(code)


def started(log: Path, arguments: list[str]) -> int:
    """Process number of a run."""
    process = os.fork()
    if not process:
        run_here(log, arguments)
    return process


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(models.DIGITS))
    parser.add_argument("--options", default=OPTIONS)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scratch, results, cache, log = (folder / part for part in ("scratch", "out", "cache", "log"))
        for path in (scratch, results):
            path.mkdir()
        os.environ.update({FOLDER: str(cache), LIMIT: str(1 << 30), "TMPDIR": str(scratch)})
        tempfile.tempdir = str(scratch)
        out = results / "small.onnx"
        arguments = ["compress", asked.model, str(out), *asked.options.split()]

        def left() -> list[str]:
            paths = [*scratch.iterdir(), *results.iterdir()]
            return [path.name for path in paths if path != out and path.name != ".ses"]  # the last is ONNX Runtime's

        began = time.monotonic()
        _, status = os.waitpid(started(log, arguments), 0)
        seconds = time.monotonic() - began
        assert status == 0 and not left(), (status, left())
        whole, work = out.read_bytes(), len(lines(log))
        began = time.monotonic()
        print(f"undisturbed: {seconds:.1f} s, {work} pieces of work", flush=True)
        kills = through = repeated = most = partial = after = 0
        cache_seen = lines(log)
        fresh = True
        while kills < asked.kills or not fresh:
            if fresh:
                shutil.rmtree(cache, ignore_errors=True)
                log.unlink(missing_ok=True)
                out.unlink(missing_ok=True)
                fresh = False
            cache_seen = lines(log)
            process = started(log, arguments)
            if kills < asked.kills:
                time.sleep(rng.uniform(0, seconds))
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            again = len(set(lines(log)[len(cache_seen) :]) & set(cache_seen))
            repeated, most = repeated + again, max(most, again)
            if os.WIFSIGNALED(status):
                kills += 1
                if not kills % 20:
                    print(
                        f"{kills} kills after {time.monotonic() - began:.0f} s, {through} runs came through", flush=True
                    )
                after += out.exists()
                partial += out.exists() and out.read_bytes() != whole
            else:
                assert status == 0, status
                partial += out.read_bytes() != whole
                assert not left(), left()
                through, fresh = through + 1, True
        print(
            f"{kills} kills, {through} runs came through, each with the bytes of the undisturbed one and nothing left beside"
        )
        print(f"partial files: {partial}; killed with the result written: {after}")
        print(f"pieces of work done again: {repeated} in all, at most {most} after a kill")
        assert not partial and most <= 1


if __name__ == "__main__":
    main()

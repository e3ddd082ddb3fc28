"""Time our variational Bayesian rank against the way it is usually computed, on kernels of the size of VGG-16's.

    python -m tools.benchmark_vbmf                     # 512 x 4608, power-law spectrum
    python -m tools.benchmark_vbmf --vgg --cap 120     # and every layer of VGG-16

The usual way is `numpy.linalg.svd(Y)` with its default of full matrices, then a bounded minimisation over the noise
variance (our `legacy=True`). Every measurement is a process of its own and the two ways take turns. Only the rank is
timed, not the start or the drawing of the matrix. The full SVD of a Gemm of VGG-16 takes gigabytes and many minutes: a
process is ended after `--cap` seconds, and its time counts as at least that (shown as >).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
POWER_LAW = ("512 x 4608 power law", 512, 4608, 1)
# name, rows and columns of the mode-O unfolding (out, in * kh * kw), how many layers of VGG-16 have this shape
VGG16 = [
    ("conv1_1", 64, 27, 1),
    ("conv1_2", 64, 576, 1),
    ("conv2_1", 128, 576, 1),
    ("conv2_2", 128, 1152, 1),
    ("conv3_1", 256, 1152, 1),
    ("conv3_2, 3", 256, 2304, 2),
    ("conv4_1", 512, 2304, 1),
    ("conv4_2, 3, 5_1, 2, 3", 512, 4608, 5),
    ("fc6", 4096, 25088, 1),
    ("fc7", 4096, 4096, 1),
    ("fc8", 1000, 4096, 1),
]
METHODS = ("ours", "public")


@dataclass(frozen=True)
class Timing:
    """Seconds of one measurement (the cap, if it was ended there) and the rank that it found, if it finished."""

    seconds: float
    rank: int | None
    note: str = ""


def measure(method: str, rows: int, columns: int) -> None:
    """One measurement, in this process: says when the matrix is ready, then the seconds and the rank."""
    import numpy as np

    from onnx_lowrank.ranks import evbmf, evbmf_from_singular_values

    rng = np.random.default_rng(0)
    # Rows that shrink as a power law, about as the singular values of a trained kernel do. Entries of size 1, where the
    # absolute tolerance of the public minimiser does no harm: the ranks can then be compared.
    matrix = rng.standard_normal((rows, columns), dtype=np.float32)
    matrix *= (np.arange(1, rows + 1, dtype=np.float32) ** np.float32(-0.8))[:, None]
    matrix /= matrix.std()
    print("ready", flush=True)
    start = time.perf_counter()
    if method == "ours":
        rank = evbmf(matrix).rank
    else:
        short = matrix if rows <= columns else matrix.T  # it takes only matrices with rows <= columns
        _, values, _ = np.linalg.svd(short)
        rank = evbmf_from_singular_values(values, matrix.shape, legacy=True).rank
    print(json.dumps({"seconds": time.perf_counter() - start, "rank": rank}), flush=True)


def timed(method: str, rows: int, columns: int, cap: float, threads: int) -> Timing:
    """One measurement, in a process that is ended after `cap` seconds of the timed part."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, __file__, "--worker", method, str(rows), str(columns)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **limits, "PYTHONPATH": path}
    ) as worker:
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            raise SystemExit(f"the worker for {method} on {rows} x {columns} did not start; see its message above")
        start = time.perf_counter()
        try:
            worker.wait(timeout=cap)
        except subprocess.TimeoutExpired:
            worker.kill()
            return Timing(cap, None, "capped")
        if worker.returncode != 0:  # most likely out of memory: what it ran until then is a lower bound too
            return Timing(time.perf_counter() - start, None, f"failed, exit {worker.returncode}")
        return Timing(**json.loads(worker.stdout.read()))  # one short line: it cannot have filled the pipe


def benchmark(rows: int, columns: int, cap: float, threads: int, repeats: int) -> dict[str, Timing]:
    """Median of each way, the two taking turns; a way that did not finish, or took above 10 s, is not repeated."""
    found: dict[str, list[Timing]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method, timings in found.items():
            if not timings or (timings[-1].rank is not None and timings[-1].seconds < 10):
                timings.append(timed(method, rows, columns, cap, threads))
    return {
        method: Timing(median(t.seconds for t in timings), timings[-1].rank, timings[-1].note)
        for method, timings in found.items()
    }


def report(name: str, count: int, shape: str, both: dict[str, Timing]) -> None:
    """One line of the table."""
    ours, public = both["ours"], both["public"]
    bound = "" if public.rank is not None else ">"
    seconds = [f"{'' if t.rank is not None else '>'}{t.seconds:.4f}" for t in (ours, public)]
    ranks = ["-" if t.rank is None else str(t.rank) for t in (ours, public)]
    ratio = "-" if ours.rank is None else f"{bound}{public.seconds / ours.seconds:.0f}x"
    notes = "; ".join(f"{method} {t.note}" for method, t in both.items() if t.note)
    print(
        f"{name:24}{count:>3}{shape:>14}{seconds[0]:>11}{seconds[1]:>12}{ratio:>9}{ranks[0]:>7}{ranks[1]:>7}  {notes}",
        flush=True,
    )


def main() -> None:
    """Parse the options, measure, print the table and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vgg", action="store_true", help="every layer of VGG-16 as well")
    parser.add_argument(
        "--cap", type=float, default=180.0, help="seconds after which one measurement is ended (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, the median counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (%(default)s)")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "ROWS", "COLUMNS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        method, rows, columns = options.worker
        return measure(method, int(rows), int(columns))

    print(f"seconds, {options.threads} BLAS thread(s), median of up to {options.repeats}, cap {options.cap:g} s")
    print(f"{'layer':24}{'n':>3}{'shape':>14}{'ours':>11}{'public':>12}{'ratio':>9}{'rank':>7}{'public':>7}")
    sums, counts, capped = dict.fromkeys(METHODS, 0.0), 0, False
    for name, rows, columns, count in [POWER_LAW, *(VGG16 if options.vgg else [])]:
        both = benchmark(rows, columns, options.cap, options.threads, options.repeats)
        report(name, count, f"{rows} x {columns}", both)
        if both["ours"].rank is None:
            raise SystemExit(f"ours did not finish on {rows} x {columns}, so there is no ratio; raise --cap")
        if name != POWER_LAW[0]:
            counts += count
            capped |= both["public"].rank is None
            for method, timing in both.items():
                sums[method] += count * timing.seconds
    if options.vgg:
        bound = ">" if capped else ""
        print(
            f"VGG-16, {counts} layers: ours {sums['ours']:.2f} s, public {bound}{sums['public']:.2f} s, "
            f"ratio {bound}{sums['public'] / sums['ours']:.0f}x"
        )
        if capped:
            print("> : a lower bound; a measurement that was ended early counts as the time it had run")


if __name__ == "__main__":
    main()

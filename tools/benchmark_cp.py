"""CP of the thirteen convolutions of VGG-16 at half of the operations, beside tensorly's ``parafac``.

    python -m tools.benchmark_cp [--layers 0 3 5] [--cap 120] [--threads 2] [--exponents 0.5 0.5 0.5] [--linesearch]

The kernels are Gaussian tensors whose principal directions have power-law weights. The peer runs at its defaults; "100"
is where it stands after its default number of iterations, "equal" when it first reaches our relative error, of
whichever it reaches before the cap (a line with > is a lower bound). Needs ``tensorly``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import numpy as np
from tensorly.decomposition import parafac
from threadpoolctl import threadpool_limits

from onnx_lowrank.decompositions.cp import CP3
from onnx_lowrank.linalg import mode_dot

CHANNELS = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), *2 * [(256, 256)], (512, 256), *5 * [(512, 512)]]
DEFAULT_ITERATIONS = 100


def power_law(shape: Sequence[int], exponents: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Gaussian tensor scaled by ``i^-a j^-b l^-c``, then mixed along every axis by a random orthogonal matrix."""
    tensor = rng.standard_normal(shape)
    for mode, (n, exponent) in enumerate(zip(shape, exponents, strict=True)):
        mixing = np.linalg.qr(rng.standard_normal((n, n)))[0]
        tensor = mode_dot(tensor, mixing * np.arange(1, n + 1) ** -exponent, mode)
    return tensor / np.linalg.norm(tensor)


def half_rank(out: int, inner: int, positions: int) -> int:
    """The multiple of 8 that keeps at most half of the operations."""
    return math.floor(out * inner * positions / (2 * (out + inner + positions))) // 8 * 8


def run_peer(tensor: np.ndarray, rank: int, target: float, cap: float, linesearch: bool) -> list[tuple[float, float]]:
    """Seconds and relative error of parafac after each iteration, until both marks are passed or `cap` seconds are."""
    trace: list[tuple[float, float]] = []
    began = time.perf_counter()

    def watch(_: object, error: float) -> bool:
        trace.append((time.perf_counter() - began, float(error)))
        seconds, error = trace[-1]
        return seconds > cap or (len(trace) > DEFAULT_ITERATIONS and error <= target)

    parafac(tensor, rank, n_iter_max=100_000, random_state=0, linesearch=linesearch, callback=watch)
    return trace[1:]  # the first call is made before the first iteration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=list(range(len(CHANNELS))), help="numbers from 0")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds a layer for the peer; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2, help="BLAS threads")
    parser.add_argument("--exponents", type=float, nargs=3, default=(0.5, 0.5, 0.5), metavar=("A", "B", "C"))
    parser.add_argument("--linesearch", action="store_true", help="the peer's line search")
    arguments = parser.parse_args()
    print("layer     O    I  rank |  ours s   error  converged | peer s at 100   error | peer s at our error")
    ours, default, equal = 0.0, 0.0, 0.0
    for layer in arguments.layers:
        out, inner = CHANNELS[layer]
        tensor = power_law((out, inner, 9), arguments.exponents, np.random.default_rng(layer))
        rank = half_rank(out, inner, 9)
        with threadpool_limits(arguments.threads, "blas"):
            began = time.perf_counter()
            fit = CP3().factorize([tensor.reshape(out, inner, 3, 3)], (rank,), rng=np.random.default_rng(0))
            seconds = time.perf_counter() - began
            line = f"{layer:5d} {out:5d} {inner:4d} {rank:5d} | {seconds:7.2f} {fit.relative_error:7.4f} {fit.converged!s:>10}"
            ours += seconds
            if arguments.cap:
                trace = run_peer(tensor, rank, fit.relative_error, arguments.cap, arguments.linesearch)
                at_default = trace[min(DEFAULT_ITERATIONS, len(trace)) - 1]
                reached = next((s for s, error in trace if error <= fit.relative_error), None)
                short = ">" if len(trace) < DEFAULT_ITERATIONS and trace[-1][0] > arguments.cap else " "
                missed = " " if reached is not None else ">"
                default += at_default[0]
                equal += reached if reached is not None else trace[-1][0]
                line += f" | {short}{at_default[0]:12.2f} {at_default[1]:7.4f}"
                line += f" | {missed}{reached if reached is not None else trace[-1][0]:8.2f} ({len(trace)} iterations)"
        print(line, flush=True)
    print(
        f"total: ours {ours:.1f} s, peer at {DEFAULT_ITERATIONS} iterations {default:.1f} s, at our error {equal:.1f} s"
    )


if __name__ == "__main__":
    main()

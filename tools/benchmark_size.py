"""Compress models that are larger than the memory they may take: peak memory, time and validity.

    python -m tools.benchmark_size --gb 4 6 --folder /tmp        # needs three times the size on the disk
    python -m tools.benchmark_size --gb 0.5 --hidden 1024        # a quick look

The model is made up: pairs of a Gemm (hidden -> 4 hidden, bias, Relu) and a MatMul back, with a residual Add, float32, one
external data file. Kernels are random with singular values that fall as the root of their number, about as those of trained
ones do. The command is `compress --budget params=0.5`, in a process of its own. Memory is the sum of the resident sets of
that process and its children, from /proc, 20 times a second: pages of files that are mapped count, pages that several
processes share count for each; beside it the same with shared pages counted once (the proportional sets), and the peak of a
single process, as the system keeps it (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 0.05
"""Between two looks at the memory."""


def make_model(path: Path, size: int, hidden: int) -> None:
    """Write a model of `size` bytes or a little more, one kernel at a time in memory."""
    wide, rng = 4 * hidden, np.random.default_rng(0)
    blocks = -(-size // (2 * 4 * hidden * wide))
    nodes, tensors = [], []
    with open(path.with_name(path.name + ".data"), "wb") as data:

        def store(name: str, value: np.ndarray) -> None:
            data.write(b"\0" * (-data.tell() % 4096))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape)
            tensor.data_location = TensorProto.EXTERNAL
            places = ("location", f"{path.name}.data"), ("offset", data.tell()), ("length", value.nbytes)
            for key, text in places:
                tensor.external_data.add(key=key, value=str(text))
            value.tofile(data)
            tensors.append(tensor)

        def kernel() -> np.ndarray:
            value = rng.standard_normal((wide, hidden), dtype=np.float32)
            value *= rng.permutation(np.arange(1, hidden + 1) ** -0.5).astype(np.float32)
            value *= np.float32(0.5 / np.linalg.norm(value[0]))
            return value

        for i in range(blocks):
            store(f"up_{i}", kernel())
            store(f"bias_{i}", rng.standard_normal(wide).astype(np.float32) * np.float32(0.01))
            store(f"down_{i}", kernel())
            nodes += [
                helper.make_node("Gemm", [f"x{i}", f"up_{i}", f"bias_{i}"], [f"u{i}"], f"gemm_{i}", transB=1),
                helper.make_node("Relu", [f"u{i}"], [f"r{i}"], f"relu_{i}"),
                helper.make_node("MatMul", [f"r{i}", f"down_{i}"], [f"d{i}"], f"matmul_{i}"),
                helper.make_node("Add", [f"x{i}", f"d{i}"], [f"x{i + 1}"], f"add_{i}"),
            ]
    floats = TensorProto.FLOAT, ["N", hidden]
    ends = [helper.make_tensor_value_info(name, *floats) for name in ("x0", f"x{blocks}")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 17)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def resident(process: int) -> tuple[int, int, int]:
    """Bytes resident in a process and all that it started: with pages that they share counted for each, and once; and the most
    that any of them ever had."""
    total, shared_once, most, waiting = 0, 0, 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
            shared_once += 1024 * int(rollup.partition("Pss:")[2].split()[0])
            status = Path(f"/proc/{number}/status").read_text()
            most = max(most, 1024 * int(status.partition("VmHWM:")[2].split()[0]))
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):  # it ended meanwhile
            continue
    return total, shared_once, most


def measured(command: list[str]) -> tuple[int, tuple[int, int, int], float, float]:
    """Exit code, peaks of :func:`resident`, seconds, and seconds of all cores together."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), (0, 0, 0)
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            most, once, largest = resident(process.pid)
            peak = max(peak[0], most), max(peak[1], once), max(peak[2], largest)
            time.sleep(SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.returncode, peak, time.perf_counter() - start, work


def validity(path: Path, hidden: int) -> str:
    """What ONNX and ONNX Runtime, whole, make of a model."""
    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    (output,) = onnxruntime.InferenceSession(str(path), options).run(None, {"x0": np.ones((2, hidden), np.float32)})
    return "valid, runs" if np.isfinite(output).all() else "valid, gives NaN"


def main() -> None:
    """Print a row of the table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[4.0, 6.0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="for the models and all that is in between")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the parameters to keep")
    parser.add_argument("--options", nargs="*", default=[], help="further ones of compress, without their dashes")
    arguments = parser.parse_args()
    print(
        "| model, GB | result, GB | parameters | peak memory, GB | shared pages once | largest process | minutes | CPU minutes | "
        "cosine | |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in arguments.gb:
        folder = Path(tempfile.mkdtemp(prefix="size-", dir=arguments.folder))
        try:
            os.environ["TMPDIR"] = str(folder)
            model, out, report = folder / "model.onnx", folder / "small.onnx", folder / "report.json"
            make_model(model, round(size * 1e9), arguments.hidden)
            options = [f"--{option}" for option in arguments.options]
            command = [sys.executable, "-m", "onnx_lowrank", "compress", str(model), str(out)]
            command += ["--budget", f"params={arguments.budget}", "--json", str(report), "--quiet", *options]
            code, peaks, seconds, work = measured(command)
            if code:
                print(f"| {size:g} | exit code {code} after {seconds:.0f} s |")
                continue
            said = json.loads(report.read_text())
            print(f"seconds of stages: {said['seconds']}", file=sys.stderr)
            before, after = (said[which]["size_bytes"] / 1e9 for which in ("original", "compressed"))
            share = said["compressed"]["params"] / said["original"]["params"]
            memory = " | ".join(f"{peak / 1e9:.2f}" for peak in peaks)
            print(
                f"| {before:.2f} | {after:.2f} | {share:.3f} | {memory} | {seconds / 60:.1f} | {work / 60:.1f} | "
                f"{said['accuracy']['compressed']:.3f} | {validity(out, arguments.hidden)} |",
                flush=True,
            )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

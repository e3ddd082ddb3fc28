"""Markdown of the results that are there."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import numpy as np

from tools.benchmark import measure
from tools.benchmark.shares import Result, least
from tools.benchmark.ways import WAYS

HEADS = (
    "way",
    "MACs",
    "parameters",
    "bytes",
    "top-1",
    "lost, points",
    "agreement",
    "speedup",
    "seconds",
    "CPU s",
    "peak, MB",
)


def results(place: Path, key: str) -> dict[str, Result]:
    """By share; a way without shares has `-`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((place / key).glob("*.json"))}


def row(title: str, result: Result, original: Result, speed: float | None, *, made: bool = True) -> str:
    if "failed" in result:
        return f"| {title} | failed: {result['failed'].replace('|', '/')} |" + " |" * (len(HEADS) - 2)
    cells = [f"{result[key] / original[key]:.3f}" for key in ("macs", "params", "bytes")]
    cells += [f"{100 * result['top1']:.1f}", f"{100 * result['loss']:+.1f} ± {100 * result['loss_error']:.1f}"]
    cells += [f"{100 * result['agreement']:.1f} %", "-" if speed is None else f"{speed:.2f}"]
    known = made and result.get("alone", False)
    cells += (
        [f"{result['seconds']:.0f}", f"{result['cpu_seconds']:.0f}", f"{result['peak_bytes'] / 1e6:.0f}"]
        if known
        else ["-"] * 3
    )
    return f"| {title} | " + " | ".join(cells) + " |"


def table(name: str, model: Path, place: Path, share: str, sample: np.ndarray, rounds: int) -> str:
    """Both readings of a model; latencies are measured now, all its models in turn."""
    original: Result = json.loads((place / "original.json").read_text())
    found = {key: results(place, key) for key in WAYS if (place / key).exists()}
    same = {key: every.get(share) or every.get("-") for key, every in found.items()}
    fewest = {key: least(every, original["macs"]) for key, every in found.items() if "-" not in every}
    paths = {
        (key, result["file"]): place / key / result["file"]
        for key, result in same.items()
        if result and "file" in result
    }
    paths |= {(key, pair[1]["file"]): place / key / pair[1]["file"] for key, pair in fewest.items() if pair}
    spent = measure.times([model, *paths.values()], sample, rounds)
    speeds = {key: float(np.median(spent[:, 0] / spent[:, 1 + i])) for i, key in enumerate(paths)}
    facts = f"{original['macs'] / 1e6:.1f} million MACs, {original['params']:,} parameters, {original['bytes']:,} bytes"
    facts += f", top-1 {100 * original['top1']:.1f}, {np.median(spent[:, 0]):.3f} ms"
    head = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    lines = [f"\n### {name}: {facts}\n", f"At {share} of the MACs:\n", *head]
    for key, result in same.items():
        if result:
            lines.append(row(WAYS[key].title, result, original, speeds.get((key, result.get("file", "")))))
    lines += ["\nAt the fewest MACs that lose at most one point or agree on 99 %:\n", *head]
    for key, pair in fewest.items():
        tried = ", ".join(f"{s} lost {100 * r['loss']:.1f}" for s, r in sorted(found[key].items()) if "loss" in r)
        if pair:
            lines.append(
                row(f"{WAYS[key].title}, asked {pair[0]}", pair[1], original, speeds[key, pair[1]["file"]], made=False)
            )
        else:
            lines.append(f"| {WAYS[key].title} | none: {tried or 'nothing was made'} |" + " |" * (len(HEADS) - 2))
    return "\n".join(lines)


def machine(peers: Path | None) -> str:
    """Date, machine and versions, those of the peers' environment too."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [
        flag
        for flag in fields.get("flags", "").split()
        if flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    ]
    wanted = ("numpy", "scipy", "onnx", "onnxruntime")
    own = [f"{name} {importlib.metadata.version(name)}" for name in (*wanted, "onnx-lowrank")]
    lines = [
        f"\n{datetime.date.today()}, {fields.get('model name', platform.processor())} ({', '.join(flags)}), {text.count('processor')} processors, "
        f"Python {platform.python_version()}, {', '.join(own)}. Latency: one thread, batch 1."
    ]
    if peers and peers.exists():
        run = subprocess.run(
            [str(peers), "-m", "pip", "list", "--format", "freeze"], capture_output=True, text=True, check=False
        )
        kept = [
            line
            for line in run.stdout.split()
            if line.startswith(("aidge", "tensorly", "numpy=", "scipy=", "onnx=", "onnxruntime="))
        ]
        lines.append(f"Peers: {', '.join(kept) or 'pip list failed'}.")
    return "\n".join(lines)

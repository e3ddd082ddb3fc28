"""This tool as a user calls it: the command, with unlabelled samples and one setting for every model and share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SETTING = ("--methods", "cp3,separable")


def floats(model: Path, samples: Path) -> Callable[[float | None, Path], None]:
    return _command(model, samples)


def int8(model: Path, samples: Path) -> Callable[[float | None, Path], None]:
    return _command(model, samples, "--quantize", "int8")


def _command(model: Path, samples: Path, *more: str) -> Callable[[float | None, Path], None]:
    def make(share: float | None, out: Path) -> None:
        words = ["compress", str(model), str(out), "--calibrate", str(samples), "--budget", f"macs={share}", "--quiet"]
        run = subprocess.run([sys.executable, "-m", "onnx_lowrank", *words, *SETTING, *more], check=False)
        if run.returncode:
            raise RuntimeError(f"exit code {run.returncode}")

    return make

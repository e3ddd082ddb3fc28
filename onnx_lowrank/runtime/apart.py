"""A provider tried in a process of its own: options that stick for a process, and a crash, end with it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from onnx_lowrank.runtime.session import Feeds, RunSettings, probe

SECONDS = 300
"""Longest time that a trial may take: simulators of devices compile slowly."""


def probe_apart(settings: RunSettings, model: bytes, feeds: Feeds) -> str:
    """As :func:`~onnx_lowrank.runtime.session.probe`, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        task, answer = Path(folder) / "task", Path(folder) / "answer"
        task.write_bytes(pickle.dumps((settings, model, dict(feeds))))
        command = [sys.executable, "-m", __name__, str(task), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"does not work: it gave no answer in {SECONDS} seconds"
        if not answer.exists():
            return f"does not work: its process ended with code {done.returncode}"
        return answer.read_text(encoding="utf-8")


def main(task: str, answer: str) -> None:
    """Do what :func:`probe_apart` wrote down, in the process that it started."""
    settings, model, feeds = pickle.loads(Path(task).read_bytes())
    Path(answer).write_text(probe(settings, model, feeds), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

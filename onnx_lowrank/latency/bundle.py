"""A bundle for a device: the models that a table of times takes, and a script that needs nothing of this package."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from onnx_lowrank.config import Config
from onnx_lowrank.files import scratch_folder
from onnx_lowrank.graph.fixed import fixed
from onnx_lowrank.graph.hollow import Hollow
from onnx_lowrank.graph.save import check_destination
from onnx_lowrank.latency.pricing import StandIns
from onnx_lowrank.latency.probes import Part, digest, mixes, probes
from onnx_lowrank.subject import Subject
from onnx_lowrank.targets.measured import FORMAT
from onnx_lowrank.types import Candidate, LowRankError, Progress
from onnx_lowrank.verification.verify import Feeds

WEIGHTS = "weights.bin"
"""Written on the device, by the script; beside the models, which read it."""


@dataclass(frozen=True)
class Bundle:
    """What was written.

    Parameters
    ----------
    path
        The archive.
    models
        In it, the original apart.
    size_bytes
        Of the archive.
    weights_bytes
        Of the numbers that the script makes up on the device.
    """

    path: Path
    models: int
    size_bytes: int
    weights_bytes: int


def write_bundle(
    subject: Subject,
    config: Config,
    candidates: Sequence[Sequence[Candidate]],
    target: str,
    block: int,
    out: Path,
    progress: Progress,
) -> Bundle:
    """Write the models worth timing, without their weights, and ``bench.py``.

    Parameters
    ----------
    candidates
        What each group of the subject could become.
    target, block
        What the ranks and formats were chosen for, and what ranks are kept to.

    Raises
    ------
    LowRankError
        Where there is nothing to time, or the file cannot be written.
    """
    check_destination(out, subject.model.path)
    wanted = probes(subject, candidates, block)
    wanted += mixes(wanted)
    if not wanted:
        raise LowRankError("no layer of the model has a decomposition that saves anything: there is nothing to time")
    feeds, stand_ins, hollow = subject.feeds(config.batch_size), StandIns(subject, config.seed), Hollow(WEIGHTS)
    sizes = {name: value.shape for name, value in feeds.items()}
    models = {"original.onnx": hollow.emptied(fixed(subject.given, sizes))}
    timed: list[dict[str, Any]] = []
    for number, probe in enumerate(wanted):
        name = f"model_{number:03}.onnx"
        models[name] = hollow.emptied(fixed(stand_ins.model(probe.choices)[0], sizes))
        timed.append({"file": name, "parts": [_part(part) for part in probe.parts]})
        progress("bundle", number + 1, len(wanted))
    sections = hollow.sections()
    manifest = {
        "bundle": "onnx-lowrank",
        "format": FORMAT,
        "model": digest(subject),
        "name": subject.model.path.name if subject.model.path else "model",
        "target": target,
        "align": block,
        "batch": config.batch_size,
        "threads": config.threads,
        "inputs": _inputs(feeds),
        "weights": sections,
        "original": "original.onnx",
        "id": hashlib.sha256(json.dumps(timed).encode()).hexdigest()[:16],
        "timed": timed,
    }
    files = {name: proto.SerializeToString(deterministic=True) for name, proto in models.items()}
    script = resources.files("onnx_lowrank.runtime").joinpath("portable.py").read_bytes()
    _write(out, {"bench.py": script, "manifest.json": json.dumps(manifest, indent=1).encode(), **files})
    return Bundle(out, len(timed), out.stat().st_size, sum(int(str(each["bytes"])) for each in sections))


def _part(part: Part) -> dict[str, Any]:
    method, rank = part.point
    return {"layer": part.kind, "method": method, "rank": list(rank), "groups": len(part.choices)}


def _inputs(feeds: Feeds) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(x.shape), "dtype": x.dtype.name} for name, x in feeds.items()]


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """The archive, whole or not at all; the same bytes for the same files."""
    try:
        with scratch_folder(out.parent, f".{out.name}-") as scratch:
            part = scratch / out.name
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in files.items():
                    entry = zipfile.ZipInfo(name)
                    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                    archive.writestr(entry, data)
            os.replace(part, out)
    except OSError as error:
        raise LowRankError(f"{out} cannot be written ({error.strerror or error}): nothing was changed") from error

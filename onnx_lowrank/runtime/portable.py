#!/usr/bin/env python3
"""Times the models of a bundle on this device, each in turn with the original, and writes one JSON: see --help.

Needs onnxruntime and numpy, nothing else. The JSON is for `onnx-lowrank compress MODEL OUT --budget latency=R --target F.json`. It is
written after each model, so that a run that was interrupted goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FORMAT = 1
WEIGHTS = "weights.bin"
CHUNK = 1 << 20
CPU = "CPUExecutionProvider"


class Refused(Exception):
    """Something that the user can do something about."""


def main(argv: list[str] | None = None) -> int:
    """Run; 0: all models were timed (those that the device refuses apart), 2: bad input, 130: interrupted."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="For an accelerator name its provider; a provider that runs nothing of the original is refused.",
    )
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="what to write (default: results.json)")
    parser.add_argument("--provider", default=CPU, help="execution provider (default: CPU)")
    parser.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument(
        "--provider-library",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="library of a provider that comes apart from onnxruntime, registered under its name; repeatable",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="threads of one operator (default: what the bundle was made for; 0: as many as there are)",
    )
    parser.add_argument("--rounds", type=int, default=50, help="most rounds for each model (default: 50)")
    parser.add_argument("--seconds", type=float, default=5.0, help="stop after so long once there are 10 (default: 5)")
    parser.add_argument(
        "--pair", nargs=2, type=Path, metavar=("ORIGINAL", "RESULT"), help="time two models, and that is all"
    )
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        register(args)
        args.provider = provider_of(args.provider)
        return pair(args) if args.pair else bundle(args)
    except Refused as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench.py: interrupted; start it again to go on", file=sys.stderr)
        return 130


def said(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def register(args: argparse.Namespace) -> None:
    """Register the libraries of providers; their names are what remains of the arguments."""
    split = [each.partition("=") for each in args.provider_library]
    if not all(name and path for name, _, path in split):
        raise Refused(f"provider library '{' '.join(args.provider_library)}': NAME=PATH was expected")
    for name, _, path in split:
        try:
            ort.register_execution_provider_library(name, str(Path(path).resolve()))
        except Exception as error:  # one of onnxruntime's own, or an AttributeError of one before 1.23
            raise Refused(f"{path} cannot be loaded as the library of {name}: {said(error)}") from error
    args.provider_library = [name for name, _, _ in split]


def provider_of(name: str) -> str:
    """The full name of a provider of this build."""
    there = ort.get_available_providers()
    found = [p for p in there if name.lower() in (p.lower(), p.lower().replace("executionprovider", ""))]
    if not found:
        raise Refused(f"provider '{name}' is not in this build of ONNX Runtime, which has {', '.join(there)}")
    return str(found[0])


def options_of(pairs: list[str]) -> dict[str, str]:
    """Options of the provider."""
    split = [pair.partition("=") for pair in pairs]
    if not all(key and found and value for key, found, value in split):
        raise Refused(f"provider option '{' '.join(pairs)}': KEY=VALUE was expected")
    return {key: value for key, _, value in split}


class Model:
    """A model in a session, and where its nodes run, as far as the session says."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        given = options_of(args.provider_option)
        chosen: dict[str, Any] = {"providers": [(args.provider, given), *([] if args.provider == CPU else [CPU])]}
        if args.provider in args.provider_library:
            options.add_provider_for_devices(devices_of(args.provider), given)
            chosen = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # by default a provider that fails is exchanged for the CPU without a word
            self.session = ort.InferenceSession(str(path), options, enable_fallback=0, **chosen)
        self.placement: dict[str, int] = {}
        if hasattr(self.session, "get_provider_graph_assignment_info"):
            for part in self.session.get_provider_graph_assignment_info():
                self.placement[part.ep_name] = self.placement.get(part.ep_name, 0) + len(part.get_nodes())

    def seconds(self, feeds: dict[str, np.ndarray]) -> float:
        """One run."""
        start = time.perf_counter()
        self.session.run(None, feeds)
        return time.perf_counter() - start


def devices_of(provider: str) -> list[Any]:
    """The most special device that the provider of a library has here, alone."""
    order = ("NPU", "GPU", "CPU")
    found = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    if not found:
        raise Refused(f"{provider} finds no device here")
    return sorted(
        found, key=lambda d: next((i for i, kind in enumerate(order) if str(d.device.type).endswith(kind)), 3)
    )[:1]


def check_placed(model: Model, args: argparse.Namespace, which: str = "original") -> None:
    """See that the provider runs a part of a model at least, where the session says."""
    if args.provider != CPU and model.placement and not model.placement.get(args.provider):
        raise Refused(f"{args.provider} runs nothing of the {which}: all is on {', '.join(model.placement)}")


def compared(first: Model, second: Model, feeds: dict[str, np.ndarray], args: argparse.Namespace) -> dict[str, Any]:
    """Two models in turn: the median of the ratios of their times, and its 95 % interval from order statistics."""
    for _ in range(3):
        first.seconds(feeds)
        second.seconds(feeds)
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < args.rounds and (len(times) < 10 or time.perf_counter() - start < args.seconds):
        if len(times) % 2:  # who goes first alternates, so that neither inherits a warm cache
            late = second.seconds(feeds)
            times.append((first.seconds(feeds), late))
        else:
            times.append((first.seconds(feeds), second.seconds(feeds)))
    values = np.array(times)
    ratios = np.sort(values[:, 1] / values[:, 0])
    n = len(ratios)
    low = max(int(np.floor((n - 1) / 2 - 0.98 * np.sqrt(n))), 0)
    return {
        "ratio": float(np.median(ratios)),
        "low_95": float(ratios[low]),
        "high_95": float(ratios[n - 1 - low]),
        "rounds": n,
        "original_ms": 1e3 * float(np.median(values[:, 0])),
        "ms": 1e3 * float(np.median(values[:, 1])),
        "placement": second.placement,
    }


def made_up(inputs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Standard normal numbers for inputs of floats, zeros for others."""
    rng = np.random.default_rng(0)
    feeds = {}
    for entry in inputs:
        dtype = np.dtype(entry["dtype"])
        value = rng.standard_normal(entry["shape"]) if dtype.kind == "f" else np.zeros(entry["shape"])
        feeds[entry["name"]] = value.astype(dtype)
    return feeds


def pair(args: argparse.Namespace) -> int:
    """Two models that the user names."""
    args.threads = 1 if args.threads is None else args.threads
    try:
        first, second = (Model(path, args) for path in args.pair)
    except Exception as error:  # onnxruntime raises types of its own, one for each status
        raise Refused(said(error)) from error
    check_placed(first, args)
    check_placed(second, args, "result")
    kinds = {
        "tensor(float)": "float32",
        "tensor(float16)": "float16",
        "tensor(double)": "float64",
        "tensor(int64)": "int64",
    }
    inputs = []
    for spec in first.session.get_inputs():
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in spec.shape]
        inputs.append({"name": spec.name, "shape": shape, "dtype": kinds.get(spec.type, "int32")})
    try:
        found = compared(first, second, made_up(inputs), args)
    except Exception as error:
        raise Refused(said(error)) from error
    print(
        f"latency of the result over the original's: {found['ratio']:.3f} ({found['low_95']:.3f} to {found['high_95']:.3f}), "
        f"{found['original_ms']:.3f} ms and {found['ms']:.3f} ms, median of {found['rounds']} rounds, {args.provider}; "
        f"nodes: {first.placement or '?'} and {second.placement or '?'}"
    )
    return 0


def bundle(args: argparse.Namespace) -> int:
    """All models of the bundle that are not timed yet."""
    try:
        manifest = json.loads((args.bundle / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"no bundle is beside bench.py ({error}): unpack the whole of it") from error
    args.threads = manifest.get("threads", 1) if args.threads is None else args.threads
    results = begun(args, manifest)
    fill_weights(args.bundle / WEIGHTS, manifest["weights"])
    feeds = made_up(manifest["inputs"])
    try:
        original = Model(args.bundle / manifest["original"], args)
        check_placed(original, args)
        original.seconds(feeds)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"the original does not run on {args.provider}: {said(error)}") from error
    results["placement"] = original.placement
    write(args.out, results)  # what cannot be written is told before the work
    done, models = {entry["file"] for entry in results["timed"]}, manifest["timed"]
    for number, model in enumerate(models, 1):
        if model["file"] in done:
            continue
        entry = dict(model)
        try:
            other = Model(args.bundle / model["file"], args)
            check_placed(other, args, "model")
            entry |= compared(original, other, feeds, args)
            outcome = f"{entry['ratio']:.3f} ({entry['low_95']:.3f} to {entry['high_95']:.3f}) of the original"
        except Exception as error:
            entry["error"] = outcome = said(error)
        results["timed"].append(entry)
        timed = [each["original_ms"] for each in results["timed"] if "ratio" in each]
        results["original_ms"] = float(np.median(timed)) if timed else None
        write(args.out, results)
        print(f"[{number}/{len(models)}] {named(model['parts'])}: {outcome}", flush=True)
    if not any("ratio" in each for each in results["timed"]):
        raise Refused(f"no model of the bundle runs on {args.provider}; see {args.out}")
    print(
        f"{args.out}: {len(results['timed'])} models, the original takes {results['original_ms']:.3f} ms on {args.provider}"
    )
    return 0


def named(parts: list[dict[str, Any]]) -> str:
    """What was changed in a model."""
    first = parts[0]
    if len(parts) > 1:
        return f"a mix over {len(parts)} kinds of layers"
    return f"{first['method']} {'x'.join(map(str, first['rank']))} in {first['groups']} layer(s)"


def begun(args: argparse.Namespace, manifest: dict[str, Any]) -> dict[str, Any]:
    """The results so far; those of another bundle, or of other options, are not touched."""
    environment = {
        "provider": args.provider,
        "options": options_of(args.provider_option),
        "threads": args.threads,
        "onnxruntime": ort.__version__,
        "processor": processor(),
        "system": platform.platform(),
        "machine": platform.machine(),
    }
    same = {key: manifest[key] for key in ("id", "model", "name", "target", "align", "batch")}
    new = {
        "results": "onnx-lowrank",
        "format": FORMAT,
        **same,
        "models": len(manifest["timed"]),
        "environment": environment,
        "date": datetime.date.today().isoformat(),
        "original_ms": None,
        "timed": [],
    }
    if not args.out.exists():
        return new
    try:
        found = json.loads(args.out.read_text(encoding="utf-8"))
        goes_on = found["results"] == "onnx-lowrank" and all(
            found[k] == new[k] for k in (*same, "models", "environment")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{args.out} is there and holds no results ({error}): choose another --out") from error
    if not goes_on:
        raise Refused(f"{args.out} is of another bundle, device or options: choose another --out")
    return dict(found)


def processor() -> str:
    """What this device calls its processor."""
    names = ("model name", "Hardware", "Model")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    parts = [line.partition(":") for line in lines]
    found = next((text.strip() for name in names for key, _, text in parts if key.strip() == name), "")
    return found or platform.machine()


def fill_weights(path: Path, sections: list[dict[str, Any]]) -> None:
    """Random numbers in the place of all large weights: time does not depend on them, and they would not compress."""
    size = sum(section["bytes"] for section in sections)
    if path.exists() and path.stat().st_size == size:
        return
    part = path.with_name(path.name + ".part")
    rng = np.random.default_rng(0)
    try:
        with open(part, "wb") as file:
            for section in sections:
                dtype, left = np.dtype(section["dtype"]), section["bytes"]
                while left:
                    count = min(left, CHUNK)
                    values = section["scale"] * rng.standard_normal(-(-count // dtype.itemsize), dtype=np.float32)
                    file.write(values.astype(dtype).tobytes()[:count])
                    left -= count
        os.replace(part, path)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror}): {size / 1e6:.0f} MB are needed there") from error


def write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())

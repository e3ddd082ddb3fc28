"""ONNX Runtime: sessions, timing and placement. The only importer of onnxruntime."""

from __future__ import annotations

import ctypes
import json
import platform
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from onnx_lowrank.types import LowRankError

Feeds = Mapping[str, np.ndarray]

CPU = "CPUExecutionProvider"

OPTIMIZED, WEIGHTS = "optimized.onnx", "weights"
"""Names of the files with the optimised graph of a profiled session, and with its weights."""

BLOCKS = {"avx512f": 16}
"""Channels that ONNX Runtime's blocked convolution kernels work on at a time, by processor flag; 8 otherwise."""


@dataclass(frozen=True)
class RunSettings:
    """What a session runs on.

    Parameters
    ----------
    provider
        Name of an execution provider, in full or without ``ExecutionProvider``.
    threads
        Threads of one operator; 0 leaves it to the runtime.
    optimize
        False turns every graph optimisation off.
    spin
        False lets threads sleep between runs: slower by microseconds, and the cores are free for other work.
    """

    provider: str = CPU
    threads: int = 1
    optimize: bool = True
    spin: bool = True

    @property
    def provider_name(self) -> str:
        """Full name of the provider, as this build of ONNX Runtime spells it.

        Raises
        ------
        LowRankError
            Where this build does not have it. ONNX Runtime itself would run on the CPU with a warning only.
        """
        have = ort.get_available_providers()
        for name in have:
            if self.provider.lower() in (name.lower(), name.lower().removesuffix("executionprovider")):
                return name
        raise LowRankError(
            f"execution provider '{self.provider}' is not in this build of ONNX Runtime: one of {', '.join(have)} was expected"
        )


class Session:
    """A model ready to run."""

    def __init__(
        self,
        model: str | Path | bytes,
        settings: RunSettings | None = None,
        *,
        folder: Path | None = None,
        profile: Path | None = None,
    ) -> None:
        """Load `model`; external data of bytes is looked for in `folder`. With `profile`, see :func:`profile_nodes`.

        Raises
        ------
        LowRankError
            Where ONNX Runtime refuses the model.
        """
        settings = settings or RunSettings()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
        options.log_severity_level = 4  # errors come back as exceptions
        if not settings.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not settings.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
            options.optimized_model_filepath = str(profile / OPTIMIZED)
            # its weights are of no interest, and no proto holds more than 2 GB of them
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "64")
        name = settings.provider_name
        source = str(model) if isinstance(model, Path) else model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._session = ort.InferenceSession(source, options, providers=[name] if name == CPU else [name, CPU])
        except Exception as error:  # onnxruntime raises types of its own, one for each status
            raise LowRankError(f"ONNX Runtime cannot load the model: {_one_line(error)}") from error
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Values of the outputs (all of them by default).

        Raises
        ------
        LowRankError
            Where the model fails on these feeds.
        """
        try:
            return self._session.run(list(outputs) if outputs else None, dict(feeds))
        except Exception as error:
            shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds.items())
            raise LowRankError(
                f"the model does not run on inputs {shapes}: {_one_line(error)}; give --input-shape or other data"
            ) from error

    def end_profile(self) -> Path:
        """Stop profiling, and the file that was written."""
        return Path(self._session.end_profiling())

    @property
    def placement(self) -> dict[str, int]:
        """How many nodes of the optimised graph each provider runs, as the session itself says.

        Empty before ONNX Runtime 1.24, which does not say; Python 3.10 has no later one than 1.23.
        """
        count: dict[str, int] = {}
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return count
        for part in self._session.get_provider_graph_assignment_info():
            count[part.ep_name] = count.get(part.ep_name, 0) + len(part.get_nodes())
        return count


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def give_back_memory() -> None:
    """Return what was freed to the system. glibc keeps blocks under 32 MiB, which is most of a large model's weights."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another system, which has its own way
        return


def available_providers() -> tuple[str, ...]:
    """Execution providers in this build of ONNX Runtime: names, not yet a proof that they work."""
    return tuple(ort.get_available_providers())


def known_providers() -> tuple[str, ...]:
    """Every execution provider that ONNX Runtime has a name for."""
    return tuple(ort.get_all_providers())


def version() -> str:
    """Version of ONNX Runtime."""
    return str(ort.__version__)


def block_size() -> int:
    """Channels to which ranks are aligned for the CPU of this machine."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the size that both kinds of kernel divide by
        return 16
    return next((size for flag, size in BLOCKS.items() if flag in flags), 8)


def tensor_shapes(session: Session, feeds: Feeds, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that the model returns, by running it."""
    wanted = [name for name in names if name in session.outputs]
    if not wanted:
        return {}
    return {name: np.shape(value) for name, value in zip(wanted, session.run(feeds, wanted), strict=True)}


@dataclass(frozen=True)
class Timing:
    """Times of two sessions on the same feeds, in turn.

    Parameters
    ----------
    first_ms, second_ms
        One number for each round, in milliseconds.
    """

    first_ms: np.ndarray
    second_ms: np.ndarray

    @property
    def speedup(self) -> float:
        """Median over the rounds of (first / second)."""
        return float(np.median(self.first_ms / self.second_ms))

    @property
    def speedup_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the median ratio, from its order statistics: no assumption on the noise."""
        ratios = np.sort(self.first_ms / self.second_ms)
        n = len(ratios)
        # the rank of the median is binomial(n, 1/2): mean n/2, standard deviation sqrt(n)/2
        # and as many ratios are left out above as below, so that the models exchanged give the reciprocals
        low = max(int(np.floor((n - 1) / 2 - 0.98 * np.sqrt(n))), 0)
        return float(ratios[low]), float(ratios[n - 1 - low])


def time_pair(first: Session, second: Session, feeds: Feeds, *, rounds: int = 50, seconds: float = 10.0) -> Timing:
    """Run two sessions in turn and time each run; who goes first alternates, so that neither inherits a warm cache.

    Parameters
    ----------
    rounds
        Most rounds after the warm-up.
    seconds
        Stop after this long once there are ten rounds.
    """
    warm_up = 5 if _seconds(first, feeds) < 1 else 1
    for _ in range(warm_up):
        first.run(feeds)
        second.run(feeds)
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < rounds and (len(times) < 10 or time.perf_counter() - start < seconds):
        if len(times) % 2:
            late = _seconds(second, feeds)
            times.append((_seconds(first, feeds), late))
        else:
            times.append((_seconds(first, feeds), _seconds(second, feeds)))
    values = np.array(times) * 1e3
    return Timing(values[:, 0], values[:, 1])


@dataclass(frozen=True)
class Profile:
    """Where the time of one run of a model goes.

    Parameters
    ----------
    node_ms
        Time of each node of the optimised graph.
    reference_ms
        Time of one whole run of the session that ran in turn with it: what drifts of the machine's speed show in.
    optimized
        File of the optimised graph, without its weights.
    """

    node_ms: dict[str, float]
    reference_ms: float
    optimized: Path


def profile_nodes(
    model: Path,
    reference: Session,
    feeds: Feeds,
    settings: RunSettings,
    folder: Path,
    *,
    rounds: int = 40,
    seconds: float = 0.5,
) -> Profile:
    """Time every node of a model in its place in the whole, in turn with runs of `reference`.

    Parameters
    ----------
    folder
        For the files that ONNX Runtime writes; exists already.
    rounds, seconds
        Stop after so many runs, or after so long once there are five.
    """
    session = Session(model, settings, profile=folder)
    for _ in range(WARM_UP):
        session.run(feeds)
        reference.run(feeds)
    waits: list[float] = []
    start = time.perf_counter()
    while len(waits) < rounds and (len(waits) < 5 or time.perf_counter() - start < seconds):
        waits.append(_seconds(reference, feeds))
        session.run(feeds)
    times: dict[str, list[float]] = {}
    for event in json.loads(session.end_profile().read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL_TIME):
            times.setdefault(name.removesuffix(_KERNEL_TIME), []).append(event["dur"])
    (folder / WEIGHTS).unlink(missing_ok=True)
    spent = {name: typical(values[WARM_UP:]) / 1e3 for name, values in times.items()}
    return Profile(spent, typical(waits) * 1e3, folder / OPTIMIZED)


WARM_UP = 2
"""Runs of a profiled session before those that count."""

_KERNEL_TIME = "_kernel_time"


def typical(times: Sequence[float] | np.ndarray) -> float:
    """Mean of the three quarters that took least: the rest were disturbed.

    Examples
    --------
    >>> typical([1.0, 2.0, 3.0, 90.0])
    2.0
    """
    kept = np.sort(times)[: max(1, 3 * len(times) // 4)]
    return float(kept.mean()) if len(kept) else 0.0


def processor() -> str:
    """What this machine calls its processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _seconds(session: Session, feeds: Feeds) -> float:
    start = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - start


def probe(provider: str, model: bytes, feeds: Feeds) -> str:
    """Whether a provider really runs something here: `model` on it, and the placement that the session reports."""
    try:
        session = Session(model, RunSettings(provider))
        session.run(feeds)
    except LowRankError as error:
        return f"does not work: {error}"
    placed = session.placement
    if placed.get(provider):
        return "works"
    if not placed:
        return "loads and runs, but this version of ONNX Runtime does not say where"
    return f"loads, but ran nothing here (all on {', '.join(placed)})"

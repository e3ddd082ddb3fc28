"""Sessions of ONNX Runtime, and where their nodes run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort

from onnx_lowrank.runtime.providers import (
    CPU,
    fell_back,
    find_provider,
    known_providers,
    named,
    needs,
    one_line,
    simulated,
    use_provider,
)
from onnx_lowrank.types import LowRankError

Feeds = Mapping[str, np.ndarray]

OPTIMIZED, WEIGHTS = "optimized.onnx", "weights"
"""Names of the files with the optimised graph of a profiled session, and with its weights."""


@dataclass(frozen=True)
class RunSettings:
    """What a session runs on.

    Parameters
    ----------
    provider
        Name of an execution provider, in full or without ``ExecutionProvider``.
    options
        Of the provider: pairs of a key and a value.
    libraries
        Pairs of a name and a path: libraries of providers to register.
    sizes
        Pairs of a name of an axis and its size: what compiles a model wants fixed ones.
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
    options: tuple[tuple[str, str], ...] = ()
    libraries: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def provider_name(self) -> str:
        """Full name of the provider, where ONNX Runtime has a name for it."""
        return named(self.provider, known_providers()) or self.provider


class Placed:
    """What can be said of a session once it is known where its nodes are."""

    provider: str
    """Full name of what it was opened for."""

    @property
    def placement(self) -> dict[str, int]:
        """How many nodes each provider runs; empty where that is not known."""
        raise NotImplementedError

    @property
    def fallback(self) -> str:
        """What is to be said of nodes that the provider asked for does not run; empty where it runs all."""
        return fell_back(self.provider, self.placement)

    @property
    def runs_there(self) -> bool:
        """Whether the session says that the provider asked for runs something: only then a time is one of it."""
        return self.provider == CPU or self.placement.get(self.provider, 0) > 0

    def check_times(self) -> None:
        """See that times of this session are those of the provider asked for, on its device.

        Raises
        ------
        LowRankError
            Where the CPU runs everything, or a simulator does.
        """
        why = simulated(self.provider) or ("" if self.runs_there else f"{self.fallback}{needs(self.provider)}")
        if why:
            raise LowRankError(f"the latency asked for cannot be measured: {why}; give a budget on macs or params")


class Session(Placed):
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
            Where ONNX Runtime refuses the model, or the provider is absent or fails: nothing is retried on the CPU.
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
        for axis, size in settings.sizes:
            options.add_free_dimension_override_by_name(axis, size)
        self.provider = find_provider(settings.provider, settings.libraries)
        source = str(model) if isinstance(model, Path) else model
        try:
            chosen = use_provider(options, self.provider, dict(settings.options))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # by default a provider that fails is exchanged for the CPU, without a word to the caller
                self._session = ort.InferenceSession(source, options, enable_fallback=0, **chosen)
        except LowRankError:
            raise
        except Exception as error:  # onnxruntime raises types of its own, one for each status
            wanting = (
                "" if settings.options else needs(self.provider)
            )  # with options it was set up by somebody who knows
            raise LowRankError(
                f"ONNX Runtime cannot load the model{self._where}: {one_line(error)}{wanting}"
            ) from error
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
                f"the model does not run{self._where} on inputs {shapes}: {one_line(error)}; give --input-shape or other data"
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

    @property
    def _where(self) -> str:
        return "" if self.provider == CPU else f" on {self.provider}"


class Runs(Protocol):
    """A model on ONNX Runtime, whole or in parts."""

    outputs: tuple[str, ...]

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Values of the outputs."""


def tensor_shapes(session: Runs, feeds: Feeds, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that the model returns, by running it."""
    wanted = [name for name in names if name in session.outputs]
    if not wanted:
        return {}
    return {name: np.shape(value) for name, value in zip(wanted, session.run(feeds, wanted), strict=True)}


def probe(settings: RunSettings, model: bytes, feeds: Feeds) -> str:
    """Whether a provider really runs something here: `model` on it, and the placement that the session reports."""
    try:
        session = Session(model, settings)
        session.run(feeds)
    except LowRankError as error:
        return f"does not work: {error}"
    placed = session.placement
    if placed.get(session.provider):
        return "works" if not session.fallback else f"works in part: {session.fallback}"
    if not placed:
        return "loads and runs, but this version of ONNX Runtime does not say where"
    return f"loads, but ran nothing here (all on {', '.join(placed)})"

"""The report as data; JSON is this, and text is a rendering of it."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from onnx_lowrank import runtime
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.runtime import Partitions
from onnx_lowrank.types import Skip
from onnx_lowrank.verification.verify import Accuracy, Latency


@dataclass(frozen=True)
class Size:
    """A model in numbers.

    Parameters
    ----------
    macs
        Multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for one sample.
    params
        Stored elements, shared ones once.
    size_bytes
        On disk, data beside the model included.
    """

    macs: int
    params: int
    size_bytes: int


@dataclass(frozen=True)
class BudgetResult:
    """What was asked for, what was reached; and what the plan foretold, where it is something to be measured.

    Parameters
    ----------
    metric
        ``macs``, ``params``, ``size``, ``latency`` or ``drop``.
    asked, reached
        Shares of the original; of ``drop``, the most that may be lost, and the bound on what was.
    met
        Whether that is enough.
    predicted
        What the plan foretold; None where the plan knows it exactly.
    measured
        False where the device that it is about is not here: what the plan foretold is all that is known.
    """

    metric: str
    asked: float
    reached: float
    met: bool
    predicted: float | None = None
    measured: bool = True


@dataclass(frozen=True)
class TargetResult:
    """What a target would make of both models, told without it.

    Parameters
    ----------
    name
        Key of ``TARGETS``.
    partitions
        The parts that it takes the original in (``before``), and the result (``after``).
    """

    name: str
    partitions: dict[str, Partitions]

    @property
    def met(self) -> bool:
        """Whether the result is cut into no more parts, and no smaller share of it is taken."""
        return self.partitions["after"].no_worse_than(self.partitions["before"])


@dataclass(frozen=True)
class Step:
    """A plan that was carried out and measured on the way to the result.

    Parameters
    ----------
    macs, params, size_bytes
        Counted, as shares of the original's.
    latency
        Share of the original's latency that the plan foretold; None where no plan was made by time.
    accuracy, drop, drop_upper_95
        As in :class:`~onnx_lowrank.verification.verify.Accuracy`.
    chosen
        Whether this is the result.
    """

    macs: float
    params: float
    size_bytes: float
    latency: float | None
    accuracy: float
    drop: float
    drop_upper_95: float
    chosen: bool = False


@dataclass(frozen=True)
class Report:
    """Everything that was done to a model and what came of it.

    Parameters
    ----------
    original, compressed
        Counted on the two models themselves.
    layers
        The layers that were decomposed.
    skips
        The nodes left alone, each with its reason.
    budgets
        Asked and reached.
    accuracy, latency
        Measured side by side; empty where nothing was verified.
    seconds
        Time spent, by stage.
    environment
        Versions and machine.
    notes
        What the user should know: assumptions made, what was given up, what to do next.
    config
        The options, as asked for.
    unchanged
        True where the result is the model that was given.
    targets
        How the target asked for would cut both models, where that can be told without it.
    search
        The plans that were carried out and measured, in their order.
    """

    original: Size
    compressed: Size
    layers: tuple[LayerReport, ...]
    skips: tuple[Skip, ...]
    budgets: tuple[BudgetResult, ...]
    accuracy: Accuracy | None
    latency: tuple[Latency, ...]
    seconds: dict[str, float]
    environment: dict[str, str]
    notes: tuple[str, ...]
    unchanged: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    targets: tuple[TargetResult, ...] = ()
    search: tuple[Step, ...] = ()

    @property
    def error_of(self) -> str:
        """What the errors of layers are of: their outputs where they were fitted to samples, their kernels otherwise."""
        return "output" if any(layer.fitted for layer in self.layers) else "kernel"

    @property
    def met(self) -> bool:
        """Whether everything asked for was reached, with outputs that are numbers."""
        return not self.unmet

    @property
    def unmet(self) -> tuple[str, ...]:
        """What was not reached, in words."""
        missed = [
            f"{b.metric} {b.reached:.4g} {'was reached' if b.measured else 'is predicted'}, {b.asked:g} asked for"
            for b in self.budgets
            if not b.met
        ]
        if self.accuracy and self.accuracy.broken:
            missed.append(f"{self.accuracy.broken} sample(s) give NaN or infinity")
        missed += [
            f"target {target.name} cuts the result into more parts, or takes less of it, than the original"
            for target in self.targets
            if not target.met
        ]
        return tuple(missed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: plain values, and null where a figure is not a number."""
        data: dict[str, Any] = {"version": package_version(), **asdict(self), "met": self.met}
        return plain(data)


def by_reason(skips: Sequence[Skip]) -> list[tuple[str, list[Skip]]]:
    """What was left alone, by reason, the commonest first."""
    found: dict[str, list[Skip]] = {}
    for skip in skips:
        found.setdefault(skip.reason, []).append(skip)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def plain(value: Any) -> Any:
    """Lists and dicts of plain values; null for what is not a number."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def package_version(name: str = "onnx-lowrank") -> str:
    """Version of a package, by default this one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def environment() -> dict[str, str]:
    """Versions of what computes, and the processor."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "processor": runtime.processor()}
    found["onnxruntime"] = runtime.version()  # by its own word: it is installed under other names, one for each device
    return found | {name: package_version(name) for name in ("onnx", "numpy", "scipy", "onnx-graphsurgeon")}

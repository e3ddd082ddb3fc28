"""Smaller, faster ONNX models by low-rank decomposition, after training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_lowrank import budgets, decompositions, ranks
    from onnx_lowrank.config import Config, make_config
    from onnx_lowrank.integrations.calibration import CalibrationReader
    from onnx_lowrank.pipeline import analyze, apply, bundle, compress, inspect, providers, verify
    from onnx_lowrank.report.data import BudgetResult, Report
    from onnx_lowrank.report.results import Inspection, Result, Verification
    from onnx_lowrank.rewriting.rewrite import LayerReport
    from onnx_lowrank.types import Budget, Candidate, Cost, LowRankError, Plan, Skip
    from onnx_lowrank.verification.verify import Accuracy, Latency

__all__ = [
    "Accuracy",
    "Budget",
    "BudgetResult",
    "CalibrationReader",
    "Candidate",
    "Config",
    "Cost",
    "Inspection",
    "Latency",
    "LayerReport",
    "LowRankError",
    "Plan",
    "Report",
    "Result",
    "Skip",
    "Verification",
    "analyze",
    "apply",
    "budgets",
    "bundle",
    "compress",
    "decompositions",
    "inspect",
    "make_config",
    "providers",
    "ranks",
    "verify",
]

_PLACES = {
    "config": ("Config", "make_config"),
    "integrations.calibration": ("CalibrationReader",),
    "pipeline": ("analyze", "apply", "bundle", "compress", "inspect", "providers", "verify"),
    "report.data": ("BudgetResult", "Report"),
    "report.results": ("Inspection", "Result", "Verification"),
    "rewriting.rewrite": ("LayerReport",),
    "types": ("Budget", "Candidate", "Cost", "LowRankError", "Plan", "Skip"),
    "verification.verify": ("Accuracy", "Latency"),
}
"""Module -> names. Each is imported when it is asked for: a process that works on layers needs numpy and scipy only."""


def __getattr__(name: str) -> Any:
    if name in ("budgets", "decompositions", "ranks"):
        return import_module(f"{__name__}.{name}")
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

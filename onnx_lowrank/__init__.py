"""Smaller, faster ONNX models by low-rank decomposition, after training."""

from onnx_lowrank import budgets, decompositions, ranks
from onnx_lowrank.config import Config, make_config
from onnx_lowrank.integrations.calibration import CalibrationReader
from onnx_lowrank.pipeline import analyze, apply, bundle, compress, inspect, verify
from onnx_lowrank.report.data import Report
from onnx_lowrank.report.results import Inspection, Result, Verification
from onnx_lowrank.types import Budget, Candidate, Cost, LowRankError, Plan, Skip

__all__ = [
    "Budget",
    "CalibrationReader",
    "Candidate",
    "Config",
    "Cost",
    "Inspection",
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
    "ranks",
    "verify",
]

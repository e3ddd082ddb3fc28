"""The ONNX checker, by path, so that models of any size pass."""

from __future__ import annotations

from pathlib import Path

import onnx


def check_model(path: Path) -> str | None:
    """What onnx.checker objects to in the model at `path`; None where it is valid."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return " ".join(str(error).split())
    return None

"""Training on the ONNX graph itself: the only importer of torch (extra ``finetune``)."""

from __future__ import annotations

from importlib.util import find_spec

from onnx_lowrank.types import LowRankError


def require_torch() -> None:
    """See that there is an engine to train with.

    Raises
    ------
    LowRankError
        Where torch is not installed.
    """
    if find_spec("torch") is None:
        raise LowRankError("training needs torch, which is not installed: pip install 'onnx-lowrank[finetune]'")

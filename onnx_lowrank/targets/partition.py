"""Parts that a target would take a model in, told without the device."""

from __future__ import annotations

import tempfile
from pathlib import Path

from onnx_lowrank.graph.fixed import fixed, inferred
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.save import save
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.runtime import OpList, Partitions, check_partitions, simplify


def count_partitions(model: Model, sizes: Shapes, ops: OpList) -> Partitions:
    """Parts of `model` at inputs of `sizes`, once constants and BatchNormalization are folded: what a provider sees.

    Raises
    ------
    LowRankError
        Where ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        given, seen = Path(folder) / "model.onnx", Path(folder) / "seen.onnx"
        save(fixed(model, sizes), given)
        simplify(given, seen)
        return check_partitions(inferred(seen), ops)

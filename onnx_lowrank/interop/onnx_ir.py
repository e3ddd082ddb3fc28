"""onnx-ir models at the public boundary, for pipelines that already hold one; needs the extra ``onnx-ir``."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from onnx_lowrank.types import LowRankError


def accepts(model: Any) -> bool:
    return isinstance(model, ir.Model)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a ModelProto that holds all of its initializers: only the model knows the folder of those in files.

    Raises
    ------
    LowRankError
        Where a file of its initializers cannot be read.
    """
    try:
        return ir.to_proto(ir.external_data.load_to_model(model.clone()))
    except OSError as error:
        raise LowRankError(
            f"initializers of the onnx-ir Model given cannot be read ({error}): load it again"
        ) from error


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)

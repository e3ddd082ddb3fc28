"""onnx-graphsurgeon graphs at the public boundary, for pipelines that already hold one."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_graphsurgeon as gs


def accepts(model: Any) -> bool:
    return isinstance(model, gs.Graph)


def to_proto(model: gs.Graph) -> onnx.ModelProto:
    """The graph as a ModelProto of a format version that every current ONNX Runtime reads."""
    proto = gs.export_onnx(model, do_type_check=False)
    proto.ir_version = min(proto.ir_version, 10)
    return proto


def from_proto(proto: onnx.ModelProto) -> gs.Graph:
    return gs.import_onnx(proto)

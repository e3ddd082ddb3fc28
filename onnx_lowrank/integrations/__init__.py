"""Models of other libraries, in and out."""

from __future__ import annotations

from typing import Any

import onnx_lowrank.integrations.graphsurgeon as graphsurgeon

KINDS = (graphsurgeon,)
"""Modules with ``accepts(model)``, ``to_proto(model)`` and ``from_proto(proto)``."""


def to_proto(model: Any) -> Any:
    """`model` as a ModelProto where a library here knows its kind; paths and ModelProtos as they are."""
    return next((kind.to_proto(model) for kind in KINDS if kind.accepts(model)), model)


def from_proto(proto: Any, like: Any) -> Any:
    """A ModelProto as the kind of model that `like` is."""
    return next((kind.from_proto(proto) for kind in KINDS if kind.accepts(like)), proto)

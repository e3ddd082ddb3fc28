"""Models of other libraries, in and out."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

KINDS = {"onnx_graphsurgeon": "graphsurgeon", "onnx_ir": "onnx_ir"}
"""Library -> module here, with ``accepts(model)``, ``to_proto(model)`` and ``from_proto(proto)``."""


def _kind_of(model: Any) -> ModuleType | None:
    """The module for a model; a library that nobody has imported cannot have made it."""
    here = [import_module(f"{__name__}.{module}") for library, module in KINDS.items() if sys.modules.get(library)]
    return next((kind for kind in here if kind.accepts(model)), None)


def to_proto(model: Any) -> Any:
    """`model` as a ModelProto where a library here knows its kind; paths and ModelProtos as they are."""
    kind = _kind_of(model)
    return model if kind is None else kind.to_proto(model)


def from_proto(proto: Any, like: Any) -> Any:
    """A ModelProto as the kind of model that `like` is."""
    kind = _kind_of(like)
    return proto if kind is None else kind.from_proto(proto)

"""Models whose tensors all have their sizes: what tools for mobile targets ask for."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.shapes import Shapes, set_shape, unshaped


def fixed(model: Model, sizes: Shapes) -> Model:
    """A copy with inputs of `sizes`; what was said of the sizes of other tensors is left open."""
    copy = model.copy()
    for value in copy.graph.input:
        if value.name in sizes:
            set_shape(value, sizes[value.name])
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.CopyFrom(unshaped(output.type))
    return copy


def inferred(path: Path) -> onnx.ModelProto:
    """The model at `path` with the sizes of all tensors that inference can tell; its data files are not read."""
    proto = onnx.load(str(path), load_external_data=False)
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)

"""The table of operators: name -> torch function. Adding one is a line in the file of its kind."""

from __future__ import annotations

from onnx_lowrank.finetune.ops.elementwise import ELEMENTWISE
from onnx_lowrank.finetune.ops.layers import LAYERS
from onnx_lowrank.finetune.ops.node import Node, Op, Unsupported, to_tensor
from onnx_lowrank.finetune.ops.reduce import REDUCE
from onnx_lowrank.finetune.ops.resize import RESIZE
from onnx_lowrank.finetune.ops.shapes import SHAPES

OPS: dict[str, Op] = {**ELEMENTWISE, **LAYERS, **REDUCE, **RESIZE, **SHAPES}

__all__ = ["OPS", "Node", "Op", "Unsupported", "to_tensor"]

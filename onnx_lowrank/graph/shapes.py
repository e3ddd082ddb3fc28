"""Sizes of every tensor for one sample: by ONNX shape inference, on a copy without the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lowrank.graph.model import Model
from onnx_lowrank.types import InputSpec, LowRankError

Shapes = dict[str, tuple[int, ...]]

SMALL = 4096
"""Constants of up to this many elements keep their values: the targets of Reshape and their like."""

LONGEST_LIST = 1 << 20
"""Longest tensor of one axis with which computed shapes are inferred: it takes 100 bytes and more for each element."""

ASSUMED_PICTURE, ASSUMED_LENGTH = 224, 128
"""Taken for an unknown height or width, and for any other unknown size, where the user says nothing."""


def model_inputs(model: Model) -> tuple[InputSpec, ...]:
    """What a user has to feed (initializers listed as inputs are not).

    Raises
    ------
    LowRankError
        For an input that is not a tensor.
    """
    stored = {t.name for t in model.graph.initializer}
    return tuple(_input(value) for value in model.graph.input if value.name not in stored)


@dataclass(frozen=True)
class Tensor:
    """An input or an output as it is declared: its type in ONNX's words, `shape` None where that is not said."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        sizes = [] if self.shape is None else ["?" if size is None else str(size) for size in self.shape]
        return f"{self.name} {self.dtype}" + ("" if self.shape is None else f" ({', '.join(sizes)})")


def declared(model: Model) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs that a user feeds, and the outputs, of any type."""
    stored = {t.name for t in model.graph.initializer}
    inputs = (value for value in model.graph.input if value.name not in stored)
    return tuple(map(_declared, inputs)), tuple(map(_declared, model.graph.output))


def _declared(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return Tensor(value.name, "of no type" if kind is None else kind.removesuffix("_type").replace("_", " "), None)
    tensor = value.type.tensor_type
    known = tensor.elem_type in onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else f"type {tensor.elem_type}"
    named = {"float": "float32", "double": "float64"}.get(name, name)
    return Tensor(value.name, named, _sizes(tensor.shape) if tensor.HasField("shape") else None)


def _sizes(shape: onnx.TensorShapeProto) -> tuple[int | str | None, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in shape.dim)


def _input(value: onnx.ValueInfoProto) -> InputSpec:
    if not value.type.HasField("tensor_type"):
        raise LowRankError(f"input '{value.name}' is not a tensor: only models whose inputs are tensors can be fed")
    tensor = value.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError as error:
        raise LowRankError(f"input '{value.name}' has a type of number {error}, which ONNX does not have") from error
    return InputSpec(value.name, _sizes(tensor.shape), dtype)


def sample_shapes(inputs: Sequence[InputSpec], given: Mapping[str, Sequence[int]]) -> tuple[Shapes, tuple[str, ...]]:
    """Concrete sizes of each input for one sample, and notes on what had to be assumed.

    Raises
    ------
    LowRankError
        Where `given` names no input of the model or disagrees with a fixed size.
    """
    known = {i.name: i for i in inputs}
    for name, shape in given.items():
        if name not in known:
            raise LowRankError(f"input shape given for '{name}': the model's inputs are {', '.join(known) or 'none'}")
        fixed = known[name].shape or (None,) * len(shape)  # no axes: a scalar, or of a rank that is not said
        if len(fixed) != len(shape) or any(isinstance(f, int) and f != s for f, s in zip(fixed, shape, strict=True)):
            raise LowRankError(f"input shape {_text(shape)} given for '{name}': the model expects {_text(fixed)}")
    shapes: Shapes = {i.name: tuple(given[i.name]) for i in inputs if i.name in given}
    # an axis of the same name has the same size wherever it occurs
    named = {s: n for i in inputs for s, n in zip(i.shape, shapes.get(i.name, ()), strict=False) if isinstance(s, str)}
    notes = []
    for item in inputs:
        if item.name in given:
            continue
        guess = [_assumed(axis, len(item.shape)) for axis in range(len(item.shape))]
        shapes[item.name] = tuple(
            s if isinstance(s, int) else g if s is None else named.setdefault(s, g)
            for s, g in zip(item.shape, guess, strict=True)
        )
        if any(not isinstance(s, int) for s in item.shape[1:]):
            notes.append(
                f"input '{item.name}' has unknown sizes {_text(item.shape)}, taken as {_text(shapes[item.name])}: "
                f"give --input-shape {item.name}:{','.join(map(str, shapes[item.name]))} with yours"
            )
    return {item.name: shapes[item.name] for item in inputs}, tuple(notes)


def _assumed(axis: int, ndim: int) -> int:
    if axis == 0:
        return 1
    return ASSUMED_PICTURE if ndim >= 4 and axis >= 2 else ASSUMED_LENGTH


def _text(shape: Iterable[object]) -> str:
    return "[" + ", ".join("?" if s is None else str(s) for s in shape) + "]"


def infer(model: Model, inputs: Shapes) -> Shapes:
    """Shapes of the tensors of the main graph that inference can tell for inputs of the shapes given.

    Weights are replaced by their types, so that the cost does not depend on the model's size.
    """
    bare = _bare(model, inputs)
    shapes: Shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes |= {tensor.values.name: tuple(tensor.dims) for tensor in model.graph.sparse_initializer} | dict(inputs)
    shapes |= _shapes(_inferred(bare, values=False))
    # values of lists are followed number by number, and any tensor of one axis counts as a list
    if all(len(shape) != 1 or shape[0] <= LONGEST_LIST for shape in shapes.values()):
        shapes |= _shapes(_inferred(bare, values=True))
    return shapes


def element_types(model: Model) -> dict[str, int]:
    """Types of the tensors of the main graph, by ONNX's numbers, as far as inference can tell."""
    bare = _bare(model, {})
    return {
        value.name: value.type.tensor_type.elem_type for value in [*bare.graph.input, *_inferred(bare, values=False)]
    }


def _bare(model: Model, inputs: Shapes) -> onnx.ModelProto:
    """The main graph without its large weights, for inputs of the shapes given."""
    source = model.graph
    stored = {t.name: t for t in source.initializer}
    sparse = {t.values.name: t for t in source.sparse_initializer}
    graph = onnx.GraphProto(name=source.name or "graph", node=source.node)
    for value in source.input:
        if value.name not in stored:
            graph.input.append(value)
            if value.name in inputs:
                set_shape(graph.input[-1], inputs[value.name])
    for tensor in stored.values():
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for name, tensor in sparse.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.values.data_type, tensor.dims))
    graph.output.extend(onnx.ValueInfoProto(name=o.name, type=unshaped(o.type)) for o in source.output)
    return onnx.ModelProto(
        # inputs with an initializer of their own are allowed from version 4 of the format
        ir_version=max(model.proto.ir_version, 4),
        opset_import=model.proto.opset_import,
        functions=model.proto.functions,
        graph=graph,
    )


def _inferred(model: onnx.ModelProto, *, values: bool) -> list[onnx.ValueInfoProto]:
    """What inference can tell of tensors; with `values` also where the numbers in a shape are computed."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=values).graph
    except Exception:  # the C++ side raises a type of its own for an operator it does not know
        return []
    return [*graph.value_info, *graph.output]


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> Shapes:
    shapes: Shapes = {}
    for value in values:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    return shapes


def set_shape(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    """Say that a tensor has this shape."""
    dims = value.type.tensor_type.shape.dim
    del dims[:]  # there may be none, where the rank is not said
    for size in shape:
        dims.add(dim_value=size)


def unshaped(kind: onnx.TypeProto) -> onnx.TypeProto:
    """The type without sizes, which would otherwise be merged with the ones asked for."""
    bare = onnx.TypeProto()
    bare.CopyFrom(kind)
    if bare.HasField("tensor_type"):
        bare.tensor_type.ClearField("shape")
    return bare


def with_outputs(model: Model, names: Iterable[str]) -> Model:
    """A copy that also returns the tensors called `names`, so that running it tells their sizes."""
    copy = model.copy()
    have = {o.name for o in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    return copy

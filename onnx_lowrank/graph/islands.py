"""What a layer becomes, as nodes and initializers: a small graph built with onnx-graphsurgeon.

Only these islands pass through graphsurgeon, never the user's model: an import and export of a whole model
loses metadata, annotations and sparse tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnx_lowrank.graph.model import attributes
from onnx_lowrank.types import Chain, ConvSpec, LowRankError, Stage


@dataclass(frozen=True)
class Island:
    """Nodes in the order they run, and the kernels that they read."""

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]


@dataclass(frozen=True)
class Naming:
    """Names of what is new, for a chain of n stages: n kernels, n - 1 tensors and n - 1 nodes.

    `parts` names what kernels are joined from, by the stage; such a kernel is a tensor that a node of its name makes.

    The last node keeps the name and the output of the node that it stands for, so that whatever refers to
    either still finds it.
    """

    kernels: tuple[str, ...]
    tensors: tuple[str, ...]
    nodes: tuple[str, ...]
    parts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def build_island(
    node: onnx.NodeProto,
    weight_input: int,
    chain: Chain,
    kernels: Sequence[np.ndarray],
    dtype: np.dtype,
    naming: Naming,
    opset: int,
    bias: np.ndarray | None = None,
) -> Island:
    """The replacement of `node` by `chain`.

    Parameters
    ----------
    node
        The node to replace: Conv, ConvTranspose, Gemm or MatMul.
    weight_input
        Which of its inputs is the kernel.
    kernels
        One array for each stage, shaped as the stage declares, in float64.
    dtype
        Of the kernel replaced: what the new ones are stored in.
    naming, opset
        Names of what is new, and the operator set of the model.
    bias
        In the place of the node's own; None keeps that.

    Raises
    ------
    LowRankError
        Where a kernel overflows `dtype`.
    """
    graph = gs.Graph(opset=opset)
    node = node if bias is None else _with_bias(node, bias_of(naming))
    stored = [_stored(kernel, dtype) for kernel in kernels]
    tensors = [gs.Variable(node.input[1 - weight_input])]
    tensors += [gs.Variable(name) for name in (*naming.tensors, node.output[0])]
    names = (*naming.nodes, node.name)
    steps = list(zip(chain, stored, naming.kernels, tensors[:-1], tensors[1:], names, strict=True))
    for index, (stage, kernel, kernel_name, source, target, name) in enumerate(steps):
        last = index == len(steps) - 1
        add = _CONVOLUTION if stage.spec.ndim else _PRODUCTS[node.op_type]
        joined = _joined(graph, stage, kernel, kernel_name, naming.parts[index]) if stage.parts else None
        step = _Step(source, target, kernel, kernel_name, name, weight_input, index == 0, last, joined)
        add(graph, node, stage.spec, step)
    graph.inputs, graph.outputs = [tensors[0]], [tensors[-1]]
    proto = gs.export_onnx(graph, do_type_check=False)
    initializers = [_cast(tensor, dtype) for tensor in proto.graph.initializer]
    if bias is not None:
        initializers.append(numpy_helper.from_array(bias.astype(dtype), bias_of(naming)))
    return Island(tuple(proto.graph.node), tuple(initializers))


def bias_of(naming: Naming) -> str:
    """Name of a bias that comes with the kernels of a chain: a kernel may be shared, but no tensor between two stages."""
    return f"{(naming.tensors or naming.kernels)[-1]}_bias"


def _with_bias(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    """The node with another bias, which a Gemm adds as it is: its `beta` is in it already."""
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    del changed.input[2:]
    changed.input.append(name)
    for index in reversed([i for i, a in enumerate(changed.attribute) if a.name == "beta"]):
        del changed.attribute[index]
    return changed


@dataclass(frozen=True)
class _Step:
    """One stage on its way into the island."""

    source: gs.Variable
    target: gs.Variable
    kernel: np.ndarray
    kernel_name: str
    name: str
    weight_input: int
    first: bool
    last: bool
    joined: gs.Variable | None = None


def _joined(graph: gs.Graph, stage: Stage, kernel: np.ndarray, name: str, parts: Sequence[str]) -> gs.Variable:
    """A kernel made of stored parts when the model is loaded: runtimes fold what follows from initializers alone."""
    axis = stage.parts[0].axis
    pieces = np.split(kernel, np.cumsum([part.ranks for part in stage.parts])[:-1], axis=axis)
    constants = [gs.Constant(part, np.ascontiguousarray(piece)) for part, piece in zip(parts, pieces, strict=True)]
    whole = gs.Variable(name)
    graph.layer(op="Concat", name=name, inputs=constants, outputs=[whole], attrs={"axis": axis})
    return whole


def _stored(kernel: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The kernel in the model's precision. bfloat16, which graphsurgeon cannot hold, waits in float32."""
    with np.errstate(over="ignore"):
        narrow = kernel.astype(dtype)
    wide = narrow.astype(np.float32) if narrow.dtype.name == "bfloat16" else narrow
    if not np.isfinite(wide).all():
        raise LowRankError(f"a kernel of the decomposition overflows {dtype}: use another method or a higher rank")
    return wide


def _cast(tensor: onnx.TensorProto, dtype: np.dtype) -> onnx.TensorProto:
    if dtype.name != "bfloat16" or tensor.data_type != onnx.TensorProto.FLOAT:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name)


def _bias(node: onnx.NodeProto, step: _Step) -> list[gs.Variable]:
    return [gs.Variable(node.input[2])] if step.last and len(node.input) > 2 and node.input[2] else []


def _convolution(graph: gs.Graph, node: onnx.NodeProto, spec: ConvSpec, step: _Step) -> None:
    attrs: dict[str, object] = {"kernel_shape": list(spec.kernel), "strides": list(spec.strides)}
    attrs |= {"dilations": list(spec.dilations), "group": spec.group}
    if spec.auto_pad == "NOTSET":
        attrs["pads"] = list(spec.pads)
    else:
        attrs["auto_pad"] = spec.auto_pad
    if any(spec.output_padding):
        attrs["output_padding"] = list(spec.output_padding)
    kernel = step.joined or gs.Constant(step.kernel_name, np.ascontiguousarray(step.kernel))
    graph.layer(
        op="ConvTranspose" if spec.transposed else "Conv",
        name=step.name,
        inputs=[step.source, kernel, *_bias(node, step)],
        outputs=[step.target],
        attrs=attrs,
    )


def _matmul(graph: gs.Graph, node: onnx.NodeProto, spec: ConvSpec, step: _Step) -> None:
    right = step.weight_input == 1
    kernel = gs.Constant(step.kernel_name, np.ascontiguousarray(step.kernel.T if right else step.kernel))
    inputs = [step.source, kernel] if right else [kernel, step.source]
    graph.layer(op="MatMul", name=step.name, inputs=inputs, outputs=[step.target])


def zero_of(kernel: str) -> str:
    """Name of the addend of a Gemm that adds nothing, by its kernel's."""
    return f"{kernel}_zero"


def _gemm(graph: gs.Graph, node: onnx.NodeProto, spec: ConvSpec, step: _Step) -> None:
    """transA belongs to the first product, alpha, beta and C to the last; transB stays as it was stored."""
    attrs = attributes(node)
    trans_b = bool("transB" in attrs and attrs["transB"].i)
    kept: dict[str, float] = {key: attrs[key].f for key in ("alpha", "beta") if step.last and key in attrs}
    source = step.source
    if step.first and "transA" in attrs and attrs["transA"].i:
        kept["transA"] = 1
    kernel = gs.Constant(step.kernel_name, np.ascontiguousarray(step.kernel if trans_b else step.kernel.T))
    if not kept and not step.last and not trans_b:
        graph.layer(op="MatMul", name=step.name, inputs=[source, kernel], outputs=[step.target])
        return
    bias = _bias(node, step)
    if not bias and graph.opset < 11:  # C became optional in opset 11; a zero broadcasts from opset 7
        bias = [gs.Constant(zero_of(step.kernel_name), np.zeros(1, step.kernel.dtype))]
    graph.layer(
        op="Gemm",
        name=step.name,
        inputs=[source, kernel, *bias],
        outputs=[step.target],
        attrs=kept | ({"transB": 1} if trans_b else {}),
    )


Adder = Callable[[gs.Graph, onnx.NodeProto, ConvSpec, _Step], None]
_CONVOLUTION: Adder = _convolution
_PRODUCTS: dict[str, Adder] = {"MatMul": _matmul, "Gemm": _gemm}

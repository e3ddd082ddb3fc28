"""Every node of a model that carries a kernel: a Layer that can be decomposed, or a Skip with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_lowrank.graph.constants import Constant, Constants
from onnx_lowrank.graph.kernels import Kernel
from onnx_lowrank.graph.model import Model, all_graphs, attributes, fresh_name, readers, subgraphs
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.types import ConvSpec, Cost, Layer, LowRankError, Skip

SUPPORTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

FLOATS = ("float32", "float64", "float16", "bfloat16")
"""Dtypes of kernels that are decomposed."""

PIECE = 1 << 18
"""Elements of a kernel looked at at a time."""

AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")

OTHERS = {
    "QLinearConv": "its kernel is quantised: decompose the float model, then quantise",
    "ConvInteger": "its kernel is quantised: decompose the float model, then quantise",
    "QLinearMatMul": "its weight is quantised: decompose the float model, then quantise",
    "MatMulInteger": "its weight is quantised: decompose the float model, then quantise",
    "MatMulNBits": "its weight is quantised: decompose the float model, then quantise",
    "FusedConv": "it was fused by a runtime: decompose the model as exported",
    "FusedMatMul": "it was fused by a runtime: decompose the model as exported",
    "FusedGemm": "it was fused by a runtime: decompose the model as exported",
    "Attention": "fused attention is not taken apart",
    "Einsum": "Einsum is not taken apart: export it as MatMul",
    "LSTM": "recurrent layers are not decomposed",
    "GRU": "recurrent layers are not decomposed",
    "RNN": "recurrent layers are not decomposed",
}
"""Operators with kernels that are left alone, and why."""


@dataclass(frozen=True)
class Place:
    """Position of a layer's node in ``graph.node``, and which of its inputs is the kernel."""

    position: int
    weight_input: int


@dataclass(frozen=True)
class Found:
    """Layers in the order of the graph, the nodes left alone, and where each layer is.

    Parameters
    ----------
    layers, skips
        What was found.
    places
        Where each layer is, by its name.
    """

    layers: tuple[Layer, ...]
    skips: tuple[Skip, ...]
    places: Mapping[str, Place]


class _Refusal(Exception):
    """Carries the reason out of the checks of one node."""


def find_layers(model: Model, shapes: Shapes) -> Found:
    """The layers of `model`.

    Parameters
    ----------
    model
        Its graph is read, not changed.
    shapes
        Shape of each tensor for one sample.

    Raises
    ------
    LowRankError
        Where a kernel holds NaN or infinity: no decomposition of it means anything.
    """
    constants = Constants(model)
    layers: list[Layer] = []
    skips: list[Skip] = []
    places: dict[str, Place] = {}
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        name = _unique(node, taken)
        if node.op_type in OTHERS:
            if any(constants.find(i) for i in node.input[1:] if i):
                skips.append(Skip(name, node.op_type, OTHERS[node.op_type]))
        elif _is_supported(node):
            try:
                _check_form(model, node)
                weight_input = _weight_input(node, constants)
                layers.append(_BUILDERS[node.op_type](node, name, weight_input, constants, shapes))
                places[name] = Place(position, weight_input)
            except _Refusal as refusal:
                skips.append(Skip(name, node.op_type, str(refusal)))
    skips.extend(_inside(model))
    return Found(_mark_shared(model, constants, layers, places), tuple(skips), places)


def _unique(node: onnx.NodeProto, taken: set[str]) -> str:
    """The node's name, or that of its first output where it has none of its own, with a number where that is taken."""
    return fresh_name(node.name if node.name and node.name not in taken else _label(node), taken)


def _label(node: onnx.NodeProto) -> str:
    return next((output for output in node.output if output), node.op_type)


def _check_form(model: Model, node: onnx.NodeProto) -> None:
    if len(node.input) < 2 or not node.output:
        raise _Refusal("it has too few inputs or outputs: the model is damaged")
    if node.op_type == "Gemm" and model.opset < 7:
        raise _Refusal("Gemm before opset 7 has a form of its own: convert the model to opset 7 or later")


def _inside(model: Model) -> list[Skip]:
    """Layers in the bodies of If, Loop, Scan and functions."""
    found = []
    for graph in list(all_graphs(model.graph))[1:]:
        found += [(n, "inside the body of an If, Loop or Scan: how often it runs is not known") for n in graph.node]
    for function in model.proto.functions:
        found += [(n, f"inside the function {function.name}: inline it first") for n in _nodes(function.node)]
    return [Skip(n.name or _label(n), n.op_type, why) for n, why in found if _is_supported(n)]


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """`nodes` and those in their bodies."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _nodes(graph.node)


def _is_supported(node: onnx.NodeProto) -> bool:
    return node.op_type in SUPPORTED and node.domain in ("", "ai.onnx")


def _weight(constants: Constants, name: str) -> tuple[Constant, np.ndarray]:
    """The constant kernel called `name` and its value, checked; the value is read again when it is used."""
    constant = constants.find(name)
    if constant is None:
        raise _Refusal("its weight is computed when the model runs")
    if constant.quantized:
        raise _Refusal(
            "its weight is quantised (DequantizeLinear): decompose the float model, then quantise; or give --dequantize"
        )
    if constant.overridable:
        raise _Refusal("its weight is also an input of the model, which a user may feed: make it a plain initializer")
    value = constant.read()
    if value.dtype.name not in FLOATS:
        raise _Refusal(f"its weight has type {value.dtype.name}: one of {', '.join(FLOATS)} was expected")
    if not _all_finite(value):
        raise LowRankError(
            f"weight '{name}' holds NaN or infinity: the model is damaged or did not train; export it again"
        )
    if value.size == 0:
        raise _Refusal("its weight is empty")
    return constant, value


def _all_finite(value: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, without an array of answers as large as `value`."""
    flat = value.ravel(order="K")
    return all(np.isfinite(flat[start : start + PIECE]).all() for start in range(0, flat.size, PIECE))


def _shape(shapes: Shapes, name: str, least: int) -> tuple[int, ...]:
    """The shape of an input, which has at least `least` axes; that of one of unknown rank may have been taken as ()."""
    if len(shapes.get(name, ())) < least:
        raise _Refusal("the size of its input is not known: give --input-shape")
    return shapes[name]


def _weight_input(node: onnx.NodeProto, constants: Constants) -> int:
    """Which input holds the kernel: the second, but a MatMul or a Gemm may have it on the left."""
    if node.op_type in ("MatMul", "Gemm") and not constants.find(node.input[1]) and constants.find(node.input[0]):
        return 0
    return 1


def _conv(node: onnx.NodeProto, name: str, side: int, constants: Constants, shapes: Shapes) -> Layer:
    constant, weight = _weight(constants, node.input[side])
    attrs = attributes(node)
    if "output_shape" in attrs:
        raise _Refusal("its padding follows from output_shape: export it with explicit pads")
    if weight.ndim < 3:
        raise _Refusal(f"its kernel has {weight.ndim} axes: at least 3 were expected")
    strides, pads, dilations, output_padding = (
        tuple(attrs[key].ints) if key in attrs else () for key in ("strides", "pads", "dilations", "output_padding")
    )
    auto_pad = attrs["auto_pad"].s.decode(errors="replace") if "auto_pad" in attrs else "NOTSET"
    group = attrs["group"].i if "group" in attrs else 1
    transposed = node.op_type == "ConvTranspose"
    lengths = {len(values) for values in (strides, dilations, output_padding)} | {len(pads) / 2}
    fits = lengths <= {0, weight.ndim - 2} and group >= 1 and not weight.shape[0] % group and auto_pad in AUTO_PADS
    kernel = tuple(attrs["kernel_shape"].ints) if "kernel_shape" in attrs else weight.shape[2:]
    if not fits or kernel != weight.shape[2:] or min((*strides, *dilations), default=1) < 1:
        raise _Refusal("its attributes do not fit its kernel: the model is damaged")
    spec = ConvSpec(weight.shape, strides, pads, dilations, group, auto_pad, transposed, output_padding)
    batch, _, *size = _shape(shapes, node.input[0], weight.ndim)
    return Layer(
        name, node.op_type, spec, constant.read, weight.dtype, tuple(size), batch, constant.root, bias=_has_bias(node)
    )


def _has_bias(node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _gemm(node: onnx.NodeProto, name: str, side: int, constants: Constants, shapes: Shapes) -> Layer:
    if side == 0:
        raise _Refusal("its first input is the weight: only a MatMul is decomposed in this form")
    constant, weight = _weight(constants, node.input[side])
    if weight.ndim != 2:
        raise _Refusal(f"its weight has {weight.ndim} axes: 2 were expected")
    attrs = attributes(node)
    read, spec = _matrix(constant.read, weight.shape, transpose=_reads_in_out(node, side))
    rows = _shape(shapes, node.input[0], 2)[-1 if "transA" in attrs and attrs["transA"].i else 0]
    return Layer(name, "Gemm", spec, read, weight.dtype, (), rows, constant.root, bias=_has_bias(node))


def _matmul(node: onnx.NodeProto, name: str, side: int, constants: Constants, shapes: Shapes) -> Layer:
    constant, weight = _weight(constants, node.input[side])
    if constants.find(node.input[1 - side]):
        raise _Refusal("both of its inputs are constant")
    if weight.ndim != 2:
        what = "a vector has nothing to factorise" if weight.ndim < 2 else "one matrix for each batch"
        raise _Refusal(f"its weight has {weight.ndim} axes ({what}): 2 were expected")
    read, spec = _matrix(constant.read, weight.shape, transpose=_reads_in_out(node, side))
    shape = _shape(shapes, node.input[1 - side], 1)
    if side == 1 or len(shape) == 1:
        rows = math.prod(shape[:-1])  # (..., M, K) @ (K, N)
    else:
        rows = math.prod(shape) // shape[-2]  # (M, K) @ (..., K, N)
    return Layer(name, "MatMul", spec, read, weight.dtype, (), rows, constant.root)


def _matrix(
    read: Callable[[], np.ndarray], shape: tuple[int, ...], *, transpose: bool
) -> tuple[Callable[[], np.ndarray], ConvSpec]:
    """A stored matrix as a kernel (out, in)."""
    if transpose:
        return lambda: read().T, ConvSpec(shape[::-1])
    return read, ConvSpec(shape)


def _reads_in_out(node: onnx.NodeProto, side: int) -> bool:
    """Whether a product reads its stored matrix as (in, out), and not as (out, in) like a kernel."""
    if node.op_type == "MatMul":
        return side == 1
    attrs = attributes(node)
    return node.op_type == "Gemm" and not ("transB" in attrs and attrs["transB"].i)


_BUILDERS = {"Conv": _conv, "ConvTranspose": _conv, "Gemm": _gemm, "MatMul": _matmul}


def _mark_shared(
    model: Model, constants: Constants, layers: list[Layer], places: Mapping[str, Place]
) -> tuple[Layer, ...]:
    """Say of each layer where its kernel is, and whether that stays when the layers that read it are decomposed alike."""
    count = readers(model.proto)
    forms: dict[str, set[object]] = {}
    kept: set[str] = set()
    kernels: dict[str, Kernel] = {}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer in layers:
        root, place = layer.weight_name, places[layer.name]
        node = model.graph.node[place.position]
        names = constants.chain(node.input[place.weight_input])
        turned = _reads_in_out(node, place.weight_input)
        kernels[layer.name] = Kernel(layer.read_weight, model, stored.get(names[0]), turned)
        # layers that read a kernel in the same form become the same chain; read in two forms, it stays
        forms.setdefault(root, set()).add((*names, _form(layer.spec), turned))
        alike = sum(1 for other in layers if other.weight_name == root)
        if count[names[0]] > alike or any(count[name] > 1 for name in names[1:]):
            kept.add(root)
    kept.update(root for root, seen in forms.items() if len(seen) > 1)
    return tuple(
        replace(layer, read_weight=kernels[layer.name], weight_kept=layer.weight_name in kept) for layer in layers
    )


def _form(spec: ConvSpec) -> object:
    """What the kernels of a chain depend on: see :func:`onnx_lowrank.decompositions.lift.chains`."""
    # a stage of a transposed convolution is a plain one or not, by its strides and pads
    return spec if spec.transposed else (spec.weight_shape, spec.group)


def model_cost(model: Model, shapes: Shapes) -> tuple[Cost, tuple[str, ...]]:
    """Cost of the whole model for one sample, and the nodes whose size is unknown and which are not counted.

    MACs are those of Conv, ConvTranspose, Gemm and MatMul in the main graph; parameters are the elements of
    all initializers and Constant nodes, stored ones once.
    """
    macs, unknown = 0, []
    for node in model.graph.node:
        if not _is_supported(node):
            continue
        try:
            macs += _node_macs(node, shapes)
        except (KeyError, IndexError):  # a size that is not known, or an input that is not there
            unknown.append(node.name or _label(node))
    return Cost(macs, _stored_elements(model)), tuple(unknown)


def _node_macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    data, weight, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    attrs = attributes(node)
    return math.prod(out) * data[-2 if "transA" in attrs and attrs["transA"].i else -1]


def sized_tensors(model: Model) -> list[str]:
    """Names of the tensors whose shapes :func:`model_cost` and :func:`find_layers` need."""
    nodes = [n for n in model.graph.node if _is_supported(n)]
    return sorted({t for n in nodes for t in [*n.input[:2], *n.output[:1]] if t})


def _stored_elements(model: Model) -> int:
    """Elements of stored tensors; sparse ones count whole, since runtimes make them dense."""
    total = 0
    for graph in all_graphs(model.graph):
        total += sum(math.prod(t.dims) for t in [*graph.initializer, *graph.sparse_initializer])
        for value in (a for node in graph.node if node.op_type == "Constant" for a in node.attribute):
            total += math.prod(value.t.dims) if value.name == "value" else len(value.floats)
            total += math.prod(value.sparse_tensor.dims) if value.name == "sparse_value" else 0
    return total

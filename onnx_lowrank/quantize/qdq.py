"""The nodes of quantisation, by onnxruntime.quantization; and what it adds made small."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from graphlib import TopologicalSorter
from heapq import heappop, heappush

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from onnx_lowrank.graph.constants import drop_unread, overridable, read_tensor
from onnx_lowrank.graph.model import Model, fresh_name, scopes, tensor_names, tensors_read
from onnx_lowrank.types import LowRankError

OPS = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool"),
    *("AveragePool", "GlobalAveragePool", "Resize", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Pad"),
)
"""Operators that run in eight bits, or pass on what does."""

LINEAR = ("Conv", "Gemm", "MatMul")
"""Those of them with a kernel."""

QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")

UNEVEN = 8.0
"""Times that a range may be larger than another of the same scale: three of its eight bits."""

OPSET = 13
"""The first with a scale for each channel."""


def check_unquantized(model: Model) -> None:
    """Refuse a model that is in eight bits already.

    Raises
    ------
    LowRankError
        With the way that works; and where it has no kernel of float32.
    """
    found = [node for graph in scopes(model.proto) for node in graph.node if node.op_type in QUANTIZED]
    if found:
        raise LowRankError(
            f"the model is quantised already ({found[0].op_type} '{found[0].name}' and {len(found) - 1} more): "
            f"give the float model it was made from, and --quantize int8; or give --dequantize too"
        )
    linear = [node for node in model.graph.node if node.op_type in LINEAR]
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored |= {
        n.output[0]: n.attribute[0].t.data_type for n in model.graph.node if n.op_type == "Constant" and n.attribute
    }
    kinds = {stored[name] for node in linear for name in node.input[1:2] if name in stored}
    if kinds != {onnx.TensorProto.FLOAT}:
        raise LowRankError(
            "INT8 was asked for: a model was expected whose convolutions and products (Conv, Gemm, MatMul) have stored weights, "
            "all of them float32"
        )


def quantizable(model: Model) -> list[str]:
    """Tensors of the main graph that may be held in eight bits."""
    stored = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in OPS]
    names = [name for node in nodes for name in (*node.input, *node.output) if name and name not in stored]
    return list(dict.fromkeys(names))


def insert_qdq(
    model: Model, ranges: Mapping[str, tuple[float, float]], float_nodes: Collection[str] = (), *, signed: bool = False
) -> Model:
    """`model` with weights stored in eight bits, a scale for each output channel, and activations rounded to `ranges`.

    Parameters
    ----------
    model
        With normalisations folded; see :func:`onnx_lowrank.quantize.prepared`.
    ranges
        Of every tensor that may be quantised; see :func:`onnx_lowrank.quantize.ranges.find_ranges`.
    float_nodes
        Names of nodes that stay in floating point.
    signed
        Activations in signed numbers around zero; otherwise unsigned, with a zero point.

    Raises
    ------
    LowRankError
        Where the model's operator set is too old and cannot be raised, or ONNX Runtime refuses.
    """
    given = _raised(model)
    taken = tensor_names(given.proto)
    copy = onnx.ModelProto()
    copy.CopyFrom(given.proto)  # the quantiser writes into what it is given
    del copy.metadata_props[:]  # one of them says that shapes are known, which may be long past
    del copy.graph.value_info[:]
    for tensor in copy.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(read_tensor(tensor, model.folder), tensor.name))
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    activations = QuantType.QInt8 if signed else QuantType.QUInt8
    level = logging.root.level
    try:
        logging.root.setLevel(logging.ERROR)  # it warns of tensors without a known type, which stay as they are
        quantizer = QDQQuantizer(
            copy,
            True,
            False,
            QuantType.QInt8,
            activations,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            [*float_nodes, *_unranged(given, ranges), *_read_within(given), *_uneven(given, ranges), *_fed(given)],
            list(OPS),
            {"ActivationSymmetric": signed},
        )
        quantizer.quantize_model()
    except Exception as error:  # of many kinds, and none of its own
        raise LowRankError(f"ONNX Runtime cannot quantise the model: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.root.setLevel(level)
    made = quantizer.model.model
    _sort(made.graph)
    del made.graph.value_info[:]
    made.graph.value_info.extend(given.graph.value_info)
    made.metadata_props.clear()
    made.metadata_props.extend(given.proto.metadata_props)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(made, field, getattr(given.proto, field))
    if made.ir_version < 4:  # where every stored tensor would have to be an input too
        made.ir_version = 7
    stored = {tensor.name: tensor for tensor in given.graph.initializer}
    for tensor in made.graph.initializer:
        if tensor.name in stored:
            tensor.CopyFrom(stored[tensor.name])  # as it was stored
    result = replace(given, proto=made)
    _compact(result, taken)
    return result


def _unranged(model: Model, ranges: Mapping[str, object]) -> list[str]:
    """Nodes with a tensor whose range is not known."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in OPS and not all(n in ranges or n in stored or not n for n in _data(node))
    ]


def _read_within(model: Model) -> list[str]:
    """Nodes whose outputs a graph within a node reads as well: the quantiser sees the main graph alone."""
    within = {name for node in model.graph.node for name in tensors_read(node) - set(node.input)}
    return [node.name for node in model.graph.node if not within.isdisjoint(node.output)]


def _uneven(model: Model, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """Nodes that join tensors of very different ranges (boxes and scores, say): one scale for all would leave some nothing."""
    found = []
    for node in model.graph.node:
        spans = [high - low for low, high in (ranges[name] for name in node.input if name in ranges)]
        if node.op_type == "Concat" and spans and max(spans) > UNEVEN * min(spans):
            found.append(node.name)
    return found


def _fed(model: Model) -> list[str]:
    """Nodes that read a stored tensor that a user may feed another value for."""
    fed = overridable(model)
    return [node.name for node in model.graph.node if not fed.isdisjoint(node.input)]


def _data(node: onnx.NodeProto) -> list[str]:
    """What a node computes with and makes, apart from shapes, axes and the like."""
    several = node.op_type in ("Add", "Mul", "Concat", "MatMul", "Gemm", "Conv")
    return [*(node.input if several else node.input[:1]), *node.output]


def _raised(model: Model) -> Model:
    """`model` in an operator set that knows a scale for each channel."""
    if model.opset >= OPSET:
        return model
    try:
        return replace(model, proto=onnx.version_converter.convert_version(model.proto, OPSET))
    except Exception as error:
        raise LowRankError(
            f"the model is of operator set {model.opset}, INT8 needs {OPSET}, and it cannot be raised "
            f"({' '.join(str(error).split())[:200]}): export it anew"
        ) from error


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node after those that make what it reads, within its own graphs too; otherwise the order stays."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    sorter = TopologicalSorter(
        {index: {makers[n] for n in tensors_read(node) if n in makers} for index, node in enumerate(graph.node)}
    )
    nodes, order, ready = list(graph.node), list[int](), list[int]()
    sorter.prepare()
    while sorter.is_active():
        for index in sorter.get_ready():
            heappush(ready, index)
        order.append(first := heappop(ready))
        sorter.done(first)
    sorted_ = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(sorted_)


def _compact(model: Model, taken: set[str]) -> None:
    """Short names for what the quantiser added, one of each constant, and no zero points that are zero.

    Its names repeat those of the tensors, twice, for each of a few bytes. ONNX Runtime 1.23 wants the zero points of a
    Gemm's kernel all the same, as many as there are scales.
    """
    graph = model.graph
    wanted = {name for node in graph.node if node.op_type == "Gemm" for name in node.input}
    added = [tensor for tensor in graph.initializer if tensor.name not in taken]
    alike: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    used = set(taken)
    for tensor in added:
        key = tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
        if key not in alike:
            alike[key] = fresh_name(f"q{len(alike)}", used)
        names[tensor.name] = alike[key]
    zeros = {
        tensor.name
        for tensor in added
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
        and not numpy_helper.to_array(tensor).any()
    }
    stored = {tensor.name for tensor in graph.initializer}
    for number, node in enumerate(graph.node):
        if node.op_type in QUANTIZED and node.name not in taken:
            node.name = ""
            weight = node.op_type == "DequantizeLinear" and node.input[0] in stored
            if weight and len(node.input) > 2 and node.input[2] in zeros and not wanted.intersection(node.output):
                del node.input[2:]
        for output in node.output:
            if output and output not in taken:
                names[output] = fresh_name(f"t{number}", used)
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                if name in names:
                    values[place] = names[name]
    kept: set[str] = set()
    tensors = list(graph.initializer)
    del graph.initializer[:]
    for tensor in tensors:
        name = names.get(tensor.name, tensor.name)
        if name not in kept:
            kept.add(name)
            tensor.name = name
            graph.initializer.append(tensor)
    drop_unread(model, kept)

"""A model in eight bits (QDQ) brought back to floating point: what a decomposition needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.graph.constants import Constants, add_initializer, drop_unread, lists_all
from onnx_lowrank.graph.limits import one_line
from onnx_lowrank.graph.model import Model, fresh_name, tensor_names
from onnx_lowrank.types import LowRankError

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

COMPUTED = 19
"""The first version of the pair that onnx computes; it means what earlier ones do."""

BOUNDED = ("Relu", "Clip")
"""Operators that bound a tensor below by themselves."""


def dequantized(model: Model) -> Model:
    """`model` with kernels in floating point and activations that are not rounded.

    A tensor whose smallest number stands for zero stays bounded as it was (Clip): quantisers leave out the Relu before it.
    Integers that come from elsewhere, a quantised input for example, stay as they are.

    Raises
    ------
    LowRankError
        Where nothing is in QDQ form, or a kernel cannot be computed.
    """
    copy = replace(model.copy(), data_files=model.data_files)
    if _store_kernels(copy) + _open_pairs(copy) == 0:
        raise LowRankError(
            "dequantize was given: a model with DequantizeLinear nodes after stored weights or QuantizeLinear was expected"
        )
    made = {output for node in copy.graph.node for output in node.output}
    shapes = [value for value in copy.graph.value_info if value.name in made]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(shapes)
    return copy


def _store_kernels(model: Model) -> int:
    """Compute what is brought back from stored tensors, in the graph of `model`, which is changed; how many there were."""
    graph, constants, listed = model.graph, Constants(model), lists_all(model)
    known: dict[str, np.ndarray] = {}
    kernels: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in (QUANTIZE, DEQUANTIZE):
            continue
        for name in filter(None, node.input):
            constant = constants.find(name)
            if name not in known and constant and constant.fixed:
                known[name] = constant.read()
        if all(name in known for name in node.input if name):
            known[node.output[0]] = _computed(node, model, {name: known[name] for name in node.input if name})
            if node.op_type == DEQUANTIZE:
                kernels.append(node)
    for node in kernels:
        graph.node.remove(node)
        add_initializer(model, numpy_helper.from_array(known[node.output[0]], node.output[0]), listed=listed)
    drop_unread(model, [name for node in kernels for name in node.input])
    return len(kernels)


def _open_pairs(model: Model) -> int:
    """Take out the pairs that round activations, in the graph of `model`, which is changed; how many there were."""
    graph, constants, taken = model.graph, Constants(model), tensor_names(model.proto)
    results = {value.name for value in graph.output}
    producers = {output: node.op_type for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    source: dict[str, str] = {}  # of each tensor that a pair makes
    nodes: list[onnx.NodeProto] = []
    unread: list[str] = []
    pairs = 0
    for node in graph.node:
        ends = readers[node.output[0]] if node.output else []
        if node.op_type == QUANTIZE and node.output[0] not in results and _undone(node, ends):
            pairs += 1
            name = source.get(node.input[0], node.input[0])
            highest = None if producers.get(node.input[0]) in BOUNDED else _highest(node, constants)
            if highest is not None:
                nodes += (clip := _clip(model.opset, name, highest, taken))
                name = clip[-1].output[0]
            source |= dict.fromkeys((end.output[0] for end in ends), name)
        elif node.op_type == DEQUANTIZE and node.output[0] in source:
            if node.output[0] in results:
                nodes.append(helper.make_node("Identity", [source.pop(node.output[0])], [node.output[0]], node.name))
        else:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            kept.input[:] = [source.get(name, name) for name in node.input]
            nodes.append(kept)
            continue
        unread += node.input[1:]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unread(model, unread)
    return pairs


def _undone(node: onnx.NodeProto, ends: Sequence[onnx.NodeProto]) -> bool:
    """Whether all that reads a quantised tensor brings it back with the same numbers."""
    return bool(ends) and all(end.op_type == DEQUANTIZE and end.input[1:] == node.input[1:] for end in ends)


def _computed(node: onnx.NodeProto, model: Model, values: dict[str, np.ndarray]) -> np.ndarray:
    """What a node makes of stored tensors."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    ]
    result = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UNDEFINED, None)
    opset = helper.make_opsetid("", max(model.opset, COMPUTED))
    alone = helper.make_model(helper.make_graph([node], "one", inputs, [result]), opset_imports=[opset])
    try:
        (found,) = ReferenceEvaluator(alone).run(None, values)
    except Exception as error:  # of many kinds: a model may hold any values
        raise LowRankError(f"{node.op_type} '{node.output[0]}' cannot be computed ({one_line(error)})") from error
    return np.asarray(found)


def _highest(node: onnx.NodeProto, constants: Constants) -> np.ndarray | None:
    """The largest value of a quantised tensor whose smallest number stands for zero; None for others."""
    found = [constants.find(name) for name in node.input[1:] if name]
    if len(found) < 2 or any(each is None or not each.fixed for each in found):
        return None
    scale, zero = (each.read() for each in found if each)
    if scale.size != 1 or zero.dtype.kind not in "iu" or zero != np.iinfo(zero.dtype).min:
        return None
    steps = np.iinfo(zero.dtype).max - np.iinfo(zero.dtype).min
    return np.asarray(scale * scale.dtype.type(steps)).reshape(())


def _clip(opset: int, name: str, highest: np.ndarray, taken: set[str]) -> list[onnx.NodeProto]:
    """Nodes that keep a tensor between zero and `highest`."""
    bounded = fresh_name(f"{name}_bounded", taken)
    if opset < 11:
        return [helper.make_node("Clip", [name], [bounded], min=0.0, max=float(highest))]
    ends = [fresh_name(f"{bounded}_{end}", taken) for end in ("min", "max")]
    values = np.zeros_like(highest), highest
    stored = [
        helper.make_node("Constant", [], [end], value=numpy_helper.from_array(value, end))
        for end, value in zip(ends, values, strict=True)
    ]
    return [*stored, helper.make_node("Clip", [name, *ends], [bounded])]

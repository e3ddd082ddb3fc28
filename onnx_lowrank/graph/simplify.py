"""Exact rewrites for what runs badly in eight bits: constants computed anew in every run, shortcuts that slice and pad.

A Slice and a Pad of channels have no form in eight bits that keeps the layout of the convolutions around them: they cost two
conversions and two transpositions, for a copy. A 1x1 convolution of zeros and ones with a stride does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lowrank.graph.constants import Constants, add_initializer, drop_unread, lists_all
from onnx_lowrank.graph.model import Model, attributes, fresh_name, readers, subgraphs, tensor_names

NOT_CONSTANT = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")

LARGEST = 1 << 20
"""Elements of a constant that is stored instead of computed."""


def name_nodes(model: Model) -> None:
    """Give a name to each node of the main graph of `model`, which is changed, that has none: tools go by names."""
    taken = tensor_names(model.proto)
    for node in model.graph.node:
        if not node.name:
            node.name = fresh_name(f"{node.op_type}_of_{next(iter(node.output), '')}", taken)


def lift_constants(model: Model) -> None:
    """Store what Constant nodes of the main graph of `model`, which is changed, hold as float32 tensors."""
    outputs = {value.name for value in model.graph.output}
    listed = lists_all(model)
    for node in [node for node in model.graph.node if node.op_type == "Constant" and not node.domain]:
        held = node.attribute[0] if node.attribute else onnx.AttributeProto()
        if held.name == "value" and held.t.data_type == onnx.TensorProto.FLOAT and node.output[0] not in outputs:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(held.t)
            tensor.name = node.output[0]
            model.graph.node.remove(node)
            add_initializer(model, tensor, listed=listed)


def computed_constants(model: Model) -> list[str]:
    """Tensors that depend on no input, are computed in every run, and are read by what does depend on one."""
    graph = model.graph
    fed = {value.name for value in graph.input}
    known = {tensor.name for tensor in graph.initializer} - fed | {""}
    computed: dict[str, None] = {}
    read: list[str] = [output.name for output in graph.output]
    for node in graph.node:
        inner = any(True for _ in subgraphs(node))
        if (
            inner
            or node.domain not in ("", "ai.onnx")
            or node.op_type in NOT_CONSTANT
            or not known.issuperset(node.input)
        ):
            read += node.input
            for body in subgraphs(node):
                read += [name for inside in body.node for name in inside.input]
        else:
            known.update(node.output)
            if node.op_type != "Constant":
                computed.update(dict.fromkeys(node.output))
    wanted = set(read)
    return [name for name in computed if name in wanted and name not in {o.name for o in graph.output}]


def shortcut_arguments(model: Model) -> Iterator[str]:
    """Names of the tensors that say how much is added and what is left out, where channels are padded after slices."""
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type != "Pad":
            continue
        yield from node.input[1:]
        before = producers.get(node.input[0])
        while before is not None and before.op_type == "Slice":
            yield from before.input[1:]
            before = producers.get(before.input[0])


def making(model: Model, names: Sequence[str]) -> Model:
    """A model of the nodes that make the tensors called `names`, which depend on no input, and of what those read."""
    wanted, nodes = set(names), list[onnx.NodeProto]()
    for node in reversed(model.graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(filter(None, node.input))
            nodes.append(node)
    graph = onnx.GraphProto(
        name="constants",
        node=reversed(nodes),
        initializer=[tensor for tensor in model.graph.initializer if tensor.name in wanted],
        output=[onnx.ValueInfoProto(name=name) for name in names],
    )
    proto = onnx.ModelProto(
        ir_version=max(model.proto.ir_version, 4), opset_import=model.proto.opset_import, graph=graph
    )
    return replace(model, proto=proto)


def store_constants(model: Model, values: Mapping[str, np.ndarray]) -> None:
    """Store what was computed, in the graph of `model`, which is changed."""
    listed = lists_all(model)
    small = {name: value for name, value in values.items() if value.size <= LARGEST}
    gone = [node for node in model.graph.node if node.output and set(node.output) <= small.keys()]
    small = {output: small[output] for node in gone for output in node.output}
    unread = [name for node in gone for name in node.input]
    for node in gone:
        model.graph.node.remove(node)
    for name, value in small.items():
        add_initializer(model, numpy_helper.from_array(value, name), listed=listed)
    _drop(model, unread)


def _drop(model: Model, names: list[str]) -> None:
    """Remove the nodes that made `names`, as far as nothing reads them any more."""
    count = readers(model.proto)
    producers = {output: node for node in model.graph.node for output in node.output}
    pending = list(names)
    while pending:
        node = producers.get(pending.pop())
        if node is None or any(count[output] for output in node.output):
            continue
        for output in node.output:
            producers.pop(output, None)
        for name in node.input:
            count[name] -= 1
        pending += node.input
        model.graph.node.remove(node)
    drop_unread(model, names)


def convolve_shortcuts(model: Model, channels: Mapping[str, int], kernels: int) -> tuple[str, ...]:
    """Make convolutions of what takes every n-th pixel and adds channels of zeros, in the graph of `model`, which is changed.

    Parameters
    ----------
    channels
        Of tensors of that type, where that is known.
    kernels
        Type of the kernels, by ONNX's number for it.

    Returns
    -------
    tuple of str
        Names of their nodes.
    """
    constants, count, taken = Constants(model), readers(model.proto), tensor_names(model.proto)
    producers = {output: node for node in model.graph.node for output in node.output}
    made: list[str] = []
    for pad in [node for node in model.graph.node if node.op_type == "Pad" and node.domain in ("", "ai.onnx")]:
        added = _added_channels(pad, constants, model.opset)
        steps, source, slices = [1, 1], pad.input[0], []
        while added and count[source] == 1 and (cut := _steps(producers.get(source), constants)):
            steps = [a * b for a, b in zip(steps, cut, strict=True)]
            slices.append(producers[source])
            source = producers[source].input[0]
        if not added or source not in channels or not slices:
            continue
        into = channels[source]
        kernel = np.zeros((added[0] + into + added[1], into, 1, 1), onnx.helper.tensor_dtype_to_np_dtype(kernels))
        kernel[np.arange(into) + added[0], np.arange(into)] = 1
        name = fresh_name(f"{pad.output[0]}_kernel", taken)
        add_initializer(model, numpy_helper.from_array(kernel, name), listed=lists_all(model))
        node_name = pad.name or fresh_name(f"shortcut_of_{pad.output[0]}", taken)
        conv = onnx.helper.make_node(
            "Conv", [source, name], [pad.output[0]], node_name, strides=steps, kernel_shape=[1, 1]
        )
        unread = [i for node in (pad, *slices) for i in node.input[1:]]
        model.graph.node.insert(list(model.graph.node).index(pad), conv)
        for node in (pad, *slices):
            model.graph.node.remove(node)
        drop_unread(model, unread)
        made.append(node_name)
    return tuple(made)


def _values(names: list[str], constants: Constants) -> list[np.ndarray | None] | None:
    """Values of stored tensors, None for those that are absent; None where one of them is not stored."""
    found: list[np.ndarray | None] = []
    for name in names:
        constant = constants.find(name) if name else None
        if name and (constant is None or constant.overridable):
            return None
        found.append(constant.read() if constant else None)
    return found


def _added_channels(pad: onnx.NodeProto, constants: Constants, opset: int) -> tuple[int, int] | None:
    """Channels of zeros before and after, of a Pad that adds nothing else to pictures."""
    mode = attributes(pad).get("mode")
    values = _values(list(pad.input[1:]), constants)
    if opset < 11 or values is None or not values or values[0] is None or (mode is not None and mode.s != b"constant"):
        return None
    amounts, value, axes = (*values, None, None)[:3]
    assert amounts is not None
    if (value is not None and value.any()) or axes is not None or amounts.size != 8:
        return None
    left, right = amounts.reshape(2, 4).tolist()
    bare = not any(left[:1] + left[2:] + right[:1] + right[2:]) and min(left[1], right[1]) >= 0
    return (left[1], right[1]) if bare and left[1] + right[1] > 0 else None


def _steps(node: onnx.NodeProto | None, constants: Constants) -> list[int] | None:
    """Of a Slice that takes every n-th pixel of whole pictures, from the first on."""
    if node is None or node.op_type != "Slice" or len(node.input) < 5 or node.domain not in ("", "ai.onnx"):
        return None
    values = _values(list(node.input[1:]), constants)
    if values is None or any(value is None for value in values):
        return None
    starts, ends, axes, strides = (np.ravel(value).tolist() for value in values if value is not None)
    steps = [1, 1]
    for start, end, axis, stride in zip(starts, ends, axes, strides, strict=True):
        if start != 0 or end < np.iinfo(np.int32).max or axis not in (2, 3) or stride < 1:
            return None
        steps[axis - 2] *= stride
    return steps

"""A model with something in every field that ONNX has, and what of it must not change when a layer does."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import normal, parse

TEXT = """g (float[N,4,6,6] x, bool c) => (float[N,6,6,6] y, float[N,6,6,6] z, float16[3] wide, float[4] eighths) {
    ["before"] a = Relu (x)
    ["conv"] b = Conv <pads=[1,1,1,1]> (a, w, bias)
    ["after"] d = Relu (b)
    ["other"] e = Conv <pads=[1,1,1,1]> (d, v)
    ["choice"] f = If (c) <
        then_branch = then () => (float[n,k,h,w] p) <float[1] inner = {2}> { ["in_then"] p = Conv <pads=[1,1,1,1]> (e, v) },
        else_branch = else () => (float[n,k,h,w] q) { ["in_else"] q = Mul (e, e) }
    >
    ["wrap"] o = Optional (f)
    ["unwrap"] u = OptionalGetElement (o)
    ["pair"] s = SequenceConstruct (u, e)
    ["pick"] t = SequenceAt (s, first)
    ["again"] l = Loop (times, yes, t) <
        body = body (int64 i, bool go, float[n,k,h,w] m) => (bool on, float[n,k,h,w] next) {
            on = Identity (go) ["in_loop"] j = Conv <pads=[1,1,1,1]> (m, v) ["scaled"] next = Mul (j, scale)
        }
    >
    ["called"] y = local.twice <tag = "text"> (l)
    ["end"] z = Neg (d)
    ["from_bfloat16"] wide = Cast <to = 10> (sixteen)
    ["from_float8"] eighths = DequantizeLinear (eight, scale)
}"""

LAYERS = ("conv", "other", "in_then", "in_loop")
"""Convolutions of the model."""


def rich() -> onnx.ModelProto:
    """A model with something in every field that tools are known to lose; ONNX Runtime runs it."""
    model = parse(TEXT, opset=21, ir_version=10, w=normal(6, 4, 3, 3), bias=normal(6), v=normal(6, 6, 3, 3))
    graph = model.graph
    body = [helper.make_node("Add", ["i", "i"], ["o"], name="in_function", doc_string="doubles")]
    model.functions.append(helper.make_function("local", "twice", ["i"], ["o"], body, model.opset_import, ["tag"]))
    model.functions[0].doc_string = "twice"
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.opset_import.append(helper.make_opsetid("unused.domain", 7))
    model.producer_name, model.producer_version, model.domain = "us", "1.0", "some.where"
    model.model_version, model.doc_string = 42, "a model"
    graph.doc_string = "a graph"
    for number, message in enumerate([model, graph, model.functions[0], *graph.node, *graph.initializer, *graph.input]):
        message.metadata_props.add(key="key", value=str(number))
    for node in graph.node:
        node.doc_string = f"node {node.name}"
        for attribute in node.attribute:
            attribute.doc_string = f"{attribute.name} of {node.name}"
    tag = next(node for node in graph.node if node.name == "called").attribute[0]
    tag.s = b"\xff\xfe"  # not UTF-8
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.input[0].doc_string = "pictures"
    for name in ("a", "b", "d", "e", "f"):
        shape = ["N", 4 if name == "a" else 6, 6, 6]
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape, doc_string=name))
    tensor_type = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 6, 6, 6])
    graph.value_info.append(helper.make_value_info("o", helper.make_optional_type_proto(tensor_type)))
    graph.value_info.append(helper.make_value_info("s", helper.make_sequence_type_proto(tensor_type)))
    for tensor in graph.initializer:
        tensor.doc_string = f"tensor {tensor.name}"
        graph.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        note = graph.quantization_annotation.add(tensor_name=tensor.name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    values = {"scale": np.float32(0.5), "first": np.array(0), "times": np.array(3), "yes": np.array(True)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())
    for name, kind, length, data in (
        ("sixteen", TensorProto.BFLOAT16, 3, b"\x80\x3f\x00\x40\x40\x40"),
        ("eight", TensorProto.FLOAT8E4M3FN, 4, b"\x38\x40\x48\x30"),
        ("unread_float8", TensorProto.FLOAT8E5M2, 2, b"\x3c\x40"),
        ("unread_int4", TensorProto.INT4, 3, b"\x21\x03"),
        ("unread_uint4", TensorProto.UINT4, 3, b"\xfe\x0f"),
    ):
        graph.initializer.append(helper.make_tensor(name, kind, [length], data, raw=True))
    graph.initializer.append(numpy_helper.from_array(np.array(["a", "b"], object), "unread_strings"))
    stored = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [3.0])
    indices = helper.make_tensor("sparse_indices", TensorProto.INT64, [1], [1])
    graph.sparse_initializer.append(helper.make_sparse_tensor(stored, indices, [5]))
    training = model.training_info.add()
    training.algorithm.node.append(helper.make_node("Identity", ["bias"], ["new_bias"], name="train"))
    training.algorithm.output.append(helper.make_tensor_value_info("new_bias", TensorProto.FLOAT, [6]))
    training.update_binding.add(key="bias", value="new_bias")
    return model


def untouched(model: onnx.ModelProto, layer: str) -> dict[str, object]:
    """Every field of a model as bytes, without the nodes of a layer, its kernels and all that is said about those."""

    def others(values: object, name: str) -> list[bytes]:
        gone = (layer, "w", f"{layer}_lowrank_0", f"{layer}_lowrank_1", "w_lowrank_0", "w_lowrank_1", "w_lowrank_2")
        return [v.SerializeToString() for v in values if getattr(v, name) not in gone]  # type: ignore[attr-defined]

    graph = model.graph
    fields: dict[str, object] = {
        "node": others(graph.node, "name"),
        "initializer": others(graph.initializer, "name"),
        "value_info": others(graph.value_info, "name"),
        "quantization_annotation": others(graph.quantization_annotation, "tensor_name"),
    }
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    for name in fields:
        rest.graph.ClearField(name)
    return fields | {"everything else": rest.SerializeToString()}

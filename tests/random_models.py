"""Models drawn at random: any topology of layers with their attributes at the edges, and what must hold of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.printer
from hypothesis import note
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import onnx_lowrank as lr
from onnx_lowrank.decompositions import DECOMPOSITIONS, is_joint
from tests.helpers import Feeds, decompose, full, half, ones, run

METHODS = (*(name for name in DECOMPOSITIONS if not is_joint(name)), *4 * ("svd",))
"""What is drawn: products have one method, convolutions share seven."""

KEPT_AS = ("initializer", "Constant", "Identity", "Transpose", "Reshape", "Cast", "Unsqueeze", "Squeeze")
TOLERANCE = {"float32": 2e-4, "float64": 1e-10}
"""Of chains of a few layers, relative to the largest output."""


@dataclass
class Builder:
    """A graph that grows: every tensor with its shape."""

    draw: Any
    dtype: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kernels: dict[tuple[int, ...], list[str]] = field(default_factory=dict)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        return [self.number(low, high) for _ in range(count)]

    def new(self, stem: str) -> str:
        return f"{stem}{len(self.nodes)}_{len(self.stored)}"

    def node(self, op: str, inputs: Sequence[str], shape: tuple[int, ...] | None, **attributes: Any) -> str:
        output = self.new("t")
        named = self.pick((True, True, False))
        self.nodes.append(
            helper.make_node(op, inputs, [output], output.replace("t", "n") if named else "", **attributes)
        )
        if shape is not None:
            self.shapes[output] = shape
        return output

    def store(self, value: np.ndarray) -> str:
        name = self.new("w")
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def kernel(self, shape: tuple[int, ...], fan: int) -> str:
        """A kernel, new or one that others read, in one of the forms that a model may keep it in."""
        if self.kernels.get(shape) and self.pick((True, False)):
            return str(self.pick(self.kernels[shape]))
        rng = np.random.default_rng([len(self.nodes), *shape])
        value = (rng.standard_normal(shape) / math.sqrt(fan)).astype(self.dtype)
        form = self.pick(KEPT_AS)
        if form == "Constant":
            name = self.node("Constant", [], None, value=numpy_helper.from_array(value))
        elif form == "Identity":
            name = self.node("Identity", [self.store(value)], None)
        elif form == "Transpose":
            perm = self.draw(st.permutations(range(value.ndim)))
            name = self.node("Transpose", [self.store(value.transpose(np.argsort(perm)))], None, perm=perm)
        elif form == "Reshape":
            name = self.node("Reshape", [self.store(value.ravel()), self.store(np.array(shape, np.int64))], None)
        elif form == "Cast":
            wide = value.astype("float64" if self.dtype == "float32" else "float32").astype(self.dtype)
            other = wide.astype("float64" if self.dtype == "float32" else "float32")
            name = self.node(
                "Cast", [self.store(other)], None, to=helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
            )
        elif form == "Unsqueeze" and 1 in shape:
            axis = shape.index(1)
            axes = self.store(np.array([axis], np.int64))
            name = self.node("Unsqueeze", [self.store(value.squeeze(axis)), axes], None)
        elif form == "Squeeze":
            name = self.node("Squeeze", [self.store(value[None]), self.store(np.array([0], np.int64))], None)
        else:
            name = self.store(value)
        self.kernels.setdefault(shape, []).append(name)
        return name

    def bias(self, channels: int) -> list[str]:
        kind = self.pick(("none", "empty", "stored"))
        if kind != "stored":
            return [] if kind == "none" else [""]
        return [self.store(np.linspace(-1, 1, channels).astype(self.dtype))]

    # --- layers ---

    def conv(self, x: str) -> str:
        _, channels, *size = self.shapes[x]
        n = len(size)
        group = self.pick([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
        out = group * self.number(1, 4)
        kernel, strides, dilations = self.numbers(n, 1, 3), self.numbers(n, 1, 3), self.numbers(n, 1, 3)
        pads = self.numbers(2 * n, 0, 2)
        auto_pad = self.pick(("NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"))
        if auto_pad.startswith("SAME"):
            dilations = [1] * n  # the runtime has no other
        begins = pads[:n] if auto_pad == "NOTSET" else [0] * n
        ends = pads[n:] if auto_pad == "NOTSET" else [0] * n
        after = []
        for i in range(n):
            reach = dilations[i] * (kernel[i] - 1) + 1
            if auto_pad.startswith("SAME"):
                after.append(-(-size[i] // strides[i]))
                continue
            if size[i] + begins[i] + ends[i] < reach:
                kernel[i] = reach = 1
            after.append((size[i] + begins[i] + ends[i] - reach) // strides[i] + 1)
        attributes = self._attributes(kernel, strides, dilations, pads, group, auto_pad)
        fan = channels // group * math.prod(kernel)
        weight = self.kernel((out, channels // group, *kernel), fan)
        return self.node("Conv", [x, weight, *self.bias(out)], (self.shapes[x][0], out, *after), **attributes)

    def conv_transpose(self, x: str) -> str:
        _, channels, *size = self.shapes[x]
        n = len(size)
        group = self.pick([g for g in (1, 1, 2, channels) if channels % g == 0])
        per_group = self.number(1, 3)
        kernel, strides, dilations = self.numbers(n, 1, 3), self.numbers(n, 1, 3), self.numbers(n, 1, 2)
        pads, extra = [0] * (2 * n), [self.number(0, max(s, d) - 1) for s, d in zip(strides, dilations, strict=True)]
        extra = [min(e, s - 1) for e, s in zip(extra, strides, strict=True)]
        after = []
        for i in range(n):
            whole = strides[i] * (size[i] - 1) + extra[i] + dilations[i] * (kernel[i] - 1) + 1
            begin, end = self.number(0, 1), self.number(0, 1)
            if whole - begin - end >= 1 and dilations[i] * (kernel[i] - 1) >= max(begin, end):
                pads[i], pads[n + i] = begin, end
            after.append(whole - pads[i] - pads[n + i])
        attributes = self._attributes(kernel, strides, dilations, pads, group, "NOTSET")
        if any(extra):
            attributes["output_padding"] = extra
        weight = self.kernel((channels, per_group, *kernel), channels // group * math.prod(kernel))
        out = per_group * group
        return self.node("ConvTranspose", [x, weight, *self.bias(out)], (self.shapes[x][0], out, *after), **attributes)

    def _attributes(
        self, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int], group: int, auto_pad: str
    ) -> dict[str, Any]:
        """Attributes, those at their defaults written out or not."""
        given: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
        given |= {"pads": pads} if auto_pad == "NOTSET" else {"auto_pad": auto_pad}
        n = len(kernel)
        defaults = {"strides": [1] * n, "dilations": [1] * n, "pads": [0] * 2 * n, "group": 1, "kernel_shape": kernel}
        return {k: v for k, v in given.items() if defaults.get(k) != v or self.pick((True, False))}

    def elementwise(self, x: str) -> str:
        return self.node(self.pick(("Relu", "Tanh", "Identity")), [x], self.shapes[x])

    def residual(self, x: str) -> str:
        same = [name for name, shape in self.shapes.items() if shape == self.shapes[x]]
        return self.node(self.pick(("Add", "Sub")), [x, self.pick(same)], self.shapes[x])

    def gemm(self, x: str) -> str:
        rows, columns = self.shapes[x]
        out, trans = self.number(1, 6), self.pick((0, 1))
        across = self.pick((0, 0, 0, 1))
        if across:  # no output of the model: ONNX Runtime 1.31 fuses the two and cannot find it any more
            x = self.node("Transpose", [x], None, perm=[1, 0])
        weight = self.kernel((out, columns) if trans else (columns, out), columns)
        shape = self.pick((None, (), (1,), (out,), (1, out), (rows, 1), (rows, out)))
        addend = [] if shape is None else [self.store(np.full(shape, 0.5, self.dtype))]
        attributes: dict[str, Any] = {"transB": trans} if trans or self.pick((True, False)) else {}
        attributes |= {"transA": 1} if across else {}
        attributes |= {k: self.pick((0.5, 2.0)) for k in ("alpha", "beta") if self.pick((True, False))}
        return self.node("Gemm", [x, weight, *addend], (rows, out), **attributes)

    def matmul(self, x: str) -> str:
        *lead, rows, columns = self.shapes[x]
        out = self.number(1, 6)
        if self.pick((True, True, False)):
            return self.node("MatMul", [x, self.kernel((columns, out), columns)], (*lead, rows, out))
        return self.node("MatMul", [self.kernel((out, rows), rows), x], (*lead, out, columns))


@st.composite
def models(draw: Any) -> tuple[onnx.ModelProto, Feeds]:
    """A model and what to feed it."""
    axes = draw(st.integers(0, 3))  # none: products alone, which the runtime has in float64 too
    build = Builder(draw, draw(st.sampled_from(["float32"] if axes else ["float32", "float64"])))
    batch = build.number(1, 2)
    if axes:
        shape: tuple[int, ...] = (batch, build.number(1, 6), *build.numbers(axes, 1, {1: 9, 2: 6, 3: 4}[axes]))
    else:
        shape = (*build.numbers(build.number(0, 2), 1, 3), build.number(1, 5), build.number(1, 7))
    build.shapes["x"] = shape
    x = "x"
    if axes:
        for _ in range(build.number(1, 4)):
            x = build.pick((build.conv, build.conv, build.conv_transpose, build.elementwise, build.residual))(x)
            if math.prod(build.shapes[x]) > 4096:
                break
            x = build.pick((x, x, x, build.pick(list(build.shapes))))  # on from any tensor
        if build.pick((True, False)):
            flat = math.prod(build.shapes[x][1:])
            if flat <= 64:
                x = build.node("Flatten", [x], (build.shapes[x][0], flat))
    if not axes or len(build.shapes[x]) == 2:
        for _ in range(build.number(1, 3)):
            kinds = [build.matmul, build.elementwise, build.residual]
            x = build.pick([*kinds, build.gemm] if len(build.shapes[x]) == 2 else kinds)(x)
    made = [name for name in build.shapes if name != "x"]
    outputs = sorted({made[-1], *draw(st.lists(st.sampled_from(made), max_size=2))})
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(build.dtype))
    products = any(node.op_type in ("Gemm", "MatMul") for node in build.nodes)  # whose constants may fix the batch
    dynamic = build.pick((True, False)) and not products
    graph = helper.make_graph(
        build.nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", *shape[1:]] if dynamic else shape)],
        [helper.make_tensor_value_info(n, kind, [f"{n}_{i}" for i in range(len(build.shapes[n]))]) for n in outputs],
        build.stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, {"x": np.random.default_rng(1).standard_normal(shape).astype(build.dtype)}


def check(case: tuple[onnx.ModelProto, Feeds], method: str, budget: float) -> int:
    """What must hold of a drawn model; how many layers were decomposed at full rank.

    At full rank it gives the same outputs; at any rank, and under any budget, it is valid, runs, and gives outputs of the
    same types and sizes.
    """
    model, feeds = case
    note(onnx.printer.to_text(model))
    onnx.checker.check_model(model, full_check=True)
    expected = run(model, feeds)
    sizes = {"x": feeds["x"].shape}
    dtype = feeds["x"].dtype.name
    whole = decompose(model, method, full, **sizes)
    onnx.checker.check_model(whole.model, full_check=True)
    largest = max((np.abs(e).max() for e in expected), default=0.0)
    for optimize in (False, True):
        for actual, wanted in zip(run(whole.model, feeds, optimize=optimize), expected, strict=True):
            assert actual.shape == wanted.shape
            assert actual.dtype == wanted.dtype
            assert np.abs(actual - wanted).max() <= TOLERANCE[dtype] * max(largest, 1.0)
    for rank in (half, ones):
        _same_face(decompose(model, method, rank, **sizes).model, feeds, expected)
    try:
        result = lr.compress(model, budget={"macs": budget}, align=1, jobs=1, input_shape=sizes)
    except lr.LowRankError as error:  # nothing in it to decompose
        assert "no layer to decompose" in str(error)
        return 0
    _same_face(result.model, feeds, expected)
    if not result.report.layers:
        assert result.model.SerializeToString() == model.SerializeToString()
    return len(whole.reports)


def _same_face(model: onnx.ModelProto, feeds: Feeds, expected: Sequence[np.ndarray]) -> None:
    onnx.checker.check_model(model, full_check=True)
    actual = run(model, feeds)
    assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]
    assert all(np.isfinite(a).all() for a in actual)

"""Layers for onnx-graphsurgeon and the weights that go into them.

Each layer function is registered with graphsurgeon, so a network reads ``x = graph.conv(x, "conv1", weights, 64, 3)``.
Variables carry their shapes: the channel count of an input is read from it, and the exported model holds them as
``value_info``. A node is called ``layer1.0.conv1``, its initializers ``layer1.0.conv1.weight`` and so on, its output
``layer1.0.conv1.out``: the names of a PyTorch ``state_dict``, so that trained weights go into the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from scipy.fft import dct

from onnx_lowrank.types import LowRankError

OPSET = 17
# onnx's own default is newer than what ONNX Runtime accepts.
IR_VERSION = 8
PRODUCER = "onnx_lowrank.models"
# Singular values of the weights fall like i ** -DECAY and a little faster, in every unfolding.
DECAY = 0.5


class Weights(Protocol):
    """Where the numbers come from: a name such as ``conv1.weight`` and a shape to a float32 array of that shape.

    `gain` is the size asked of a scale that is drawn; trained weights have their own and ignore it.
    """

    def __call__(self, name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray: ...


def power_law(rng: np.random.Generator, shape: tuple[int, ...], decay: float = DECAY) -> np.ndarray:
    """Random weights whose singular values fall like a power in every unfolding, at He variance.

    A Gaussian tensor whose entries are scaled by ``i**-decay`` along each axis has the spectrum but is largest in one
    corner; an orthogonal mixing along each axis (random signs, orthonormal DCT, random signs) spreads it evenly and
    leaves all singular values as they are. It costs n log n instead of the n**2 of a random orthogonal matrix.

    Parameters
    ----------
    rng : numpy.random.Generator
    shape : tuple of int
        (out, in, spatial...), two axes or more.
    decay : float, default 0.5
        For 0.5 the singular values of the (out, in * spatial) unfolding of usual layers fall like ``i**-0.55`` to
        ``i**-0.7`` over their first half.

    Returns
    -------
    numpy.ndarray
        float32, of the given shape, mean square about ``2 / (in * spatial)``.

    References
    ----------
    He, Zhang, Ren, Sun (2015), "Delving deep into rectifiers", eq. 10 (the variance).
    Ailon, Chazelle (2009), "The fast Johnson-Lindenstrauss transform" (signs and a fast transform as a rotation).

    Examples
    --------
    >>> weight = power_law(np.random.default_rng(0), (64, 32, 3, 3))
    >>> values = np.linalg.svd(weight.reshape(64, -1), compute_uv=False)
    >>> bool(values[31] < 0.25 * values[0])
    True
    """
    fan_in = int(np.prod(shape[1:]))
    weight = rng.standard_normal(shape, dtype=np.float32)
    for axis, size in enumerate(shape):
        profile = np.arange(1, size + 1) ** -decay
        # Mean square one on every axis, so that the variance is right without a pass over the weights.
        profile /= np.sqrt(np.mean(profile**2))
        if axis == 0:
            profile *= np.sqrt(2 / fan_in)
        along = (-1,) + (1,) * (len(shape) - axis - 1)
        before, after = (rng.choice((-1.0, 1.0), size) for _ in range(2))
        weight *= (profile * before).astype(np.float32).reshape(along)
        weight = dct(weight, axis=axis, norm="ortho", overwrite_x=True)
        weight *= after.astype(np.float32).reshape(along)
    return weight


def seeded(rng: np.random.Generator) -> Weights:
    """Untrained weights: `power_law` for kernels, small biases, statistics of a batch normalization near (0, 1)."""

    def draw(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
        kind = name.rpartition(".")[2]
        if kind == "weight" and len(shape) > 1:
            return power_law(rng, shape)
        if kind == "weight":
            value = gain * rng.uniform(0.7, 1.3, shape)
        elif kind == "running_var":
            value = np.exp(0.3 * rng.standard_normal(shape))
        else:
            value = 0.1 * rng.standard_normal(shape)
        return value.astype(np.float32)

    return draw


def stored(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Weights looked up by name, as in a PyTorch ``state_dict``; a missing name or another shape is an error."""

    def look_up(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
        if name not in arrays or arrays[name].shape != shape:
            given = f"has shape {arrays[name].shape}" if name in arrays else "is missing"
            raise LowRankError(f"weight {name!r} {given}, not the expected {shape}: give the weights of this network")
        return np.ascontiguousarray(arrays[name], dtype=np.float32)

    return look_up


def start(name: str, shape: tuple[int, int, int]) -> tuple[gs.Graph, gs.Variable]:
    """An empty graph and its input ``input`` of shape ("N", channels, height, width)."""
    graph = gs.Graph(opset=OPSET, name=name, ir_version=IR_VERSION)
    x = gs.Variable("input", np.float32, ["N", *shape])
    graph.inputs = [x]
    return graph, x


def finish(graph: gs.Graph, x: gs.Variable) -> gs.Graph:
    """Make `x` the graph's output ``output``."""
    x.name = "output"
    graph.outputs = [x]
    return graph


def export(graph: gs.Graph, doc_string: str) -> onnx.ModelProto:
    """The graph as a model with the given documentation."""
    graph = graph.copy()
    constants = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
    values = {tensor.name: tensor.values for tensor in constants}
    # graphsurgeon copies every initializer four times on its way out (VGG-16: 5 s, 2.2 GB): let it write the graph
    # with empty ones and fill them in afterwards.
    for tensor in constants:
        tensor.values = tensor.values[:0]
    model = gs.export_onnx(graph, doc_string=doc_string)
    # A copied graph forgets its producer.
    model.producer_name = PRODUCER
    for initializer in model.graph.initializer:
        initializer.dims[:] = values[initializer.name].shape
        initializer.raw_data = values[initializer.name].tobytes()
    return model


@gs.Graph.register()
def conv(
    self: gs.Graph,
    x: gs.Variable,
    name: str,
    weights: Weights,
    channels: int,
    kernel: int,
    stride: int = 1,
    pad: int = 0,
    bias: bool = False,
) -> gs.Variable:
    """Convolution with a square kernel, the same padding on all four sides."""
    names = [("weight", (channels, x.shape[1], kernel, kernel))] + [("bias", (channels,))] * bias
    attrs = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "dilations": [1, 1], "group": 1}
    shape = [channels, *_window(x, kernel, stride, pad)]
    return _node(self, "Conv", name, [x, *_constants(name, weights, names)], shape, attrs)


@gs.Graph.register()
def batch_norm(self: gs.Graph, x: gs.Variable, name: str, weights: Weights, gain: float = 1.0) -> gs.Variable:
    """Batch normalization of inference; `gain` is the size asked of its scale."""
    scale = gs.Constant(f"{name}.weight", weights(f"{name}.weight", (x.shape[1],), gain))
    names = [(part, (x.shape[1],)) for part in ("bias", "running_mean", "running_var")]
    inputs = [x, scale, *_constants(name, weights, names)]
    return _node(self, "BatchNormalization", name, inputs, x.shape[1:], {"epsilon": 1e-5})


@gs.Graph.register()
def gemm(self: gs.Graph, x: gs.Variable, name: str, weights: Weights, features: int) -> gs.Variable:
    """Fully connected layer with a bias; the weight is (features, in), read transposed."""
    names = [("weight", (features, x.shape[1])), ("bias", (features,))]
    return _node(self, "Gemm", name, [x, *_constants(name, weights, names)], [features], {"transB": 1})


@gs.Graph.register()
def relu(self: gs.Graph, x: gs.Variable, name: str) -> gs.Variable:
    """max(x, 0)."""
    return _node(self, "Relu", name, [x], x.shape[1:])


@gs.Graph.register()
def add(self: gs.Graph, x: gs.Variable, y: gs.Variable, name: str) -> gs.Variable:
    """x + y, of equal shapes."""
    return _node(self, "Add", name, [x, y], x.shape[1:])


@gs.Graph.register()
def max_pool(self: gs.Graph, x: gs.Variable, name: str, kernel: int, stride: int, pad: int = 0) -> gs.Variable:
    """Largest value of a square window."""
    attrs = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
    return _node(self, "MaxPool", name, [x], [x.shape[1], *_window(x, kernel, stride, pad)], attrs)


@gs.Graph.register()
def global_average_pool(self: gs.Graph, x: gs.Variable, name: str) -> gs.Variable:
    """Mean over all positions, kept as two axes of length one."""
    return _node(self, "GlobalAveragePool", name, [x], [x.shape[1], 1, 1])


@gs.Graph.register()
def flatten(self: gs.Graph, x: gs.Variable, name: str) -> gs.Variable:
    """(N, channels, height, width) -> (N, channels * height * width)."""
    return _node(self, "Flatten", name, [x], [int(np.prod(x.shape[1:]))], {"axis": 1})


@gs.Graph.register()
def subsample_and_pad(self: gs.Graph, x: gs.Variable, name: str, channels: int, stride: int) -> gs.Variable:
    """Shortcut without parameters: every `stride`-th position, then zero channels on both sides up to `channels`."""
    slices = [("starts", [0, 0]), ("ends", [x.shape[2], x.shape[3]]), ("axes", [2, 3]), ("steps", [stride, stride])]
    inputs = [gs.Constant(f"{name}.slice.{part}", np.array(value, np.int64)) for part, value in slices]
    shape = [x.shape[1], *_window(x, 1, stride, 0)]
    x = _node(self, "Slice", f"{name}.slice", [x, *inputs], shape)
    side = (channels - x.shape[1]) // 2
    pads = gs.Constant(f"{name}.pad.pads", np.array([0, side, 0, 0, 0, channels - x.shape[1] - side, 0, 0], np.int64))
    return _node(self, "Pad", f"{name}.pad", [x, pads], [channels, *x.shape[2:]], {"mode": "constant"})


def _window(x: gs.Variable, kernel: int, stride: int, pad: int) -> list[int]:
    return [(size + 2 * pad - kernel) // stride + 1 for size in x.shape[2:]]


def _constants(name: str, weights: Weights, parts: Sequence[tuple[str, tuple[int, ...]]]) -> list[gs.Constant]:
    return [gs.Constant(f"{name}.{part}", weights(f"{name}.{part}", shape)) for part, shape in parts]


def _node(
    graph: gs.Graph,
    op: str,
    name: str,
    inputs: Sequence[gs.Tensor],
    shape: Sequence[int],
    attrs: dict[str, Any] | None = None,
) -> gs.Variable:
    out = gs.Variable(f"{name}.out", np.float32, ["N", *shape])
    return graph.layer(op=op, name=name, inputs=list(inputs), outputs=[out], attrs=attrs or {})[0]

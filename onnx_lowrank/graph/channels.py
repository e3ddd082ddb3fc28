"""Channels that run side by side through several tensors: what makes them, holds something for each, and mixes them.

Between the convolution that makes a channel and those that mix it into others lie nodes that work on every channel by
itself: normalisations, activations, depthwise convolutions, sums. What one of these tensors is without, all have to be
without: they are one family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from scipy.cluster.hierarchy import DisjointSet

from onnx_lowrank.graph.batchnorm import in_inference
from onnx_lowrank.graph.constants import Constant, Constants
from onnx_lowrank.graph.model import Model, attributes, readers, tensors_read
from onnx_lowrank.graph.shapes import Shapes

ALONE = {
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu", "Softplus"),
    *("Softsign", "Gelu", "Mish", "Erf", "ThresholdedRelu", "Identity", "Dropout", "Neg", "Abs", "Sqrt", "Exp", "Cast"),
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
}
"""Operators whose first input and output have the same channels, each of which is worked on by itself."""

TOGETHER = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "PRelu"}
"""Operators that work number by number on several inputs, some of which may be stored."""

REDUCED = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2"}
"""Operators that leave channels apart where they go over other axes."""


@dataclass(frozen=True)
class Part:
    """An input of a node that holds something for each channel.

    Parameters
    ----------
    position, input
        The node's place in the graph, and which of its inputs.
    axis
        Where the channels are in it.
    regroup
        Whether the node is a depthwise convolution, whose groups are the channels.
    """

    position: int
    input: int
    axis: int
    regroup: bool = False


@dataclass(frozen=True)
class Reading:
    """A convolution or product that mixes the channels of a tensor.

    Parameters
    ----------
    tensor
        What is read.
    norms
        Norm of what the kernel has for each channel, by output channel: (O, C), in float32.
    part
        The kernel.
    rank
        Axes of the tensor.
    takes_constants
        Whether a channel that is the same number everywhere can go into the bias: nothing is padded.
    """

    tensor: str
    norms: np.ndarray
    part: Part
    rank: int
    takes_constants: bool


@dataclass(frozen=True)
class Family:
    """Tensors with the same channels, (N, C, ...) each.

    Parameters
    ----------
    tensors
        Their names.
    makers
        Places of the layers that make them in the graph.
    size
        Channels, C.
    parts
        What nodes hold for each channel.
    readings
        All that mixes them.
    """

    tensors: tuple[str, ...]
    makers: tuple[int, ...]
    size: int
    parts: tuple[Part, ...]
    readings: tuple[Reading, ...]


def families(model: Model, shapes: Shapes) -> list[Family]:
    """Families of the main graph whose channels are all made by layers with a stored kernel, and read by such.

    Parameters
    ----------
    shapes
        Of its tensors; of those whose shape is not there nothing is said.
    """
    return [] if model.proto.training_info else _Walk(model, shapes).run()


UNKNOWN = (0, 0)
"""Axes and channels of a tensor of which nothing is known."""

BIAS = 2
"""Which input of a convolution is its bias."""


@dataclass
class _Seen:
    """What a node says of channels: tensors that share them, what it holds for them, by tensor, and what it mixes."""

    joined: tuple[str, ...] = ()
    parts: list[tuple[str, Part]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


class _Walk:
    """The graph, node by node."""

    def __init__(self, model: Model, shapes: Shapes) -> None:
        self._graph, self._opset = model.graph, model.opset
        self._sizes = {name: (len(shape), shape[1]) for name, shape in shapes.items() if len(shape) > 1}
        """Axes and channels of each tensor, as far as they are known; more of them as the nodes pass."""
        self._constants, self._count = Constants(model), readers(model.proto)
        self._handlers: dict[str, Callable[[int, onnx.NodeProto], _Seen | None]] = {
            "Conv": self._conv,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "BatchNormalization": self._norm,
            "Pad": self._pad,
            "Resize": self._resize,
            **dict.fromkeys(ALONE, self._alone),
            **dict.fromkeys(TOGETHER, self._together),
            **dict.fromkeys(REDUCED, self._reduced),
        }

    def run(self) -> list[Family]:
        together, closed = DisjointSet(), {value.name for value in [*self._graph.input, *self._graph.output]}
        parts: list[tuple[str, Part]] = []
        readings: list[Reading] = []
        made: dict[str, int] = {}
        for position, node in enumerate(self._graph.node):
            ends = {name for name in [*tensors_read(node), *node.output] if name and not self._constants.find(name)}
            for name in ends:
                together.add(name)
            known = node.domain in ("", "ai.onnx") and node.input and node.output
            handler = self._handlers.get(node.op_type) if known else None
            seen = handler(position, node) if handler else None
            if seen is None or not ends.issuperset(seen.joined):  # one of them is stored
                closed |= ends
                continue
            for other in seen.joined[1:]:
                together.merge(seen.joined[0], other)
            size = next((self._sizes[name] for name in seen.joined if name in self._sizes), None)
            self._sizes |= {name: size for name in seen.joined if size and name not in self._sizes}
            parts += seen.parts
            readings += seen.readings
            if not seen.joined:
                made[node.output[0]] = position
        return [
            Family(
                tuple(sorted(names)),
                tuple(sorted(made[name] for name in names & made.keys())),
                self._sizes[next(iter(names))][1],
                tuple(part for name, part in parts if name in names),
                tuple(reading for reading in readings if reading.tensor in names),
            )
            for names in together.subsets()
            if not names & closed
            and names & made.keys()
            and any(reading.tensor in names for reading in readings)
            and len(sizes := {self._sizes.get(name, UNKNOWN)[1] for name in names}) == 1
            and min(sizes) > 1
        ]

    def _stored(self, name: str, *, alone: bool = False) -> Constant | None:
        """The stored tensor called `name`, which no user may feed; with `alone` only one that nothing else reads."""
        constant = self._constants.find(name) if name else None
        if constant is None or not constant.fixed:
            return None
        if alone and any(self._count[link] > 1 for link in self._constants.chain(name)):
            return None
        return constant

    def _bias(self, node: onnx.NodeProto) -> bool:
        """Whether a node has no bias, or a stored one."""
        return len(node.input) <= BIAS or not node.input[BIAS] or self._stored(node.input[BIAS]) is not None

    def _conv(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        constant = self._stored(node.input[1], alone=True) if len(node.input) > 1 else None
        if constant is None or not self._bias(node):
            return None
        attrs, weight = attributes(node), constant.read()
        group = attrs["group"].i if "group" in attrs else 1
        source, output = node.input[0], node.output[0]
        self._sizes.setdefault(source, (weight.ndim, weight.shape[1] * group))
        self._sizes.setdefault(output, (weight.ndim, len(weight)))
        made = [(output, Part(position, 1, 0, regroup=group > 1)), (output, Part(position, BIAS, 0))]
        if group > 1:
            depthwise = weight.shape[:2] == (group, 1)
            return _Seen((source, output), made) if depthwise else None
        pads = any(attrs["pads"].ints) if "pads" in attrs else False
        bare = "auto_pad" not in attrs or attrs["auto_pad"].s in (b"NOTSET", b"VALID")
        part = Part(position, 1, 1)
        norms = np.linalg.norm(weight.astype(np.float32).reshape(*weight.shape[:2], -1), axis=2)
        return _Seen((), [*made, (source, part)], [Reading(source, norms, part, weight.ndim, bare and not pads)])

    def _gemm(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        attrs = attributes(node)
        turned = "transB" in attrs and bool(attrs["transB"].i)
        if "transA" in attrs and attrs["transA"].i:
            return None
        seen = self._product(position, node, 1 if turned else 0)
        if seen is None or not self._bias(node):
            return None
        bias = self._stored(node.input[BIAS]) if len(node.input) > BIAS else None
        shape = bias.read().shape if bias else ()
        if shape and shape[-1] > 1:  # as all that is added number by number, it ends in the channels
            seen.parts.append((node.output[0], Part(position, BIAS, len(shape) - 1)))
        return seen

    def _matmul(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        return self._product(position, node, 0)

    def _product(self, position: int, node: onnx.NodeProto, axis: int) -> _Seen | None:
        """A matrix product, whose stored kernel has the channels that it reads on `axis`."""
        constant = self._stored(node.input[1], alone=True) if len(node.input) > 1 else None
        source, output = node.input[0], node.output[0]
        if constant is None or self._sizes.get(source, UNKNOWN)[0] != 2:
            return None
        weight = constant.read()
        if weight.ndim != 2:
            return None
        self._sizes.setdefault(output, (2, weight.shape[1 - axis]))
        part = Part(position, 1, axis)
        norms = np.abs(np.moveaxis(weight.astype(np.float32), axis, 1))
        return _Seen(
            (), [(output, Part(position, 1, 1 - axis)), (source, part)], [Reading(source, norms, part, 2, False)]
        )

    def _alone(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        rest = [self._stored(name) for name in node.input[1:] if name]
        if any(value is None or value.read().size != 1 for value in rest) or any(node.output[1:]):
            return None
        return _Seen((node.input[0], node.output[0]))

    def _norm(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        if not in_inference(node, self._opset) or any(self._stored(name) is None for name in node.input[1:]):
            return None
        output = node.output[0]
        return _Seen((node.input[0], output), [(output, Part(position, index, 0)) for index in range(1, 5)])

    def _together(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        output = node.output[0]
        known = [self._sizes[name] for name in [output, *node.input] if name in self._sizes]
        rank, channels = max(known, default=UNKNOWN)
        if rank < 2:
            return None
        joined, parts = [output], []
        for index, name in enumerate(node.input):
            stored = self._stored(name)
            if stored is None and self._constants.find(name):
                return None
            if stored is None:
                size = self._sizes.get(name, UNKNOWN)
                if size not in ((rank, channels), (rank, 1)):
                    return None
                joined += [name] if size[1] == channels else []
                continue
            shape = stored.read().shape
            axis = 1 - (rank - len(shape))
            if len(shape) > rank or (axis >= 0 and shape[axis] not in (1, channels)):
                return None
            if axis >= 0 and shape[axis] > 1:
                parts.append((output, Part(position, index, axis)))
        return _Seen(tuple(joined), parts)

    def _reduced(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        attrs, rank = attributes(node), self._sizes.get(node.input[0], UNKNOWN)[0]
        if "axes" in attrs:
            axes: Iterable[int] = attrs["axes"].ints
        else:
            constant = self._stored(node.input[1]) if len(node.input) > 1 else None
            axes = constant.read().ravel().tolist() if constant else ()
        over = {axis % rank for axis in axes} if rank else set()
        if not over or min(over) < 2:
            return None
        kept = "keepdims" not in attrs or bool(attrs["keepdims"].i)
        self._sizes.setdefault(node.output[0], (rank - (0 if kept else len(over)), self._sizes[node.input[0]][1]))
        return _Seen((node.input[0], node.output[0]))

    def _pad(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        rest = [self._stored(name) for name in node.input[1:] if name]
        if not rest or None in rest or any(node.input[3:]):
            return None
        amounts = self._constants.find(node.input[1])
        padded = amounts.read().ravel() if amounts else np.ones(1)
        bare = len(padded) % 2 == 0 and not padded.reshape(2, -1)[:, :2].any()
        return _Seen((node.input[0], node.output[0])) if bare else None

    def _resize(self, position: int, node: onnx.NodeProto) -> _Seen | None:
        region = self._stored(node.input[1]) if len(node.input) == 3 else None
        bare = len(node.input) == 3 and "axes" not in attributes(node)
        bare = bare and (not node.input[1] or (region is not None and region.read().size == 0))
        scales = self._stored(node.input[2]) if bare else None
        known = scales.read().ravel() if scales else np.zeros(0)
        same = len(known) > 2 and bool((known[:2] == 1).all())
        return _Seen((node.input[0], node.output[0])) if same else None

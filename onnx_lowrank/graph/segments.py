"""A model cut at its layers into segments that run one after the other.

Running a network from its input up to each of its layers costs work quadratic in the depth. Instead every tensor that
a later node reads is kept at the cuts, and each segment runs once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.find import Found
from onnx_lowrank.graph.islands import Naming, build_island
from onnx_lowrank.graph.limits import stored_bytes
from onnx_lowrank.graph.model import Model, attributes, tensors_read
from onnx_lowrank.types import Chain, Layer


@dataclass(frozen=True)
class Segment:
    """Nodes that run together.

    Parameters
    ----------
    inputs, outputs
        Tensors that it reads, and those it makes that are needed later.
    """

    proto: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    folder: Path | None = None
    """What the places of its external data are relative to."""

    def serialize(self, dtypes: Mapping[str, np.dtype]) -> bytes:
        """Bytes of a model of just these nodes, for inputs of the dtypes given and of any shape."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for name in self.inputs:
            kind = onnx.helper.np_dtype_to_tensor_dtype(dtypes[name])
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        return proto.SerializeToString()


@dataclass(frozen=True)
class Follow:
    """What becomes of a layer's output y: ``scale * y + shift + other``, perhaps cut off at both ends.

    Parameters
    ----------
    scale, shift
        Of a BatchNormalization, (out channels); None where there is none.
    other
        Name of the activation that is added; empty where none is.
    low, high
        What goes on is not below or above these: 0 and infinity after a ReLU.
    reading
        Norm of the kernels that each channel meets next, (out channels); None where more than convolutions read it.
    """

    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    other: str = ""
    low: float = -math.inf
    high: float = math.inf
    reading: np.ndarray | None = None

    @property
    def bounded(self) -> bool:
        """Whether anything is cut off."""
        return self.low > -math.inf or self.high < math.inf


@dataclass(frozen=True)
class Cut:
    """A layer where the model is cut.

    Parameters
    ----------
    layer
        The layer.
    before
        What has to run before it; None where there is nothing.
    alone
        The layer's node by itself.
    source, output
        Its activation in and out.
    weight_input
        Which of its inputs is the kernel.
    source_axis, output_axis
        Where the channels (for a product, the features) are in both.
    follow
        What becomes of its output.
    gain
        What its node multiplies the product with.
    bias
        What its node adds to the output, zeros where it could and does not; None where it cannot or is not constant.
    alive
        Tensors that are still read after the layer has run.
    """

    layer: Layer
    before: Segment | None
    alone: Segment
    source: str
    output: str
    weight_input: int
    source_axis: int
    output_axis: int
    follow: Follow
    gain: float
    bias: np.ndarray | None
    alive: frozenset[str]

    def output_shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for an input of shape `source`."""
        spec = self.layer.spec
        if spec.ndim:
            return (source[0], spec.out_channels, *spec.output_size(source[2:]))
        shape = list(source)
        if self.source_axis != self.output_axis:  # a Gemm that transposes its input
            shape.reverse()
        shape[self.output_axis] = spec.out_channels
        return tuple(shape)


def cuts(model: Model, found: Found, names: Sequence[str]) -> Iterator[Cut]:
    """The layers called `names`, in the order of the graph, each with what has to run before it."""
    whole = _Whole(model)
    layers = {layer.name: layer for layer in found.layers}
    later = whole.later
    start = 0
    for position, name in sorted((found.places[name].position, name) for name in names):
        pending = [i for i in range(start, position) if i not in whole.constant]
        start = position + 1
        node = whole.nodes[position]
        yield Cut(
            layers[name],
            whole.segment(pending, later[position]) if pending else None,
            whole.segment([position], {node.output[0]}),
            node.input[1 - found.places[name].weight_input],
            node.output[0],
            found.places[name].weight_input,
            *_feature_axes(node, found.places[name].weight_input),
            whole.follow(node.output[0]),
            next((a.f for a in node.attribute if node.op_type == "Gemm" and a.name == "alpha"), 1.0),
            whole.bias(node, layers[name]),
            frozenset(later[position + 1]),
        )


def last_segment(model: Model, found: Found, names: Sequence[str]) -> Segment | None:
    """What runs after the last of the layers called `names`; None where that ends the model."""
    whole = _Whole(model)
    start = max(found.places[name].position for name in names) + 1
    pending = [i for i in range(start, len(whole.nodes)) if i not in whole.constant]
    return whole.segment(pending, whole.later[-1]) if pending else None


def sources(model: Model, found: Found, names: Sequence[str]) -> Segment | None:
    """What makes the inputs of the layers called `names`, all at once; None where they are the model's own."""
    whole = _Whole(model)
    wanted = {whole.nodes[p.position].input[1 - p.weight_input] for p in (found.places[name] for name in names)}
    end = max((i for i, node in enumerate(whole.nodes) if wanted & set(node.output)), default=-1)
    pending = [i for i in range(end + 1) if i not in whole.constant]
    return whole.segment(pending, wanted) if pending else None


def divided(model: Model, most: int) -> list[Segment]:
    """A whole model in segments of at most `most` bytes of stored tensors each, or of one node where that has more."""
    whole = _Whole(model)
    parts: list[list[int]] = [[]]
    held: dict[str, int] = {}
    for position in range(len(whole.nodes)):
        if position in whole.constant and not whole.results.intersection(whole.nodes[position].output):
            continue
        stored = whole.stored_by(position)
        if parts[-1] and stored.keys() - held.keys() and sum((held | stored).values()) > most:
            parts.append([])
            held = {}
        parts[-1].append(position)
        held |= stored
    return [whole.segment(part, whole.later[part[-1] + 1]) for part in parts if part]


def island_of(model: Model, cut: Cut, chain: Chain, kernels: Sequence[np.ndarray]) -> Segment:
    """The nodes that stand for a layer, to run by themselves."""
    numbers = [str(i) for i in range(len(chain))]
    # names of its own: they need to differ only from the layer's input, output and bias
    stem = f"{cut.output}_lowrank"
    names, tensors, nodes = (
        tuple(f"{stem}_{kind}_{i}" for i in ns) for kind, ns in (("k", numbers), ("t", numbers[1:]), ("n", numbers[1:]))
    )
    parts = {i: tuple(f"{stem}_p_{i}_{j}" for j in range(len(stage.parts))) for i, stage in enumerate(chain)}
    naming = Naming(names, tensors, nodes, parts)
    node = cut.alone.proto.graph.node[-1]
    island = build_island(node, cut.weight_input, chain, kernels, cut.layer.dtype, naming, model.opset)
    proto = onnx.ModelProto()
    proto.CopyFrom(cut.alone.proto)
    del proto.graph.node[-1], proto.graph.output[:]
    proto.graph.node.extend(island.nodes)
    proto.graph.initializer.extend(island.initializers)
    proto.graph.output.append(onnx.ValueInfoProto(name=cut.output))
    return Segment(proto, (cut.source,), (cut.output,), model.folder)


def _feature_axes(node: onnx.NodeProto, weight_input: int) -> tuple[int, int]:
    """Axes of the features in a layer's activation and in its output."""
    if node.op_type == "Gemm":
        return (0 if any(a.name == "transA" and a.i for a in node.attribute) else -1), -1
    if node.op_type == "MatMul":
        return (-1, -1) if weight_input == 1 else (-2, -2)
    return 1, 1


class _Whole:
    """The graph, indexed."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._stored = {t.name: t for t in model.graph.initializer}
        self._constants = Constants(model)
        self.nodes = list(model.graph.node)
        self.reads = [tensors_read(node) for node in self.nodes]
        self.results = {o.name for o in model.graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node, names in zip(self.nodes, self.reads, strict=True):
            for name in names:
                self._readers.setdefault(name, []).append(node)
        known = set(self._stored)
        self.constant: set[int] = set()
        for index, node in enumerate(self.nodes):  # what follows from stored tensors alone comes along where needed
            if self.reads[index] <= known and not node.op_type.startswith("Random"):
                self.constant.add(index)
                known.update(node.output)
        self.later: list[set[str]] = [self.results]
        for names in reversed(self.reads):
            self.later.append(self.later[-1] | names)
        self.later.reverse()  # later[i]: what node i and all after it read
        self._makers = {out: index for index in self.constant for out in self.nodes[index].output}

    def segment(self, positions: Sequence[int], needed: set[str]) -> Segment:
        """The nodes at `positions`, returning what is in `needed`."""
        chosen, todo = set(positions), [name for i in positions for name in self.reads[i]]
        while todo:
            index = self._makers.get(todo.pop())
            if index is not None and index not in chosen:
                chosen.add(index)
                todo += self.reads[index]
        ordered = [self.nodes[i] for i in sorted(chosen)]
        made = {out for node in ordered for out in node.output if out}
        wanted = {name for i in chosen for name in self.reads[i]}
        stored = wanted & set(self._stored)
        outputs = tuple(sorted({out for i in positions for out in self.nodes[i].output if out} & needed))
        source = self._model.proto
        proto = onnx.ModelProto(
            ir_version=max(source.ir_version, 4), opset_import=source.opset_import, functions=source.functions
        )
        proto.graph.name = "segment"
        proto.graph.node.extend(ordered)
        proto.graph.initializer.extend(self._stored[name] for name in sorted(stored))
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return Segment(proto, tuple(sorted(wanted - made - stored)), outputs, self._model.folder)

    def stored_by(self, position: int) -> dict[str, int]:
        """Bytes of the stored tensors that a node reads, and those that its inputs are derived from."""
        found: dict[str, int] = {}
        todo, seen = list(self.reads[position]), set[int]()
        while todo:
            name = todo.pop()
            index = self._makers.get(name)
            if name in self._stored:
                found[name] = stored_bytes(self._stored[name])
            elif index is not None and index not in seen:
                seen.add(index)
                todo += self.reads[index]
        return found

    def bias(self, node: onnx.NodeProto, layer: Layer) -> np.ndarray | None:
        """The constant that a layer adds to its output."""
        attrs = attributes(node)
        if node.op_type == "MatMul":
            return None
        if not layer.bias:
            return np.zeros(layer.spec.out_channels)
        constant = self._constants.find(node.input[2])
        if constant is None or constant.overridable:
            return None
        beta = attrs["beta"].f if "beta" in attrs else 1.0
        return beta * constant.read().astype(np.float64)

    def follow(self, name: str) -> Follow:
        """What becomes of a layer's output, as far as it has one reader at a time."""
        known = Follow()
        while len(readers := self._readers.get(name, [])) == 1:
            node = readers[0]
            if (
                node.op_type == "BatchNormalization"
                and node.input[0] == name
                and known.scale is None
                and not known.other
            ):
                values = [self._constants.find(i) for i in node.input[1:5]]
                if any(v is None for v in values):
                    break
                gain, offset, mean, variance = (v.read().astype(np.float64) for v in values if v)
                scale = gain / np.sqrt(variance + next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5))
                known = Follow(scale, offset - scale * mean)
            elif node.op_type == "Add" and not known.other:
                other = node.input[1] if node.input[0] == name else node.input[0]
                if self._constants.find(other) or other == name:
                    break
                known = replace(known, other=other)
            elif node.op_type in ("Relu", "Clip"):
                low, high = self._bounds(node)
                known, name = replace(known, low=low, high=high), node.output[0]
                break
            elif node.op_type != "Identity":
                break
            name = node.output[0]
        return replace(known, reading=None if known.other else self._reading(name))

    def _bounds(self, node: onnx.NodeProto) -> tuple[float, float]:
        """Where a Relu or a Clip cuts off; nowhere as far as that is not constant."""
        if node.op_type == "Relu":
            return 0.0, math.inf
        limits = [-math.inf, math.inf]
        for index, key in enumerate(("min", "max")):
            given = node.input[1 + index] if len(node.input) > 1 + index else ""
            constant = self._constants.find(given) if given else None
            attribute = next((a.f for a in node.attribute if a.name == key), None)
            if constant is not None and not constant.overridable:
                limits[index] = float(constant.read())
            elif attribute is not None:
                limits[index] = attribute
        return limits[0], limits[1]

    def _reading(self, name: str) -> np.ndarray | None:
        """Norms of the kernels that the channels of a tensor meet, if convolutions are all that reads it."""
        readers = self._readers.get(name, [])
        squares: list[np.ndarray] = []
        for node in readers:
            constant = self._constants.find(node.input[1]) if node.op_type == "Conv" and node.input[0] == name else None
            if constant is None:
                return None
            kernel = np.square(constant.read().astype(np.float64))
            group = next((a.i for a in node.attribute if a.name == "group"), 1)
            blocks = kernel.reshape(group, len(kernel) // group, kernel.shape[1], -1)  # (g, O/g, I/g, k)
            squares.append(blocks.sum(axis=(1, 3)).ravel())
        return np.sqrt(sum(squares)) if squares and name not in self.results else None

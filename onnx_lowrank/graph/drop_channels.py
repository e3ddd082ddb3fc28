"""A graph without some of its channels, and one that tells how far each channel reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lowrank.graph.channels import BIAS, Family
from onnx_lowrank.graph.constants import Constants, add_initializer, drop_unread, lists_all
from onnx_lowrank.graph.model import Model, attributes, fresh_name, tensor_names


@dataclass(frozen=True)
class Kept:
    """What stays of a family.

    Parameters
    ----------
    channels
        Which, ascending.
    values
        What each channel is where a reading takes constants, (C,) by tensor; elsewhere those left out are 0.
    """

    family: Family
    channels: np.ndarray
    values: Mapping[str, np.ndarray]

    @property
    def gone(self) -> np.ndarray:
        """The other channels."""
        return np.setdiff1d(np.arange(self.family.size), self.channels)


def with_channels(model: Model, kept: Sequence[Kept]) -> Model:
    """A copy of `model` with only the channels kept of each family."""
    copy = model.copy()
    constants, taken, listed = Constants(copy), tensor_names(copy.proto), lists_all(copy)
    nodes = list(copy.graph.node)
    takes: dict[tuple[int, int], list[tuple[int, Kept]]] = {}
    biases: dict[int, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for each in kept:
        biases |= shifted_biases(copy, each)
        sizes |= dict.fromkeys(each.family.tensors, len(each.channels))
        for part in each.family.parts:
            takes.setdefault((part.position, part.input), []).append((part.axis, each))
            if part.regroup:
                attributes(nodes[part.position])["group"].i = len(each.channels)
    unread: list[str] = []
    made: dict[object, str] = {}
    for position, index in sorted({*takes, *((position, BIAS) for position in biases)}):
        node, cuts = nodes[position], takes.get((position, index), [])
        old = node.input[index] if len(node.input) > index else ""
        shifted = biases.get(position) if index == BIAS else None
        if not old and shifted is None:
            continue  # a bias that is not there
        # what several nodes read is cut once, where they are of one family
        key = (old, *((axis, id(each)) for axis, each in cuts)) if shifted is None else (position,)
        if key not in made:
            value = _read(constants, old) if shifted is None else shifted
            for axis, each in cuts:
                value = value.take(each.channels, axis)
            made[key] = fresh_name(f"{old or node.output[0] + '_bias'}_kept", taken)
            tensor = numpy_helper.from_array(np.ascontiguousarray(value), made[key])
            add_initializer(copy, tensor, listed=listed)
        unread.append(old)
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = made[key]
    drop_unread(copy, unread)
    for value_info in copy.graph.value_info:
        dims = value_info.type.tensor_type.shape.dim
        if value_info.name in sizes and len(dims) > 1:
            dims[1].dim_value = sizes[value_info.name]
    return copy


def shifted_biases(model: Model, kept: Kept) -> dict[int, np.ndarray]:
    """Biases that take what channels left out add to the outputs of the nodes that read them, (O,), by the node's position.

    In the kernel's type: not finite where that does not hold them.
    """
    constants, biases = Constants(model), dict[int, np.ndarray]()
    for reading in kept.family.readings:
        values = kept.values[reading.tensor][kept.gone] if reading.takes_constants else np.zeros(1)
        if values.any():
            node = model.graph.node[reading.part.position]
            kernel = _read(constants, node.input[1])
            over_taps = kernel.astype(np.float64).reshape(*kernel.shape[:2], -1).sum(axis=2)
            bias = over_taps[:, kept.gone] @ values
            if len(node.input) > BIAS and node.input[BIAS]:
                bias += _read(constants, node.input[BIAS]).astype(np.float64)
            with np.errstate(over="ignore"):
                biases[reading.part.position] = bias.astype(kernel.dtype)
    return biases


def with_ranges(model: Model, ranks: Mapping[str, int]) -> tuple[Model, list[str]]:
    """A copy that returns the least and the largest number of every channel instead of what it returned, and the outputs' names.

    Parameters
    ----------
    ranks
        Axes of each tensor that is looked at, by its name; two outputs for each, in this order, (C,) in float32.
    """
    copy = model.copy()
    taken, listed, outputs = tensor_names(copy.proto), lists_all(copy), list[str]()
    for name, rank in ranks.items():
        wide = fresh_name(f"{name}_wide", taken)  # reductions do not take every type
        copy.graph.node.append(onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.FLOAT))
        axes = [axis for axis in range(rank) if axis != 1]
        for kind in ("ReduceMin", "ReduceMax"):
            node = onnx.helper.make_node(kind, [wide], [fresh_name(f"{name}_{kind}", taken)], keepdims=0)
            if copy.opset < 18:
                node.attribute.append(onnx.helper.make_attribute("axes", axes))
            else:
                node.input.append(fresh_name(f"{node.output[0]}_axes", taken))
                add_initializer(copy, numpy_helper.from_array(np.array(axes, np.int64), node.input[1]), listed=listed)
            copy.graph.node.append(node)
            outputs += node.output
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return copy, outputs


def _read(constants: Constants, name: str) -> np.ndarray:
    constant = constants.find(name)
    assert constant is not None
    return constant.read()

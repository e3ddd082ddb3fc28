"""Models without their weights: large tensors read made-up numbers from one file that many models share."""

from __future__ import annotations

import math

import numpy as np
import onnx

from onnx_lowrank.graph.constants import read_tensor
from onnx_lowrank.graph.model import Model, all_graphs

KEPT_BYTES = 256
"""Tensors below this keep their values, and those of one axis: biases, variances, what sizes are computed from."""

ALIGNMENT = 4096
"""Of sections in the file, so that a runtime can map them."""

KINDS = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.DOUBLE: "float64",
}
"""Types of numbers that are made up; others are kept."""


class Hollow:
    """Models emptied one after the other, and the file of numbers that stands for all that was taken out.

    The file has a section for each type and each power of two that weights are as large as, no longer than the largest
    such tensor; every tensor of that size reads its beginning. So activations stay about as large as they are.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._bytes: dict[tuple[str, int], int] = {}
        self._powers: dict[tuple[str, tuple[int, ...]], int] = {}
        self._waiting: list[tuple[onnx.TensorProto, tuple[str, int], int]] = []

    def emptied(self, model: Model) -> onnx.ModelProto:
        """A copy of `model` whose large tensors are places in the file; they are right once :meth:`sections` was called."""
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        for tensor in (tensor for graph in all_graphs(proto.graph) for tensor in graph.initializer):
            kind = KINDS.get(tensor.data_type)
            if kind is None:
                continue
            size = math.prod(tensor.dims) * np.dtype(kind).itemsize
            if size < KEPT_BYTES or len(tensor.dims) < 2:
                continue
            key = kind, self._power(tensor, model)
            self._bytes[key] = max(self._bytes.get(key, 0), -(-size // ALIGNMENT) * ALIGNMENT)
            bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=list(tensor.dims))
            bare.data_location = onnx.TensorProto.EXTERNAL
            tensor.CopyFrom(bare)
            self._waiting.append((tensor, key, size))
        return proto

    def sections(self) -> list[dict[str, object]]:
        """What the file holds, in order: type, standard deviation and bytes of each section."""
        offset, offsets = 0, dict[tuple[str, int], int]()
        for key, size in sorted(self._bytes.items()):
            offsets[key], offset = offset, offset + size
        for tensor, key, size in self._waiting:
            for name, text in (("location", self._file), ("offset", offsets[key]), ("length", size)):
                tensor.external_data.add(key=name, value=str(text))
        self._waiting.clear()
        return [
            {"dtype": kind, "scale": 2.0**power, "bytes": size} for (kind, power), size in sorted(self._bytes.items())
        ]

    def _power(self, tensor: onnx.TensorProto, model: Model) -> int:
        """The power of two nearest to how large values are; never so small that products of them would be denormal."""
        key = tensor.name, tuple(tensor.dims)  # random kernels of one name and shape are as large in any model
        if key not in self._powers:
            values = read_tensor(tensor, model.folder)
            size = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
            self._powers[key] = round(float(np.clip(math.log2(size), -12, 6))) if 0 < size < math.inf else -12
        return self._powers[key]

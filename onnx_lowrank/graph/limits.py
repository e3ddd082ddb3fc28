"""What a model may claim: sizes that this machine could not hold are refused before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnx_lowrank.types import LowRankError

UNKNOWN_MEMORY = 1 << 40
"""Bytes taken where the system does not say how many it has."""


PACKED = {"UINT2": 2, "INT2": 2, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
"""Types of which several are in a byte, with their bits, by name: not every version of onnx has them all."""

HELD = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
"""Fields of a tensor that may hold its numbers in the place of raw data."""

MODEST = 1 << 16
"""Elements that a tensor may claim without holding them: nothing of that size does harm."""


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return UNKNOWN_MEMORY


def check_fits(what: str, size: int, hint: str) -> None:
    """See that `size` bytes could be held.

    Raises
    ------
    LowRankError
        Where this machine has less memory than that; `hint` says what to do.
    """
    if size > machine_memory():
        raise LowRankError(
            f"{what} takes {size / 1e9:,.0f} GB, more than the {machine_memory() / 1e9:,.0f} GB of this machine: {hint}"
        )


def check_shapes(shapes: Mapping[str, Sequence[int]], itemsize: int = 4) -> None:
    """See that every tensor of `shapes` could be held, before the model is run or fed.

    Raises
    ------
    LowRankError
        As :func:`check_fits`.
    """
    largest = max(shapes, key=lambda name: math.prod(shapes[name]), default=None)
    if largest is not None:
        check_fits(
            f"tensor '{largest}' of {list(shapes[largest])}",
            itemsize * math.prod(shapes[largest]),
            "give --input-shape with smaller sizes; where they are right already, the model is damaged",
        )


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor as raw data, from its shape and type: reading the data would copy it.

    Raises
    ------
    LowRankError
        Where its type is none, or its shape.
    """
    try:
        bits = PACKED.get(onnx.TensorProto.DataType.Name(tensor.data_type)) or 8 * dtype_of(tensor).itemsize
    except (ValueError, KeyError) as error:
        raise LowRankError(
            f"tensor '{tensor.name}' is damaged (no type {tensor.data_type}): export it again"
        ) from error
    _check_shape(tensor)
    return -(-math.prod(tensor.dims) * bits // 8)


def dtype_of(tensor: onnx.TensorProto) -> np.dtype:
    """What numpy calls the type of a tensor."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def held_bytes(tensor: onnx.TensorProto) -> int:
    """About how many bytes a tensor inside a model has; to look copies them."""
    return len(tensor.raw_data) + sum(len(getattr(tensor, field)) for field in HELD)


def check_claim(tensor: onnx.TensorProto, room: int) -> None:
    """See that a tensor inside a model has a shape, and claims no more than the model can hold: what reads it believes it.

    Parameters
    ----------
    room
        Bytes of all its tensors, or of its file.

    Raises
    ------
    LowRankError
        Where it is damaged.
    """
    _check_shape(tensor)
    elements = math.prod(tensor.dims)
    if elements > max(MODEST, 8 * room) and tensor.data_location != onnx.TensorProto.EXTERNAL:
        raise LowRankError(
            f"tensor '{tensor.name}' is damaged (its shape is {list(tensor.dims)}, and the whole model has {room} bytes): "
            f"export it again"
        )


def _check_shape(tensor: onnx.TensorProto) -> None:
    if any(size < 0 for size in tensor.dims):
        raise LowRankError(f"tensor '{tensor.name}' is damaged (its shape is {list(tensor.dims)}): export it again")


def one_line(error: Exception) -> str:
    """The message of an exception of another package."""
    return " ".join(str(error).split())

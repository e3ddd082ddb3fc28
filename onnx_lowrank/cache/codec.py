"""Results as bytes and back: JSON and arrays, nothing that runs, with a hash over all of it.

A line of JSON, the arrays one after the other as they are in memory, 32 bytes of SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import ml_dtypes
import numpy as np

from onnx_lowrank.types import Candidate, ConvSpec, Cost, Factorization, LayerStatistics, Part, Skip, Stage

KINDS = {kind.__name__: kind for kind in (Candidate, ConvSpec, Cost, Factorization, LayerStatistics, Part, Skip, Stage)}
"""Dataclasses that a result may be made of."""

DIGEST_BYTES = 32


class Damaged(ValueError):
    """Bytes that are not what was written."""


def encode(key: str, value: Any) -> Iterator[bytes | memoryview]:
    """`value` in pieces to write one after the other.

    Parameters
    ----------
    key
        What it is kept under; it does not decode under another.
    value
        Numbers, texts, arrays, tuples of those, and the dataclasses of ``KINDS``.

    Raises
    ------
    TypeError
        For anything else.
    """
    arrays: list[np.ndarray] = []
    plain = _plain(value, arrays)
    ordered = [array if _by_columns(array) else np.ascontiguousarray(array) for array in arrays]
    about = [[array.dtype.name, array.shape, _by_columns(array)] for array in arrays]
    head = json.dumps({"key": key, "value": plain, "arrays": about}, separators=(",", ":")).encode() + b"\n"
    digest = hashlib.sha256(head)
    yield head
    for array in ordered:
        raw = memoryview(array.ravel("K").view(np.uint8).data)
        digest.update(raw)
        yield raw
    yield digest.digest()


def decode(key: str, data: bytes) -> Any:
    """What :func:`encode` was given.

    Raises
    ------
    Damaged
        For anything but the whole of it, under the same key.
    """
    body = memoryview(data)[:-DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        raise Damaged("its hash is another")
    try:
        end = data.index(b"\n") + 1
        head = json.loads(data[:end])
        if head["key"] != key:
            raise Damaged("it is that of another result")
        return _value(head["value"], list(_arrays(head["arrays"], body[end:])))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Damaged(str(error)) from error


def _by_columns(array: np.ndarray) -> bool:
    """Whether an array is stored column after column: products of it may differ in their last bits from those by rows."""
    return bool(array.flags.f_contiguous and not array.flags.c_contiguous)


def _arrays(about: Sequence[Any], data: memoryview) -> Iterator[np.ndarray]:
    first = 0
    for name, shape, by_columns in about:
        dtype = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
        size = math.prod(shape) * dtype.itemsize
        flat = np.frombuffer(bytes(data[first : first + size]), np.uint8).copy().view(dtype)
        yield flat.reshape(tuple(shape), order="F" if by_columns else "C")
        first += size


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    """As JSON holds it: everything but numbers and texts says what it is."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple):
        return [_plain(item, arrays) for item in value]
    if is_dataclass(value) and KINDS.get(type(value).__name__) is type(value):
        return {type(value).__name__: [_plain(getattr(value, item.name), arrays) for item in fields(value)]}
    raise TypeError(f"a {type(value).__qualname__} is not kept")


def _value(plain: Any, arrays: Sequence[np.ndarray]) -> Any:
    if isinstance(plain, list):
        return tuple(_value(item, arrays) for item in plain)
    if not isinstance(plain, dict):
        return plain
    ((name, inner),) = plain.items()
    return arrays[inner] if name == "array" else KINDS[name](*_value(inner, arrays))

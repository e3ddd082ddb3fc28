"""Results as bytes: what goes in comes out, bit for bit, and anything else is damage."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank.cache.codec import KINDS, Damaged, decode, encode
from onnx_lowrank.types import Candidate, ConvSpec, Cost, Factorization, LayerStatistics, Part, Skip, Stage

SPEC = ConvSpec((8, 4, 3, 3), (2, 1), (1, 0, 1, 0), (1, 1), 1, "NOTSET", True, (1, 0))
CANDIDATE = Candidate(
    ("a", "ü\n"),
    "cp3",
    (8,),
    ((Stage(SPEC, "t", (Part(3, None, 1),)), Stage(SPEC)),),
    Cost(10**18, 3, 0.1 + 0.2),
    1e-300,
)


def packed(value: Any, key: str = "key") -> bytes:
    return b"".join(encode(key, value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(10**30),
        0.1 + 0.2,
        math.inf,
        "text\0",
        (),
        ((CANDIDATE, CANDIDATE), None),
        ((CANDIDATE,), Skip("a", "Conv", "too small")),
        Cost(1, 2, 3.0),
    ],
    ids=str,
)
def test_what_is_kept_comes_back_as_it_was(value: Any) -> None:
    back = decode("key", packed(value))
    assert back == value
    assert type(back) is type(value)


def test_a_number_that_is_none_comes_back_too() -> None:
    assert math.isnan(decode("key", packed(math.nan)))


def test_numbers_of_numpy_come_back_as_those_of_python() -> None:
    back = decode("key", packed((np.int64(3), np.float64(0.1), np.bool_(True))))
    assert back == (3, 0.1, True)
    assert [type(value) for value in back] == [int, float, bool]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(3, 4, 1), (), (0, 5), (7,)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_with_their_bits_and_their_order(dtype: str, shape: tuple[int, ...], order: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = np.asarray(np.random.default_rng(0).standard_normal(shape).astype(kind), order=order)
    back = decode("key", packed(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.f_contiguous == array.flags.f_contiguous
    assert back.flags.writeable


def test_an_array_of_which_only_a_part_is_looked_at_comes_back() -> None:
    array = np.arange(24).reshape(4, 6)[::2, 1::2]
    np.testing.assert_array_equal(decode("key", packed(array)), array)


def test_factorizations_and_statistics_come_back() -> None:
    rng = np.random.default_rng(0)
    made = Factorization(
        ((rng.standard_normal((3, 2)), rng.standard_normal(4)),), 0.25, False, "more", (None, np.ones(2))
    )
    back = decode("key", packed(made))
    assert back.kernels[0][0].tobytes() == made.kernels[0][0].tobytes()
    assert back.biases[0] is None and back.biases[1].tolist() == [1, 1]
    assert (back.relative_error, back.converged, back.next_step) == (0.25, False, "more")
    seen = decode("key", packed(LayerStatistics(np.ones(2), np.asfortranarray(rng.standard_normal((2, 2))), 7)))
    assert seen.samples == 7 and seen.second_moment.flags.f_contiguous


def test_nothing_is_kept_that_is_not_data() -> None:
    for value in (object(), [1], {"a": 1}, len, SPEC.stage, b"bytes"):
        with pytest.raises(TypeError, match="is not kept"):
            packed(value)
    assert all(isinstance(kind, type) for kind in KINDS.values())


def test_every_changed_or_missing_byte_is_damage() -> None:
    data = packed((Skip("a", "Conv", "b"), np.arange(3.0)))
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 4
        for damaged in (bytes(changed), data[:place], data[place + 1 :]):
            with pytest.raises(Damaged):
                decode("key", damaged)


def test_a_result_under_another_key_is_damage() -> None:
    with pytest.raises(Damaged, match="of another result"):
        decode("another", packed(1.0))


@pytest.mark.parametrize(
    "head",
    [
        b"{}",
        b"[]",
        b"nothing",
        b'{"key":"key","value":{"os":["rm"]},"arrays":[]}',
        b'{"key":"key","value":{"array":3},"arrays":[]}',
        b'{"key":"key","value":{"array":0},"arrays":[["object",[1],false]]}',
        b'{"key":"key","value":{"array":0},"arrays":[["float32",[9],false]]}',
        b'{"key":"key","value":{"Cost":[1]},"arrays":[]}',
        b'{"key":"key","value":{"Cost":[1,2],"Skip":[]},"arrays":[]}',
    ],
)
def test_whole_files_that_say_something_else_are_damage(head: bytes) -> None:
    import hashlib

    body = head + b"\n" + bytes(8)
    with pytest.raises(Damaged):
        decode("key", body + hashlib.sha256(body).digest())

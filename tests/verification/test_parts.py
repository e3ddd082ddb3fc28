"""A model in parts gives what it gives whole, and no part stores more than it may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.segments import divided
from onnx_lowrank.runtime import Session
from onnx_lowrank.types import LowRankError
from onnx_lowrank.verification.parts import ROUNDS, PartSession, time_in_parts
from tests.helpers import feeds_of, normal, parse

BRANCHES = """g (float[N,8] x, bool c) => (float[N,8] y, float[N,8] r, float[8,8] w2, float[m,n] t, float[N,8] x) {
  p = MatMul (x, w0) r = Relu (p) q = MatMul (r, w1) t = Transpose (w2) s = MatMul (q, t) a = Add (s, p)
  y = If (c) <
    then_branch = h1 () => (float[N,8] u) { u = MatMul (a, w3) },
    else_branch = h2 () => (float[N,8] v) { v = Add (a, r) }
  >
}"""


def model() -> onnx.ModelProto:
    return parse(BRANCHES, **{f"w{i}": normal(8, 8, seed=i) for i in range(4)})


def feeds(seed: int = 1, condition: bool = True) -> dict[str, np.ndarray]:
    return {**feeds_of(model(), seed=seed, x=(3, 8)), "c": np.array(condition)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """With all kernels in a file beside it."""
    onnx.save(model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("most", [1, 256, 600, 1 << 20])
@pytest.mark.parametrize("condition", [True, False])
def test_outputs_are_those_of_the_whole_model(path: Path, most: int, condition: bool) -> None:
    given = feeds(condition=condition)
    session = PartSession(load(path), part_bytes=most)
    expected = Session(path).run(given)
    assert session.outputs == Session(path).outputs
    for one, other in zip(session.run(given), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert [value.shape for value in session.run(given, ["t", "r"])] == [(8, 8), (3, 8)]


def test_no_part_stores_more_than_it_may_or_one_node_does(path: Path) -> None:
    parts = divided(load(path), 1)
    assert len(parts) == 4
    assert [[tensor.name for tensor in part.proto.graph.initializer] for part in parts] == [
        ["w0"],
        ["w1"],
        ["w2"],
        ["w3"],
    ]
    assert len(divided(load(path), 2 * 256)) == 2
    assert len(divided(load(path), 1 << 20)) == 1


def test_several_batches_pass_together_and_come_back_in_order(path: Path) -> None:
    session, batches = PartSession(load(path), part_bytes=1), [feeds(seed) for seed in (1, 2, 3)]
    together = session.run_all(batches)
    for given, outputs in zip(batches, together, strict=True):
        assert [o.tobytes() for o in outputs] == [o.tobytes() for o in session.run(given)]
    assert together[0][0].tobytes() != together[1][0].tobytes()
    assert sum(session.placement.values()) >= 4
    assert set(session.placement) == {"CPUExecutionProvider"}


def test_times_are_those_of_all_parts(path: Path) -> None:
    session = PartSession(load(path), part_bytes=1)
    timing = time_in_parts(session, session, feeds())
    assert timing.first_ms.shape == timing.second_ms.shape == (ROUNDS,)
    assert (timing.first_ms > 0).all()


def test_an_output_that_nothing_makes_is_damage() -> None:
    damaged = parse("g (float[2] x) => (float[2] y, float[2] z) { y = Relu (x) }")
    with pytest.raises(LowRankError, match="output 'z' is made by no node of the main graph: the model is damaged"):
        PartSession(load(damaged)).run({"x": np.zeros(2, np.float32)})

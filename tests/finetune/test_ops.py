"""Every operator of the table against the official node tests of ONNX, and its gradient against finite differences."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

torch = pytest.importorskip("torch", reason="training needs the extra [finetune]")

from onnx_lowrank.finetune.ops import OPS, to_tensor  # noqa: E402
from onnx_lowrank.finetune.program import Program  # noqa: E402
from onnx_lowrank.graph.model import load  # noqa: E402
from onnx_lowrank.graph.plain import plain_graph  # noqa: E402
from onnx_lowrank.types import LowRankError  # noqa: E402


@functools.lru_cache(maxsize=1)
def cases() -> dict[str, TestCase]:
    """The node tests whose only operators are of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are made with numpy, some at the edges of their types
        made = {case.name: case for case in collect_testcases(None)}
    return {name: case for name, case in made.items() if _ours(case.model.graph)}


TYPES = {
    onnx.TensorProto.DataType.Value(name)
    for name in ["FLOAT", "DOUBLE", "FLOAT16", "INT8", "INT16", "INT32", "INT64", "UINT8", "BOOL"]
}
"""Element types that torch computes with as ONNX does."""


def _ours(graph: onnx.GraphProto) -> bool:
    types = {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}  # 0 for what is no tensor
    return types <= TYPES and all(node.op_type in OPS and not node.domain for node in graph.node)


REFUSED = (
    "test_batchnorm_*_training_mode",
    "test_maxpool_with_argmax_*",
    "test_not_*",
    "test_reduce_m??_empty_set*",
    "test_resize_*_antialias",
    "test_resize_tf_crop_and_resize*",
    "test_training_dropout*",
)
"""What is refused: operators in training mode of their own, rare modes, tests of opset 1, and nothing to reduce."""


def refused(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in REFUSED)


def run(case: TestCase) -> tuple[Program, dict[str, Any], list[np.ndarray]]:
    given, expected = ([as_array(value) for value in values] for values in case.data_sets[0])
    program = Program(plain_graph(load(case.model)), widen=False)
    return program, program({n: to_tensor(v) for n, v in zip(program.inputs, given, strict=True)}), expected


def as_array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


@pytest.mark.parametrize("name", sorted(name for name in cases() if not refused(name)))
def test_an_official_node_test(name: str) -> None:
    case = cases()[name]
    program, results, expected = run(case)
    for output, value in zip(program.outputs, expected, strict=True):
        got = results[output].numpy()
        assert got.dtype == value.dtype
        assert got.shape == value.shape
        tolerance = 1e-2 if value.dtype == np.float16 else case.rtol
        np.testing.assert_allclose(
            got.astype(np.float64), value.astype(np.float64), rtol=tolerance, atol=max(case.atol, tolerance / 1000)
        )


@pytest.mark.parametrize("name", sorted(name for name in cases() if refused(name)))
def test_what_is_not_run_is_refused_by_name(name: str) -> None:
    case = cases()[name]
    with pytest.raises(LowRankError, match=f"{case.model.graph.node[0].op_type}|opset 1 "):
        run(case)


def test_every_operator_has_an_official_test() -> None:
    tested = {node.op_type for name, case in cases().items() if not refused(name) for node in case.model.graph.node}
    assert set(OPS) - tested <= {"Not"}  # whose only tests are of opset 1


FLAT = {
    "Ceil",
    "Floor",
    "Round",
    "Sign",
    "ArgMax",
    "ArgMin",
    "Cast",
    "CastLike",
    "Shape",
    "Size",
    "ConstantOfShape",
    "Range",
}
"""Operators without a gradient, beside those on truth values."""

LARGE = 500
"""Numbers beyond which a whole Jacobian takes too long."""

DIFFERENTIABLE = {"BatchNormalization": 3, "Pad": 1}
"""How many of an operator's inputs have a gradient, where not all that are of floating point."""


def smallest_cases() -> dict[str, str]:
    """For each operator with a gradient, the official test of only that operator with the fewest numbers."""
    best: dict[str, tuple[int, str]] = {}
    for name, case in cases().items():
        nodes = case.model.graph.node
        given = [as_array(value) for value in case.data_sets[0][0]]
        floating = [value for value in given if value.dtype == np.float32]
        results = [as_array(value) for value in case.data_sets[0][1]]
        if len(nodes) == 1 and not refused(name) and floating and results[0].dtype == np.float32:
            size = sum(value.size for value in floating)
            if size and nodes[0].op_type not in FLAT and size < best.get(nodes[0].op_type, (1 << 30, ""))[0]:
                best[nodes[0].op_type] = size, name
    return {op: name for op, (_, name) in best.items()}


@pytest.mark.parametrize("op", sorted(smallest_cases()))
def test_gradients_by_finite_differences(op: str) -> None:
    case = cases()[smallest_cases()[op]]
    program = Program(plain_graph(load(case.model)), widen=False)
    given = [torch.from_numpy(as_array(value).copy()) for value in case.data_sets[0][0]]
    given = [v.double() + 0.01 if v.dtype == torch.float32 else v for v in given]
    for value in given[: DIFFERENTIABLE.get(op, len(given))]:
        value.requires_grad_(value.is_floating_point())

    def function(*inputs: Any) -> Any:
        results = program(dict(zip(program.inputs, inputs, strict=True)))
        return tuple(value for value in results.values() if value.is_floating_point())

    assert any(value.requires_grad for value in function(*given))
    large = sum(value.numel() for value in given) > LARGE  # then along random directions, not one number at a time
    assert torch.autograd.gradcheck(function, given, fast_mode=large)

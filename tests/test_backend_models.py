"""Every model of ONNX's own backend tests goes through inspect and compress: a result, or one line that says why not."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

import onnx_lowrank as lr
from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.graph.find import find_layers
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.splice import splice
from onnx_lowrank.types import LowRankError
from tests.helpers import assert_close, decompose, run

DATA = Path(onnx.backend.test.__file__).parent / "data"

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # onnx computes what its tests expect when it lists them


@cache
def node_cases() -> tuple[TestCase, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(case for case in load_model_tests(kind="node") if case.model is not None or case.model_dir)


def node_models() -> dict[str, Any]:
    """By name, a model or, with older versions of onnx, the path of one."""
    return {c.name: c.model if c.model is not None else Path(c.model_dir or "") / "model.onnx" for c in node_cases()}


def stored_models() -> dict[str, Any]:
    """Models that come as files; those of ``real`` have none until they are downloaded."""
    return {str(path.relative_to(DATA)): path for path in sorted(DATA.rglob("*.onnx"))}


def outcome(work: Any, *given: Any, **options: Any) -> Any:
    """What `work` makes, or the refusal; anything else is not caught."""
    try:
        return work(*given, **options)
    except LowRankError as error:
        assert "\n" not in str(error)
        return error


@pytest.mark.parametrize("models", [node_models, stored_models])
def test_every_model_is_inspected_and_compressed_or_refused_in_one_line(models: Any) -> None:
    seen: Counter[str] = Counter()
    crashes = {}
    for name, model in models().items():
        original = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model.read_bytes()
        try:
            view = outcome(lr.inspect, model, jobs=1)
            seen["inspected" if isinstance(view, lr.Inspection) else "refused"] += 1
            result = outcome(lr.compress, model, budget={"macs": 0.9}, jobs=1)
            if isinstance(result, lr.Result):
                changed = bool(result.report.layers)
                seen["changed" if changed else "unchanged"] += 1
                onnx.checker.check_model(result.model)
                assert changed or result.model.SerializeToString() == original
            loaded = load(model)
            untouched, _ = splice(loaded, find_layers(loaded, {}), [])
            assert untouched.proto.SerializeToString() == original
        except Exception as error:
            crashes[name] = repr(error)
    assert not crashes
    assert seen["inspected"] > 20 * seen["refused"], seen
    assert models is node_models or seen["changed"] > 20, seen


LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def with_kernels() -> dict[str, tuple[onnx.ModelProto, dict[str, np.ndarray]]]:
    """Node tests of layers with all but their first input stored, and what that is fed."""
    found = {}
    for case in node_cases():
        model = case.model if case.model is not None else onnx.load(Path(case.model_dir or "") / "model.onnx")
        if len(model.graph.node) != 1 or model.graph.node[0].op_type not in LAYERS:
            continue
        first, *rest = [
            numpy_helper.to_array(t) if isinstance(t, onnx.TensorProto) else np.asarray(t) for t in inputs(case)
        ]
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        names = [value.name for value in model.graph.input]
        copy.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in zip(names[1:], rest, strict=True))
        del copy.graph.input[1:]
        found[case.name] = copy, {names[0]: first}
    return found


def inputs(case: TestCase) -> list[Any]:
    if case.data_sets:
        return list(case.data_sets[0][0])
    folder = Path(case.model_dir or "") / "test_data_set_0"
    files = sorted(folder.glob("input_*.pb"))
    return [onnx.TensorProto.FromString(file.read_bytes()) for file in files]


def test_layers_of_the_node_tests_compute_the_same_at_full_rank_and_stay_valid_at_low_rank() -> None:
    tried: Counter[str] = Counter()
    for name, (model, feeds) in with_kernels().items():
        try:
            expected = run(model, feeds)
        except Exception:  # a type that this runtime has no kernel for
            tried["not run"] += 1
            continue
        for method in DECOMPOSITIONS:
            if method.startswith("joint"):
                continue
            rewritten = decompose(model, method)
            if rewritten.reports:
                tried[method] += 1
                onnx.checker.check_model(rewritten.model, full_check=True)
                assert_close(run(rewritten.model, feeds), expected, 1e-2 if expected[0].dtype == np.float16 else 1e-4)
        view = outcome(lr.compress, model, budget={"macs": 0.9}, jobs=1)
        if isinstance(view, lr.Result) and view.report.layers:
            tried["compressed"] += 1
            small = run(view.model, feeds)
            assert [(a.shape, a.dtype) for a in small] == [(a.shape, a.dtype) for a in expected], name
    assert all(tried[method] for method in ("svd", "tucker2", "spatial_svd", "channel_svd", "cp3", "compressed")), tried
    assert tried["not run"] < 10

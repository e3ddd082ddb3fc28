"""Calibration readers, in and out, with onnxruntime's own quantisation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import models
import onnx_lowrank as lr
from tests import tiny
from tests.helpers import arrays, normal, parse, run

QUICK: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}


def feeds(reader: lr.CalibrationReader) -> list[np.ndarray]:
    """All that a tool would get."""
    return [feed["x"] for feed in iter(reader.get_next, None)]  # type: ignore[misc]


def ranges(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")}


def test_every_form_of_data_is_read_and_can_be_rewound(tmp_path: Path) -> None:
    x = tiny.inputs(5)
    archive = tiny.save_data(tmp_path / "d.npz", x=x, labels=np.arange(5))

    def stream() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": x[:3]}
        yield {"x": x[3:]}

    forms: list[Any] = [archive, [{"x": x}], stream, lambda: lr.CalibrationReader(archive, tiny.classifier())]
    for data in [*forms, lr.CalibrationReader(archive, tiny.classifier())]:
        for model in (tiny.classifier(), gs.import_onnx(tiny.classifier())):
            reader = lr.CalibrationReader(data, model)
            assert len(reader) == 5
            np.testing.assert_array_equal(feeds(reader), x[:, None])
            assert reader.get_next() is None
            reader.rewind()
            np.testing.assert_array_equal([feed["x"] for feed in reader], x[:, None])


def test_a_range_is_kept_to_until_another_is_set(tmp_path: Path) -> None:
    x = tiny.inputs(5)
    reader = lr.CalibrationReader([{"x": x}], tiny.classifier())
    reader.set_range(start_index=1, end_index=3)
    np.testing.assert_array_equal(feeds(reader), x[1:3, None])
    reader.rewind()
    np.testing.assert_array_equal(feeds(reader), x[1:3, None])
    assert len(reader) == 5
    reader.set_range(4, 9)
    np.testing.assert_array_equal(feeds(reader), x[4:, None])
    with pytest.raises(lr.LowRankError, match="samples 3 to 2 asked for"):
        reader.set_range(3, 2)


def test_a_model_of_a_fixed_batch_gets_that_many_at_a_time() -> None:
    model = parse("g (float[2, 16] x) => (float[2, 4] y) { y = MatMul (x, w) }", w=normal(16, 4))
    x = tiny.inputs(7)
    for data in (lambda: iter([{"x": x}]), [{"x": x[:3]}, {"x": x[3:]}]):
        reader = lr.CalibrationReader(data, model)
        assert len(reader) == 3
        np.testing.assert_array_equal(feeds(reader), x[:6].reshape(3, 2, 16))
        reader.set_range(1, 3)
        np.testing.assert_array_equal(feeds(reader), x[2:6].reshape(2, 2, 16))


def test_what_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    cases: list[tuple[Any, Any, str]] = [
        (tmp_path / "none.npz", tiny.classifier(), "no such file or folder"),
        ([{"z": tiny.inputs(1)}], tiny.classifier(), "has z, the model wants x"),
        ([{"x": tiny.inputs(1)}], 7, "a model of type int was given: a path, a ModelProto, a graphsurgeon Graph or an"),
    ]
    for data, model, message in cases:
        with pytest.raises(lr.LowRankError, match=message):
            lr.CalibrationReader(data, model)


def test_onnxruntime_quantises_with_a_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    caplog.set_level(logging.ERROR)
    test = arrays(models.DIGITS_TEST)
    results = {}
    for name, options in {"whole": {}, "strided": {"CalibStridedMinMax": 128}, "one": {}}.items():
        reader = lr.CalibrationReader(models.DIGITS_CALIBRATE, models.DIGITS)
        assert isinstance(reader, quantization.CalibrationDataReader)
        if name == "one":
            reader.set_range(0, 1)
        path = tmp_path / f"{name}.onnx"
        quantization.quantize_static(str(models.DIGITS), str(path), reader, extra_options=options)
        results[name] = onnx.load(path)
        assert "QuantizeLinear" in {node.op_type for node in results[name].graph.node}
    scores = run(str(models.DIGITS), {"input": test["input"]})[0], run(results["whole"], {"input": test["input"]})[0]
    right = [(score.argmax(axis=1) == test["labels"]).mean() for score in scores]
    assert right[1] > right[0] - 0.03
    whole, strided, one = (ranges(results[name]) for name in ("whole", "strided", "one"))
    assert all(np.array_equal(whole[name], strided[name]) for name in whole)  # all samples were seen either way
    assert any(not np.array_equal(whole[name], one[name]) for name in whole)  # and not only the first


def test_a_reader_of_onnxruntime_calibrates_a_compression() -> None:
    options: dict[str, Any] = {"budget": {"macs": 0.5}, **QUICK}
    x = tiny.inputs(64)
    expected = lr.compress(tiny.classifier(), calibrate=[{"x": x}], evaluate=[{"x": x}], **options)
    reader = lr.CalibrationReader([{"x": x}], tiny.classifier())
    for data in (reader, lambda: lr.CalibrationReader([{"x": x}], tiny.classifier())):
        result = lr.compress(tiny.classifier(), calibrate=data, evaluate=data, **options)
        assert result.model == expected.model
        assert result.report.accuracy == expected.report.accuracy

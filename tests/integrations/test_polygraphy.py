"""Scripts for Polygraphy, run by Polygraphy."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank.data import open_data
from onnx_lowrank.integrations.polygraphy import compare_outputs, comparer, loader
from onnx_lowrank.types import InputSpec
from tests import tiny
from tests.helpers import arrays, run

QUICK: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}
X = InputSpec("x", ("N", 16), np.dtype("float32"))


class Kind:
    """A type as Polygraphy describes it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def numpy(self) -> str:
        return self.name


def test_a_loader_reads_what_the_model_takes_from_polygraphy_or_from_the_model() -> None:
    x = tiny.inputs(5)
    told = loader([{"x": x.astype("float64")}])()
    for shape in (("N", 16), (-1, 16), (None, 16)):
        told.input_metadata = {"x": (Kind("float32"), shape)}
        for _ in range(2):
            feeds = [feed["x"] for feed in told]
            np.testing.assert_array_equal(feeds, x[:, None])
            assert feeds[0].dtype == np.dtype("float32")
    given = loader([{"x": x}], tiny.classifier(), batch=2, samples=3)
    assert [feed["x"].shape for feed in given()] == [(2, 16), (1, 16)]
    told.input_metadata = {"x": (Kind("float32"), (5, 16))}
    assert [feed["x"].shape for feed in told] == [(5, 16)]
    pictures = loader([{"images": np.zeros((2, 3))}], tiny.classifier())
    with pytest.raises(lr.LowRankError, match="has images, the model wants x"):
        list(pictures())


def test_a_loader_that_nobody_tells_anything_says_so() -> None:
    with pytest.raises(lr.LowRankError, match=r"nobody says what the model takes: give it, as in loader\(data, model="):
        list(loader([{"x": tiny.inputs(1)}])())
    told = loader([{"x": tiny.inputs(1)}])()
    told.input_metadata = {"x": (Kind("fp8"), (1, 16))}
    with pytest.raises(lr.LowRankError, match=r"input 'x' is of .*, which numpy does not have: give the model"):
        list(told)


def test_a_script_for_polygraphy_is_data_here_too(tmp_path: Path) -> None:
    x = tiny.inputs(3)
    archive, model = tiny.save_data(tmp_path / "x.npz", x=x), tiny.save(tiny.classifier(), tmp_path / "m.onnx")
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\n"
        "from onnx_lowrank.integrations.polygraphy import loader\n"
        f"load_data = loader({str(archive)!r}, {str(model)!r})\n"
        "def by_hand():\n"
        "    for row in np.load(__file__.replace('script.py', 'x.npz'))['x']:\n"
        "        yield {'x': row[None]}\n"
    )
    for function in ("load_data", "by_hand"):
        data = open_data(f"{script}:{function}", [X])
        np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds, _ in data.batches(2)]), x)


def test_outputs_pass_where_the_worst_sample_does() -> None:
    near = np.eye(4) + 0.01
    assert compare_outputs({"y": np.eye(4)}, {"y": near}) == OrderedDict(y=True)
    far = near.copy()
    far[2] = near[1]
    assert compare_outputs({"y": np.eye(4), "z": near}, {"z": near, "y": far}) == OrderedDict(y=False, z=True)
    assert comparer("agreement", 1.0)({"y": np.eye(4)}, {"y": near})["y"]
    assert not comparer("agreement", 1.0)({"y": np.eye(4)}, {"y": far})["y"]
    noise = 20 * np.log10(1 / 0.02)  # four elements off by 0.01, against one of 1
    assert comparer("sqnr", noise - 0.1)({"y": np.eye(4)}, {"y": near})["y"]
    assert not comparer("sqnr", noise + 0.1)({"y": np.eye(4)}, {"y": near})["y"]


def test_outputs_that_cannot_be_compared_do_not_pass(caplog: pytest.LogCaptureFixture) -> None:
    y = np.ones((2, 3))
    spoiled = np.where(np.eye(2, 3) > 0, np.nan, y)
    first = {"missing": y, "shape": y, "nan": y, "good": y}
    second = {"shape": y.T, "nan": spoiled, "good": y, "more": y}
    passed = compare_outputs(first, second)
    assert passed == OrderedDict(missing=False, shape=False, nan=False, good=True, more=False)
    text = caplog.text
    assert text.count("only one of the two models has it") == 2
    assert "(2, 3) and (3, 2)" in text
    assert "NaN or infinite" in text


def test_metrics_that_make_no_sense_are_refused() -> None:
    with pytest.raises(lr.LowRankError, match="no metric is called 'l2'"):
        comparer("l2")
    with pytest.raises(lr.LowRankError, match="metric top1 was given, and Polygraphy hands on no labels"):
        comparer("top1")


def test_polygraphy_runs_models_on_our_data_and_compares_them_by_our_rule(tmp_path: Path) -> None:
    comparator = pytest.importorskip("polygraphy.comparator").Comparator
    onnxrt, mod = pytest.importorskip("polygraphy.backend.onnxrt"), pytest.importorskip("polygraphy.mod")
    script = tmp_path / "script.py"
    script.write_text(
        "from onnx_lowrank.integrations.polygraphy import compare_outputs, loader\n"
        f"load_data = loader({str(models.DIGITS_TEST)!r}, batch=4, samples=14)\n"
    )
    load_data, compare = (mod.import_from_script(str(script), name) for name in ("load_data", "compare_outputs"))
    x = arrays(models.DIGITS_TEST)["input"][:14]
    passed = {}
    for ratio in (0.8, 0.1):
        small = lr.compress(models.DIGITS, budget={"macs": ratio}, **QUICK).model
        protos = models.DIGITS.read_bytes(), small.SerializeToString()
        runners = [onnxrt.OnnxrtRunner(onnxrt.SessionFromOnnx(proto)) for proto in protos]
        results = comparator.run(runners, data_loader=load_data())
        for _, iterations in results.items():
            assert [len(outputs["output"]) for outputs in iterations] == [4, 4, 4, 2]
        first = np.concatenate([outputs["output"] for outputs in results[0][1]])
        np.testing.assert_allclose(first, run(str(models.DIGITS), {"input": x})[0], rtol=1e-4, atol=1e-4)
        passed[ratio] = bool(comparator.compare_accuracy(results, compare_func=compare))
    assert passed == {0.8: True, 0.1: False}

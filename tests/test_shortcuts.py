"""Shortcuts that slice and pad, folded before anything else: the same function, in the layout of convolutions, told and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_lowrank as lr
from onnx_lowrank.config import make_config
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import with_outputs
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.shortcuts import with_folded_shortcuts
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import no_progress
from tests import tiny
from tests.helpers import assert_close, feeds_of, normal, parse, run

# what exporters make of x[:, :, ::2, ::2] padded in front and behind by half of its channels
RESIDUAL = """g (float[N, 8, 12, 12] x) => (float[N, 16, 6, 6] y) {
  first = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1)
  bent = Relu (first)
  main = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (bent, w2)
  rows = Slice (x, start, end, two, step)
  even = Slice (rows, start, end, three, step)
  length = Shape (known)
  count = Sub (eight, length)
  none = ConstantOfShape <value = int64[1] {0}> (count)
  pads = Concat <axis = 0> (known, none)
  shortcut = Pad (even, pads)
  y = Add (main, shortcut)
}"""

OPTIONS: dict[str, Any] = {"methods": "svd,spatial_svd", "align": 1, "jobs": 1}


def residual(text: str = RESIDUAL) -> onnx.ModelProto:
    """A block that halves the picture; its kernels are of low rank, beside a little noise."""
    numbers = {"start": [0], "end": [2**63 - 1], "two": [2], "three": [3], "step": [2], "eight": [8]}
    stored = {name: np.array(value, np.int64) for name, value in numbers.items()}
    stored["known"] = np.array([0, 4, 0, 0, 0, 4], np.int64)
    kernels = {"w1": normal(16, 8, 3, 3), "w2": normal(16, 16, 3, 3, seed=1)}
    return parse(text, **stored, **kernels)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_the_function_stays_to_the_bit() -> None:
    proto = residual()
    folded, names = with_folded_shortcuts(load(proto), {"x": (1, 8, 12, 12)})
    assert len(names) == 1 and kinds(folded.proto) == ["Conv", "Relu", "Conv", "Conv", "Add"]
    assert names[0] in {node.name for node in folded.graph.node}
    onnx.checker.check_model(folded.proto, full_check=True)
    feeds = feeds_of(proto, x=(3, 8, 12, 12))
    made, given = (run(with_outputs(model, ["shortcut"]).proto, feeds) for model in (folded, load(proto)))
    np.testing.assert_array_equal(made[1], given[1])


def test_a_model_without_one_is_left_alone() -> None:
    model = load(tiny.classifier())
    assert with_folded_shortcuts(model, {"x": tiny.inputs(1).shape}) == (model, ())
    result = lr.compress(tiny.classifier(), budget={"macs": 0.5}, fold_shortcuts=True, **OPTIONS)
    plain = lr.compress(tiny.classifier(), budget={"macs": 0.5}, **OPTIONS)
    assert result.model == plain.model
    assert "no shortcut that slices and pads was found to be folded" in result.report.notes


def test_what_the_input_decides_is_no_constant() -> None:
    text = RESIDUAL.replace("length = Shape (known)", "axes = Shape (x) zero = Sub (axes, axes) length = Shape (known)")
    text = text.replace("(known, none)", "(zero, zero)")
    model = load(residual(text))
    assert with_folded_shortcuts(model, {"x": (1, 8, 12, 12)}) == (model, ())


@pytest.mark.parametrize("where", ["file", "memory"])
def test_the_report_counts_it_and_compares_with_what_was_given(tmp_path: Path, where: str) -> None:
    proto = residual()
    source = tiny.save(proto, tmp_path / "model.onnx") if where == "file" else proto
    result = lr.compress(source, budget={"macs": 0.5}, fold_shortcuts=True, **OPTIONS)
    assert result.met and result.report.layers and "Pad" not in kinds(onnx.load(saved(result, tmp_path)))
    feeds = {"x": normal(1, 8, 12, 12)}
    original, compressed = result.report.original, result.report.compressed
    assert (original.macs, original.params) == tiny.count(proto, feeds)
    assert (compressed.macs, compressed.params) == tiny.count(onnx.load(saved(result, tmp_path)), feeds)
    assert compressed.macs <= 0.5 * original.macs
    assert original.size_bytes == len(proto.SerializeToString())
    (skip,) = [skip for skip in result.report.skips if "shortcut" in skip.reason]
    assert skip.op_type == "Conv"
    assert any(
        note.startswith("1 shortcut(s) that slice and pad are 1x1 convolutions now") for note in result.report.notes
    )


def saved(result: lr.Result, folder: Path) -> Path:
    result.save(folder / "small.onnx")
    return folder / "small.onnx"


def test_a_plan_that_changes_no_layer_still_folds() -> None:
    proto = residual()
    result = lr.compress(proto, max_drop=0.001, metric="sqnr", evaluate=[feeds_of(proto, x=(4, 8, 12, 12))], objective="macs",
                         fold_shortcuts=True, **OPTIONS)  # fmt: skip
    assert not result.report.layers and not result.report.unchanged and "Pad" not in kinds(result.model)
    assert_close(
        run(result.model, feeds_of(proto, x=(2, 8, 12, 12))), run(proto, feeds_of(proto, x=(2, 8, 12, 12))), 1e-6
    )


def test_times_are_shares_of_the_model_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatencyTable, "_speedup", lambda self, bench: 1.25)
    proto, config = residual(), make_config(fold_shortcuts=True, budget={"latency": 0.5})
    subject = open_subject(proto, config)
    table = LatencyTable(subject, config, subject.feeds(), no_progress)
    assert table.original.latency_ms == pytest.approx(1.25 * (table.rest + sum(
        choice.cost.latency_ms for (choice,) in table.priced([[group.dense] for group in subject.groups])
    )))  # fmt: skip


def test_it_is_proposed_where_it_would_help() -> None:
    proto = residual()
    told = lr.compress(proto, budget={"macs": 0.5}, **OPTIONS).report.notes
    assert any("--fold-shortcuts" in note for note in told)
    for quiet in (lr.compress(proto, budget={"macs": 0.5}, fold_shortcuts=True, **OPTIONS),
                  lr.compress(tiny.classifier(), budget={"macs": 0.5}, **OPTIONS)):  # fmt: skip
        assert not any("--fold-shortcuts" in note for note in quiet.report.notes)


def test_what_is_no_picture_of_floats_stays(tmp_path: Path) -> None:
    text = RESIDUAL.replace("(float[N, 8, 12, 12] x)", "(float[N, 8, 12, 12] x, uint8[N, 8, 12, 12] bytes)")
    text = text.replace("Slice (x,", "Slice (bytes,").replace(
        "shortcut = Pad (even, pads)", "padded = Pad (even, pads) shortcut = Cast <to = 1> (padded)"
    )
    model = load(residual(text))
    assert with_folded_shortcuts(model, {"x": (1, 8, 12, 12), "bytes": (1, 8, 12, 12)}) == (model, ())


def test_constants_are_told_apart_from_outputs_without_a_name() -> None:
    text = RESIDUAL.replace("pads = Concat <axis = 0> (known, none)", """joined = Concat <axis = 0> (known, none)
  pads = Clip (joined, , large)
  pooled = MaxPool <kernel_shape = [3, 3]> (x)""")  # fmt: skip
    proto = residual(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(99, np.int64), "large"))
    next(node for node in proto.graph.node if node.op_type == "MaxPool").output.append("")
    folded, names = with_folded_shortcuts(load(proto), {"x": (1, 8, 12, 12)})
    assert len(names) == 1
    feeds = feeds_of(proto, x=(2, 8, 12, 12))
    assert_close(run(folded.proto, feeds), run(proto, feeds), 1e-6)


def test_it_is_refused_where_it_would_make_another_model_of_what_is_compared() -> None:
    with pytest.raises(lr.LowRankError, match="leave out quantize, dequantize, fold_shortcuts"):
        lr.verify(residual(), residual(), fold_shortcuts=True)
    with pytest.raises(lr.LowRankError, match="a bundle is of the model as it is"):
        lr.bundle(residual(), "never.zip", fold_shortcuts=True)
    with pytest.raises(lr.LowRankError, match="fold_shortcuts would make it another"):
        lr.analyze(residual(), budget={"latency": 0.5}, target="mnn", fold_shortcuts=True)
    assert not Path("never.zip").exists()


def test_what_a_target_takes_is_compared_with_the_model_as_it_was_given() -> None:
    given = lr.compress(residual(), budget={"macs": 0.5}, target="coreml", **OPTIONS).report.targets[0]
    folded = lr.compress(
        residual(), budget={"macs": 0.5}, target="coreml", fold_shortcuts=True, **OPTIONS
    ).report.targets[0]
    assert folded.partitions["before"] == given.partitions["before"]


def test_eight_bits_fold_without_being_told() -> None:
    feeds = feeds_of(residual(), x=(16, 8, 12, 12))
    notes = lr.compress(residual(), quantize="int8", calibrate=[feeds], jobs=1).report.notes
    assert not any("--fold-shortcuts" in note for note in notes)

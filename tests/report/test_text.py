"""The report on a terminal: nothing wider than 80 columns, nothing said twice, nothing read as markup."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from onnx_lowrank.graph.shapes import Tensor
from onnx_lowrank.report.data import BudgetResult, Report, Size
from onnx_lowrank.report.results import Inspection, LayerView, Verification
from onnx_lowrank.report.text import SHOWN_SKIPS, render_inspection, render_report, render_verification
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.types import Candidate, Cost, Skip
from onnx_lowrank.verification.verify import Accuracy, Latency

LONG = "/backbone/features/stage3/block.11/expanded_convolution/Conv_output_0_quantized"

LAYER = LayerReport(
    "conv1", "Conv", "tucker2", (16, 8), 1_234_567_890_123, 617_283_945_061, 4_000_000, 1_000_000, 0.25, True, "", ("a", "b")
)  # fmt: skip
ACCURACY = Accuracy("top1", 0.75, 0.7375, 0.0125, 0.0213, 50_000, {"agreement": 0.97, "cosine": 0.99, "sqnr": 21.5})
LATENCY = Latency("CPUExecutionProvider", 4, 8, 123.456, 61.728, 130, 70, 2.0, 1.9, 2.1, {"CPUExecutionProvider": 9})
REPORT = Report(
    Size(1_234_567_890_123, 4_000_000, 16_000_000),
    Size(617_283_945_061, 1_000_000, 4_000_000),
    (LAYER,),
    (Skip("relu", "Conv", "too small"),),
    (BudgetResult("macs", 0.5, 0.5, True),),
    ACCURACY,
    (LATENCY,),
    {"analyze": 1.25, "verify": 2.5},
    {"python": "3.11"},
    ("a note",),
)


def shown(parts: Iterable[Any], width: int = 80) -> str:
    """What a terminal of this width shows."""
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, emoji=False, color_system=None)
    for part in parts:
        console.print(part)
    return file.getvalue()


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with `first`."""
    (row,) = (line for line in text.splitlines() if re.match(rf"{re.escape(first)} +[│|]", line))
    return [part.strip() for part in re.split("[│|]", row)]


def flat(text: str) -> str:
    return " ".join(re.sub("[│┃|]", " ", text).split())


def test_a_report_says_what_became_of_every_layer_and_of_the_whole() -> None:
    text = shown(render_report(REPORT), width=120)
    assert cells(text, "conv1") == ["conv1", "tucker2", "16x8", "50%", "25%", "0.250"]
    assert cells(text, "relu") == ["relu", "Conv", "too small"]
    assert cells(text, "MACs") == ["MACs", "1,234,567,890,123", "617,283,945,061", "0.500"]
    assert cells(text, "parameters") == ["parameters", "4,000,000", "1,000,000", "0.250"]
    assert cells(text, "bytes") == ["bytes", "16,000,000", "4,000,000", "0.250"]
    assert cells(text, "top1, 50000 samples")[1:] == ["0.7500", "0.7375", "drop +0.0125, at most 0.0213 (95 %)"]
    assert cells(text, "ms, CPU, batch 8, 4 thread(s)")[1:] == ["123.456", "61.728", "2.00x (1.90 to 2.10)"]
    assert "macs: asked 0.5, reached 0.5 - met\n" in text
    assert "note: a note\n" in text
    assert "3.8 s: analyze 1.2, verify 2.5\n" in text


def test_a_report_of_an_unchanged_model_has_no_table_of_layers() -> None:
    text = shown(render_report(replace(REPORT, layers=())))
    assert "decomposition" not in text
    assert "MACs" in text


def test_what_was_not_met_is_said() -> None:
    text = shown(render_report(replace(REPORT, budgets=(BudgetResult("size", 0.01, 0.5, False),))))
    assert "size: asked 0.01, reached 0.5 - not met\n" in text


def test_of_a_promise_the_drop_its_bound_and_what_was_asked_are_told_apart() -> None:
    report = replace(REPORT, budgets=(BudgetResult("drop", 0.01, 0.0213, False),))
    text = shown(render_report(report))
    assert "drop: +0.0125, at most 0.0213 with 95 % confidence; asked 0.01 - not met\n" in text
    alone = replace(ACCURACY, drop_upper_95=math.nan, drop=-0.002)
    text = shown(render_report(replace(report, accuracy=alone, budgets=(BudgetResult("drop", 0.01, -0.002, True),))))
    assert "drop: -0.0020; asked 0.01 - met\n" in text
    broken = replace(ACCURACY, drop_upper_95=math.inf)
    text = shown(
        render_report(replace(report, accuracy=broken, budgets=(BudgetResult("drop", 0.01, math.inf, False),)))
    )
    assert "drop: +0.0125, without bound; asked 0.01 - not met\n" in text


def test_what_an_error_is_of_is_said_above_it() -> None:
    assert "kernel error" in shown(render_report(REPORT))
    assert "output error" in shown(render_report(replace(REPORT, layers=(replace(LAYER, fitted=True),))))
    layer = LayerView("conv1", "Conv", (64, 32, 3, 3), 1, 1, None)
    view = Inspection(Cost(1, 1), (layer,), (), ())
    assert "kernel error: relative error of the kernel" in shown(render_inspection(view))
    text = flat(shown(render_inspection(replace(view, error_of="output"))))
    assert "output error: relative error of the model's outputs" in text


@pytest.mark.parametrize("many", [1, 40])
def test_nothing_is_wider_than_80_columns(many: int) -> None:
    reason = "its weight is also an input of the model, which a user may feed: make it a plain initializer"
    report = replace(
        REPORT,
        layers=(replace(LAYER, name=LONG, decomposition="weighted_channel_svd_in"),) * many,
        skips=(Skip(LONG, "ConvTranspose", reason),) * many,
        accuracy=replace(ACCURACY, metric=f"{LONG}.py:my_metric_function"),
        latency=(replace(LATENCY, placement={"CPUExecutionProvider": 5, "QNNExecutionProvider": 200}),),
        notes=(f"{LONG} {reason}",) * many,
        seconds={
            stage: 1000.0 for stage in ("analyze", "allocate", "factorize", "refit", "verify", "latency", "finetune")
        },
    )
    half = Candidate((LONG,), "channel_svd_in", (1000, 1000), (), Cost(1, 1), 0.5)
    layer = LayerView(LONG, "ConvTranspose", (2048, 2048, 7, 7), 10**12, 10**9, half)
    view = Inspection(Cost(10**12, 10**9), (layer, replace(layer, half=None)) * many, report.skips, report.notes)
    check = Verification(report.original, report.compressed, ACCURACY, report.latency, report.notes, {})
    for parts in (render_report(report), render_inspection(view), render_verification(check)):
        text = shown(parts)
        assert max(map(len, text.splitlines())) <= 80


def test_a_name_too_long_for_a_terminal_is_cut_short_in_the_middle_and_piped_it_is_whole() -> None:
    half = Candidate(("a",), "channel_svd_in", (64,), (), Cost(1, 1), 0.0625)
    layer = LayerView("/layer1/layer1.0/conv1/Conv", "Conv", (64, 64, 3, 3), 2_359_296, 36_864, half)
    view = Inspection(
        Cost(1, 1), (layer,), (Skip(LONG, "Conv", "its weight is computed, not stored in the model"),), ()
    )
    text = shown(render_inspection(view))
    (row,) = (line for line in text.splitlines() if "channel_svd_in 64" in line)
    assert re.match(r"/lay…onv1/Conv +[│|]", row) and "0.25" in row
    (row,) = (line for line in text.splitlines() if line.startswith("/bac"))
    assert re.match(r"/bac\S+…\S+_quantized +[│|]", row)
    piped = shown(render_inspection(view), width=100_000)
    assert cells(piped, layer.name)[-2:] == ["channel_svd_in 64", "0.25"]
    assert cells(piped, LONG) == [LONG, "Conv", "its weight is computed, not stored in the model"]


def test_layers_left_alone_for_one_reason_are_one_row() -> None:
    skips = (
        Skip("a", "Gemm", "other"),
        *(Skip(f"node{i}", "Conv", "why") for i in range(13)),
        Skip("b", "Gemm", "other"),
    )
    text = shown(render_report(replace(REPORT, skips=skips)))
    assert cells(text, "13 layers: node0, node1, node2, ...")[1:] == ["Conv", "why"]
    assert cells(text, "2 layers: a, b")[1:] == ["Gemm", "other"]
    assert "... and 10 more (--json F for all)\n" in text


def test_many_reasons_are_counted_and_the_first_are_shown() -> None:
    skips = tuple(Skip(f"node{i}", "Conv", f"why {i}") for i in range(SHOWN_SKIPS + 5))
    text = shown(render_report(replace(REPORT, skips=skips)))
    assert f"node{SHOWN_SKIPS - 1} " in text and f"node{SHOWN_SKIPS} " not in text
    assert "... and 5 more (--json F for all)\n" in text
    assert "--json" not in shown(render_report(replace(REPORT, skips=skips[:SHOWN_SKIPS])))


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", "[bold]", "a[0]", "back\\[b]", ":smile:", "[link=x]"])
def test_names_are_shown_as_they_are(name: str) -> None:
    report = replace(
        REPORT,
        layers=(replace(LAYER, name=name),),
        skips=(Skip(f"left {name}", "Conv", f"because of {name}"),),
        accuracy=replace(ACCURACY, metric=f"metric {name}"),
        notes=(f"note {name}",),
    )
    text = shown(render_report(report), width=160)
    for expected in (f"\n{name} ", f"left {name} ", f"because of {name}\n", f"metric {name}, 50000", f"note {name}\n"):
        assert expected in text
    layer = LayerView(name, "Conv", (8, 8, 3, 3), 100, 100, None)
    assert f"\n{name} " in shown(render_inspection(Inspection(Cost(1, 1), (layer,), (), ())), width=160)


def test_a_drop_without_a_bound_has_none_in_the_report() -> None:
    text = shown(render_report(replace(REPORT, accuracy=replace(ACCURACY, drop_upper_95=math.nan))), width=120)
    assert cells(text, "top1, 50000 samples")[3] == "drop +0.0125"
    assert "nan" not in text


def test_a_model_better_than_the_original_shows_a_negative_drop() -> None:
    text = shown(render_report(replace(REPORT, accuracy=replace(ACCURACY, drop=-0.0125))), width=120)
    assert "drop -0.0125" in text


def test_a_kernel_that_is_shared_is_not_divided_by_zero() -> None:
    text = shown(render_report(replace(REPORT, layers=(replace(LAYER, params_before=0, params_after=0),))), width=120)
    assert cells(text, "conv1")[4] == "shared"
    nothing = replace(REPORT, original=Size(0, 0, 10), compressed=Size(0, 0, 10))
    assert cells(shown(render_report(nothing), width=120), "MACs") == ["MACs", "0", "0", ""]


def test_nodes_that_run_elsewhere_than_asked_for_are_told() -> None:
    placement = {"XnnpackExecutionProvider": 7, "CPUExecutionProvider": 2}
    latency = replace(LATENCY, provider="XnnpackExecutionProvider", placement=placement)
    assert "not all on Xnnpack: 2 on CPU" in flat(shown(render_report(replace(REPORT, latency=(latency,))), width=120))
    assert "not all on" not in shown(render_report(REPORT))


def test_colours_carry_no_meaning_of_their_own() -> None:
    budgets = (BudgetResult("macs", 0.5, 0.4, True), BudgetResult("size", 0.5, 0.6, False))
    text = shown(render_report(replace(REPORT, budgets=budgets)))
    assert "macs: asked 0.5, reached 0.4 - met\n" in text
    assert "size: asked 0.5, reached 0.6 - not met\n" in text


def test_an_inspection_says_what_each_layer_could_become() -> None:
    half = Candidate(("conv1",), "cp3", (32,), (), Cost(1, 1), 0.0625)
    layers = (
        LayerView("conv1", "Conv", (64, 32, 3, 3), 1_179_648, 18_432, half),
        LayerView("fc", "Gemm", (10, 4), 40, 40, None),
    )
    view = Inspection(Cost(2_000_000, 20_000), layers, (Skip("dw", "Conv", "depthwise"),), ("a note",))
    text = shown(render_inspection(view), width=120)
    assert "2,000,000 MACs for one sample, 20,000 parameters, 2 layers" in text
    assert cells(text, "conv1") == ["conv1", "Conv", "64x32x3x3", "1.18 M", "18.4 k", "cp3 32", "0.25"]
    assert cells(text, "fc")[-2:] == ["nothing to gain", ""]
    assert cells(text, "dw") == ["dw", "Conv", "depthwise"]
    assert "note: a note\n" in text


def test_an_inspection_begins_with_the_inputs_and_the_outputs() -> None:
    view = Inspection(Cost(1, 1), (), (), (), inputs=(Tensor("x[0]", "float32", ("N", 3, None)),))
    assert shown(render_inspection(view)).startswith("inputs: x[0] float32 (N, 3, ?); outputs: none\n")
    many = tuple(Tensor(f"y{i}", "int64", ()) for i in range(9))
    text = shown(render_inspection(replace(view, outputs=(*many, Tensor("z", "sequence", None)))), width=160)
    assert "outputs: y0 int64 (), y1 int64 (), y2 int64 (), y3 int64 () and 6 more\n" in text


def test_a_layer_of_an_inspection_takes_one_line_of_80() -> None:
    half = Candidate(("layer3.24.conv2",), "channel_svd_in", (64,), (), Cost(1, 1), 0.0625)
    layer = LayerView("layer3.2.conv2", "Conv", (64, 64, 3, 3), 2_359_296, 36_864, half)
    text = shown(render_inspection(Inspection(Cost(10**9, 10**6), (layer,), (), ())))
    assert cells(text, "layer3.2.conv2")[-2:] == ["channel_svd_in 64", "0.25"]


def test_of_many_layers_that_repeat_the_first_and_the_last_are_listed() -> None:
    sections = (tuple(f"conv{i}" for i in range(30)), ("a[0]", "b"))
    text = shown(render_inspection(Inspection(Cost(1, 1), (), (), (), sections)))
    assert "  conv0, conv1, conv2 ... conv29: 30 layers\n" in text
    assert "  a[0], b\n" in text


def test_an_inspection_of_a_model_without_layers_explains_no_error() -> None:
    text = shown(render_inspection(Inspection(Cost(0, 0), (), (), ())))
    assert "0 layers" in text
    assert "relative error" not in text


def test_a_verification_shows_both_models() -> None:
    check = Verification(REPORT.original, REPORT.compressed, ACCURACY, (LATENCY,), ("a note",), {})
    text = shown(render_verification(check), width=120)
    assert cells(text, "agreement with the original") == ["agreement with the original", "", "0.9700", ""]
    assert cells(text, "bytes")[1:3] == ["16,000,000", "4,000,000"]
    assert "note: a note\n" in text

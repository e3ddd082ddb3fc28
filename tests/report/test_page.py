"""The report as a page: everything is in it, nothing comes from elsewhere, and a browser shows it to everyone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank import cli
from onnx_lowrank.cli import main
from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.report import page
from onnx_lowrank.report.data import BudgetResult, Report, Size, Step, TargetResult
from onnx_lowrank.report.details import Curve, LayerDetails
from onnx_lowrank.report.page import Origin, inspection_page, result_page, verification_page, write_page
from onnx_lowrank.report.panels import search_chart
from onnx_lowrank.report.results import Result
from onnx_lowrank.report.spectra import spectrum
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.runtime import Partitions
from onnx_lowrank.types import Skip
from onnx_lowrank.verification.verify import Accuracy, Latency
from tests.helpers import parse
from tests.report.browser import Browser, needs_chromium, open_browser

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=1>\"'"
METHODS = ("tucker2", "spatial_svd", "channel_svd", "channel_svd_in", "cp3", "joint_left", "joint_right")
MOST_BYTES = 2_000_000


SPECTRUM = spectrum(np.random.default_rng(0).standard_normal((64, 96)) @ np.diag(0.95 ** np.arange(96)))


def layer(number: int, name: str) -> LayerDetails:
    """A layer as it may be: full curves, a spectrum or two, chosen by turns."""
    method = (*METHODS, "dense")[number % 8]
    rank = (24, 16) if method == "tucker2" else (32,)
    shares = np.linspace(0.02, 0.98, 24)
    curves = tuple(
        Curve(
            each,
            tuple(
                ((4 * i + 4,) * (1 + (each == "tucker2")), float(s), float((1 - s) ** 2 * (0.5 + 0.05 * m)))
                for i, s in enumerate(shares)
            ),
        )
        for m, each in enumerate(METHODS)
    )
    report = None
    if method != "dense":
        nodes = tuple(f"{name}_lowrank_{i}" for i in range(2))
        report = LayerReport(name, "Conv", method, rank, 10**7, 4 * 10**6, 10**5, 3 * 10**4, 0.25, True, "", nodes)
    spectra = (replace(SPECTRUM, rank=rank[0] if report else None),)
    if method == "tucker2":
        spectra += (replace(SPECTRUM, rank=rank[1]),)
    after = (4 * 10**6, 3 * 10**4) if report else (10**7, 10**5)
    return LayerDetails(
        name, "Conv", (64, 64, 3, 3), 10**7, after[0], 10**5, after[1], report, spectra, curves, "kernel"
    )


def made(count: int, name: str = "stage3/block.11/conv{}") -> Result:
    """What `compress` gives back of a network of so many layers, but for the model."""
    details = tuple(layer(i, name.format(i)) for i in range(count))
    accuracy = Accuracy("top1", 0.91, 0.904, 0.006, 0.0095, 10_000, {"agreement": 0.97, "cosine": 0.99})
    latency = Latency(
        "CPUExecutionProvider", 1, 1, 12.5, 6.1, 13.0, 6.9, 2.05, 1.98, 2.11,
        {"CPUExecutionProvider": 3 * count}, {"CPUExecutionProvider": count}, "",
    )  # fmt: skip
    steps = tuple(
        Step(share, share, share, None, 0.91 - drop, drop, drop + 0.004, share == 0.5)
        for share, drop in ((1.0, 0.0), (0.25, 0.4), (0.4, 0.012), (0.5, 0.006))
    )
    report = Report(
        Size(12 * 10**6 * count, 10**5 * count, 4 * 10**5 * count),
        Size(6 * 10**6 * count, 4 * 10**4 * count, 2 * 10**5 * count),
        tuple(d.report for d in details if d.report),
        tuple(Skip(f"depthwise{i}", "Conv", "depthwise: nothing to factorise") for i in range(count)),
        (BudgetResult("macs", 0.5, 0.49, True), BudgetResult("drop", 0.01, 0.0095, True)),
        accuracy,
        (latency,),
        {"analyze": 1.5, "verify": 2.5},
        {"python": "3.12.1", "processor": "A Processor", "onnxruntime": "1.23.0"},
        ("a note to read",),
        config={"max_drop": 0.01, "seed": 3, "methods": ["svd"]},
        targets=(TargetResult("nnapi", {"before": Partitions(9, 9, 1), "after": Partitions(12, 12, 1)}),),
        search=steps,
    )
    nothing: Any = None
    return Result(nothing, nothing, report, nothing, nothing, False, details)


COMMAND = "onnx-lowrank compress net.onnx small.onnx --budget macs=0.5 --report F.html"
ORIGIN = Origin("folder/net.onnx", COMMAND, "small.onnx")


class Parts(HTMLParser):
    """The tags of a page with their attributes, and its text without styles and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += " " + data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def test_a_page_says_what_was_done_and_how_to_get_it_again() -> None:
    text = Parts(result_page(made(5), ORIGIN)).words
    for part in (
        "net.onnx", "written to small.onnx", "Everything asked for was met",
        "60.0 \N{RIGHTWARDS ARROW} to 30.0 M", "500 \N{RIGHTWARDS ARROW} to 200 k", "2.00 \N{RIGHTWARDS ARROW} to 1.00 MB", "49.0 %",
        "2.05\N{MULTIPLICATION SIGN}", "1.98 to 2.11", "median 12.5 ms , p90 13.0 ms", "CPUExecutionProvider, batch 1, 1 thread, on A Processor",
        "90.4 %", "drop 0.60 points, at most 0.95 points with 95 % confidence; 10,000 samples",
        "a note to read", "depthwise: nothing to factorise", "depthwise4", "CPUExecutionProvider 5 15",
        "On nnapi, told without the device", "12 of 12", "stage3/block.11/conv4_lowrank_0", "tucker2 rank 24x16",
        "Kernel error of the fit 0.250", "at 40.0 % of the layer's MACs or less", "4 (result) 50.0 %",
        COMMAND, "python 3.12.1", "analyze 1.5", "all 4.0", "seed 3",
    ):  # fmt: skip
        assert part in text, part


def test_what_was_not_met_is_the_verdict() -> None:
    result = made(2)
    report = replace(result.report, budgets=(BudgetResult("macs", 0.5, 0.6, False),))
    text = Parts(result_page(replace(result, report=report), ORIGIN)).words
    assert "Not met: macs 0.6 was reached, 0.5 asked for" in text
    assert "Everything asked for was met" not in text


def test_of_a_promise_the_drop_and_its_bound_are_told_apart_and_one_plan_is_one() -> None:
    result = made(2)
    report = replace(
        result.report, budgets=(BudgetResult("drop", 0.01, 0.0095, True),), search=result.report.search[:1]
    )
    page = result_page(replace(result, report=report), ORIGIN)
    said = "drop of top1 at most 1.00 points 0.60 points, at most 0.95 points with 95 % confidence met"
    assert said in Parts(page).words
    assert "1 plan was measured;" in page and "plans were measured" not in page


def test_a_page_of_nothing_measured_leaves_the_parts_out() -> None:
    result = made(0)
    nan = math.nan
    latency = Latency(
        "QNNExecutionProvider", 1, 1, nan, nan, nan, nan, nan, nan, nan, {}, {}, "all was left to the CPU"
    )
    accuracy = Accuracy("sqnr", math.inf, 20.0, math.inf, nan, 8, {}, broken=3)
    report = replace(result.report, latency=(latency,), accuracy=accuracy, search=(), budgets=(), targets=())
    text = Parts(result_page(replace(result, report=report), ORIGIN)).words
    assert "Not run on QNNExecutionProvider" in text and "all was left to the CPU" in text
    assert "3 of the samples give NaN or infinity." in text
    assert not {"nan", "inf"} & set(text.lower().replace("give nan or", "").split())
    assert "Accuracy against cost" not in text and "layer by layer" not in text


def test_names_from_a_model_are_text(tmp_path: Path) -> None:
    result = made(8, EVIL + "{}")
    report = replace(
        result.report,
        skips=(Skip(EVIL, "Conv", EVIL),),
        notes=(EVIL,),
        environment={"processor": EVIL},
        accuracy=replace(result.report.accuracy, metric=EVIL),  # type: ignore[type-var]
        seconds={EVIL: 1.0},
        config={"evaluate": EVIL, "group": {EVIL: EVIL}},
    )
    text = result_page(replace(result, report=report), Origin(EVIL, EVIL, EVIL))
    parts = Parts(text)
    assert [tag for tag, _ in parts.tags if tag in ("script", "img")] == ["script"]  # the page's own
    assert not any(name.startswith("on") for _, attributes in parts.tags for name in attributes)
    assert " ".join(EVIL.split()) in parts.words
    assert "\x1b" not in result_page(made(1, "a\x1b[2Jb{}"), ORIGIN)


@pytest.mark.parametrize("count", [5, 150])
def test_a_page_needs_nothing_beside_it_and_is_small(count: int) -> None:
    text = result_page(made(count), ORIGIN)
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"(?:https?:)?//(?!# )[a-z]|@import|url\(", re.sub(r"(?m)^\s*//.*$", "", text), re.I)
    for tag, attributes in Parts(text).tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "action", "data", "xlink:href"):
            assert name not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy


def test_every_decomposition_has_a_colour() -> None:
    style = page._asset("page.css")
    for name in DECOMPOSITIONS:
        assert re.search(rf"\.m-{name}\b", style), name
        assert re.search(rf"\.l-{name}\b", style), name


SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""What linear RGB looks like to whom: Machado, Oliveira & Fernandes (2009), severity 1."""

TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
TO_LAB = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099], [0.0259040371, 0.7827717662, -0.808675766]]  # fmt: skip
"""Linear RGB to Oklab, by way of the cube root: Ottosson (2020)."""


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart_by_everyone(theme: int, sight: str) -> None:
    hues = ("blue", "indigo", "plum", "rose", "brick", "amber", "olive", "green", "teal", "dense")
    style = page._asset("page.css")
    found = [re.findall(rf"--{hue}: #([0-9a-f]{{6}})", style) for hue in hues]
    assert all(each[1] == each[2] and len(each) == 3 for each in found)  # dark, by the system and by the button
    values = np.array([[int(each[theme][i : i + 2], 16) / 255 for i in (0, 2, 4)] for each in found])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(SIGHTS[sight]), 0, 1)
    lab = np.cbrt(seen @ np.transpose(TO_CONES)) @ np.transpose(TO_LAB)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1) + 9 * np.eye(len(lab))
    assert distances.min() > 0.07  # about three times what is just told apart side by side


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "F.html"
    path.write_text("an earlier page")
    with pytest.raises(lr.LowRankError, match=r"missing.F\.html cannot be written"):
        write_page(tmp_path / "missing" / "F.html", "text")
    write_page(path, "text")
    assert path.read_text() == "text"
    assert [item.name for item in tmp_path.iterdir()] == ["F.html"]


def test_without_the_extra_the_user_is_told_what_to_install_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    monkeypatch.setattr(cli.pipeline, "compress", None)  # would raise another error
    code = main(
        [
            "compress",
            str(models.DIGITS),
            str(tmp_path / "a.onnx"),
            "--rank",
            "vbmf",
            "--report",
            str(tmp_path / "F.html"),
        ]
    )
    assert code == 2
    assert capsys.readouterr().err == (
        "onnx-lowrank: a report as a page needs Jinja: pip install 'onnx-lowrank[report]'\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing/F.html", "", "a.onnx"])
def test_a_page_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(cli.pipeline, "compress", None)
    line = ["compress", str(models.DIGITS), str(tmp_path / "a.onnx"), "--rank", "vbmf"]
    assert main([*line, "--report", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_each_command_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits, test = str(models.DIGITS), str(models.DIGITS_TEST)
    quick = "--methods svd,spatial_svd,tucker2 --jobs 1"
    compress = f"compress {digits} a.onnx --budget macs=0.5 --plan p.json --evaluate {test} --report c.html {quick}"
    lines = {
        "c.html": compress,
        "e.html": f"compress {digits} e.onnx --rank vbmf --report e.html {quick}",
        "a.html": f"apply {digits} p.json b.onnx --report a.html --jobs 1",
        "v.html": f"verify {digits} a.onnx --evaluate {test} --report v.html",
        "i.html": f"inspect {digits} --report i.html {quick}",
    }
    for name, line in lines.items():
        assert main([*line.split(), "--quiet"]) == 0
        text = Parts(Path(name).read_text()).words
        assert f"onnx-lowrank {line} --quiet" in text
        assert "digits.onnx" in text and "SHA-256" in text
        if name != "v.html":  # spectra and errors, whatever the ranks were chosen by
            assert "above the noise" in text and "The best of each method" in text
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_details_change_nothing_of_the_result() -> None:
    options: dict[str, Any] = {"budget": {"macs": 0.5}, "methods": "spatial_svd,svd", "jobs": 1}
    plain = lr.compress(models.DIGITS, **options)
    full = lr.compress(models.DIGITS, details=True, **options)
    assert plain.details == ()
    assert plain.model.SerializeToString() == full.model.SerializeToString()
    assert [d.name for d in full.details] == ["conv1", "conv2", "block.conv1", "block.conv2", "conv3", "conv4", "fc"]
    rest = full.report.original.macs - sum(d.macs_before for d in full.details)
    assert rest >= 0
    assert sum(d.macs_after for d in full.details) + rest == full.report.compressed.macs


def test_curves_hold_what_the_plan_saw() -> None:
    result = lr.compress(models.DIGITS, budget={"macs": 0.5}, methods="spatial_svd,svd", jobs=1, details=True)
    for details, choice in zip(result.details, result.plan.choices, strict=True):
        if not choice.dense:
            (curve,) = (c for c in details.curves if c.decomposition == choice.decomposition)
            (point,) = (p for p in curve.points if p[0] == choice.rank)
            assert point[2] == choice.error
            assert point[1] == pytest.approx(details.macs_after / details.macs_before)
            (seen,) = details.spectra
            assert seen.rank == choice.rank[0]


@pytest.mark.parametrize("options", [{"rank": "vbmf"}, {"budget": {"macs": 0.3}, "align": 1}], ids=["vbmf", "budget"])
def test_what_was_chosen_is_a_point_of_its_curve(options: dict[str, Any]) -> None:
    result = lr.compress(models.DIGITS, details=True, jobs=1, **options)
    decomposed = [d for d in result.details if d.report]
    assert decomposed
    for details in decomposed:
        (curve,) = (c for c in details.curves if c.decomposition == details.decomposition)
        (point,) = (p for p in curve.points if p[0] == details.rank)
        assert math.sqrt(point[2]) == pytest.approx(details.report.relative_error, rel=0.2)  # type: ignore[union-attr]


def test_a_layer_left_alone_says_why_and_a_depthwise_one_has_no_spectrum() -> None:
    result = made(8)
    (dense,) = (d for d in result.details if d.report is None)
    bare = replace(result, details=(replace(dense, spectra=(), curves=()),))
    skip = Skip(dense.name, "Conv", "depthwise: nothing to cut")
    text = result_page(replace(bare, report=replace(result.report, skips=(skip,))), ORIGIN)
    assert "Left as it was depthwise: nothing to cut" in Parts(text).words
    assert "Spectrum of the kernel" not in text
    model = parse(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { y = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w) }",
        w=np.ones((4, 1, 3, 3), np.float32),
    )
    (found,) = lr.inspect(model, details=True).details
    assert (found.spectra, found.curves) == ((), ())


def test_a_spectrum_says_where_the_noise_begins() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((90, 5)) @ rng.standard_normal((5, 300)) + 0.1 * rng.standard_normal((90, 300))
    seen = spectrum(matrix, 8)
    exact = np.linalg.svd(matrix, compute_uv=False)
    assert (seen.vbmf_rank, seen.rank, seen.shape) == (5, 8, (90, 300))
    assert exact[5] < seen.threshold * exact[0] < exact[4]
    assert len(seen.places) == 64 and seen.places[0] == 1 and seen.places[-1] == 90
    np.testing.assert_allclose(seen.values, exact[np.array(seen.places) - 1] / exact[0], rtol=1e-6)
    assert spectrum(np.zeros((3, 4))).vbmf_rank == 0


def test_the_plans_of_a_search_are_in_the_report() -> None:
    options: dict[str, Any] = {"methods": "svd,spatial_svd", "objective": "macs", "jobs": 1}
    report = lr.compress(models.DIGITS, evaluate=models.DIGITS_TEST, max_drop=0.05, **options).report
    first, *others = report.search
    assert (first.macs, first.params, first.size_bytes, first.drop) == (1, 1, 1, 0)
    assert len(others) > 1
    (chosen,) = (step for step in report.search if step.chosen)
    assert chosen.macs == report.compressed.macs / report.original.macs
    assert chosen.accuracy == report.accuracy.compressed  # type: ignore[union-attr]
    assert any(step.drop_upper_95 > 0.05 for step in others)
    steps = report.to_dict()["search"]
    assert [step["macs"] for step in steps] == [step.macs for step in report.search]


def test_a_search_is_drawn_with_its_result_and_what_was_accepted() -> None:
    chart = search_chart(made(3).report)
    assert chart is not None
    kinds = [mark.kind for mark in chart.marks]
    assert kinds == ["original", "step", "step", "step", "step"]
    assert [mark.chosen for mark in chart.marks] == [False, False, False, False, True]
    assert [mark.below for mark in chart.marks] == [False, False, True, False, False]  # lost far more than was accepted
    chosen = chart.marks[-1]
    assert chosen.whisker is not None and chosen.whisker > chosen.y  # down, where the accuracy is less
    assert "50.0 % of the MACs" in chosen.text and "at most 1.00 points" in chosen.text
    (limit,) = chart.rules
    assert limit.y1 > chosen.y


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module", params=[5, 150])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    write_page(path, result_page(made(request.param), ORIGIN))
    return path


OPEN_SOME = "for (const each of [...document.querySelectorAll('details.layer')].slice(0, 8)) each.open = true;"

WIDER = """
const out = [];
for (const e of document.body.querySelectorAll('*')) {
  if (e.closest('.scroll, .sr, .skip, svg, [hidden]') || !e.getClientRects().length) continue;
  const box = e.getBoundingClientRect();
  if (box.right > document.documentElement.clientWidth + 0.5 || box.left < -0.5) out.push(e.tagName + '.' + e.className);
}
return [document.documentElement.scrollWidth - document.documentElement.clientWidth, out];
"""

CLIPPED = """
const out = [];
for (const text of document.querySelectorAll('svg.chart text')) {
  if (!text.getClientRects().length) continue;
  const box = text.getBoundingClientRect(), frame = text.closest('svg').getBoundingClientRect();
  if (box.left < frame.left - 4 || box.right > frame.right + 8 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
    out.push(text.textContent);
}
return out;
"""

CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return rgb('white'); };
const ratio = (one, two) => { const [a, b] = [light(one), light(two)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
const least = {text: 99, where: '', graphic: 99, which: ''};
for (const e of document.querySelectorAll('body *')) {
  if (!e.getClientRects().length || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  if (['TITLE', 'DESC', 'SCRIPT', 'STYLE', 'title', 'desc'].includes(e.tagName)) continue;
  const style = getComputedStyle(e), found = ratio(rgb(e.closest('svg.chart') ? style.fill : style.color), behind(e));
  if (found < least.text) { least.text = found; least.where = e.className + ' ' + e.textContent.slice(0, 30); }
}
const page = rgb(getComputedStyle(document.body).backgroundColor);
for (const name of arguments[0]) {
  const probe = document.createElement('i'); probe.className = 'swatch m-' + name; document.body.append(probe);
  const found = ratio(rgb(getComputedStyle(probe).backgroundColor), page); probe.remove();
  if (found < least.graphic) { least.graphic = found; least.which = name; }
}
return least;
"""


@needs_chromium
@pytest.mark.parametrize(
    ("shown", "width", "dark"),
    [(5, 1280, False), (5, 1280, True), (5, 390, False), (5, 390, True), (150, 1280, False), (150, 390, True)],
    indirect=["shown"],
)
def test_a_browser_shows_the_page_whole_and_without_a_complaint(
    browser: Browser, shown: Path, width: int, dark: bool
) -> None:
    browser.open(shown, width=width, dark=dark)
    browser.run(OPEN_SOME)
    assert browser.messages() == []
    assert browser.run(WIDER) == [0, []]
    assert browser.run(CLIPPED) == []
    assert browser.run("return document.querySelectorAll('details.layer[open] svg.chart').length") >= 15
    names = browser.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    found = browser.run(CONTRAST, [*DECOMPOSITIONS, "dense", "rest"])
    assert found["text"] >= 4.5, found
    assert found["graphic"] >= 3, found


@needs_chromium
def test_light_and_dark_differ_and_the_button_has_the_last_word(browser: Browser, shown: Path) -> None:
    colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    browser.open(shown, dark=False)
    light = browser.run(colours)
    browser.open(shown, dark=True)
    dark = browser.run(colours)
    assert light[0] == "rgb(255, 255, 255)" and light[0] != dark[0] and light[1] != dark[1]
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colours) == light
    browser.open(shown, dark=True)
    assert browser.run(colours) == light  # kept
    browser.run("localStorage.clear()")


@needs_chromium
def test_the_keyboard_reaches_layers_and_what_is_said_of_them(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    focus = "const e = document.activeElement; return [e.className.baseVal ?? e.className, e.getAttribute('aria-label') || e.textContent.trim()]"
    tip = "const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent"
    seen = []
    for _ in range(12):
        browser.press("Tab")
        seen.append(browser.run(focus)[0].split(" ")[0])
        if seen[-1] == "seg":
            break
    assert seen[:2] == ["skip", "button"] and seen[-1] == "seg", seen
    first = browser.run(tip)
    assert first.startswith("stage3/block.11/conv0: 10.0 M MACs before")
    browser.press("ArrowRight")
    second = browser.run(tip)
    assert second.startswith("stage3/block.11/conv1: 10.0 M MACs before")
    browser.press("Escape")
    assert browser.run(tip) == ""
    browser.press("Enter")
    assert browser.run("return [...document.querySelectorAll('details.layer[open]')].map((e) => e.id)") == ["layer-2"]
    assert browser.run(focus)[1].startswith("stage3/block.11/conv1")
    # one stop for each group, however many layers
    assert browser.run(
        "return [...document.querySelectorAll('.strip')].map((e) => e.querySelectorAll('[tabindex=\"0\"]').length)"
    ) == [1, 1]


@needs_chromium
def test_layers_can_be_filtered(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    browser.run(
        "const e = document.getElementById('filter'); e.value = 'conv3 channel'; e.dispatchEvent(new Event('input'))"
    )
    left = browser.run("return [...document.querySelectorAll('details.layer:not([hidden])')].map((e) => e.id)")
    assert "layer-4" in left and "layer-1" not in left
    assert browser.run("return document.getElementById('count').textContent").startswith(f"{len(left)} of ")


@needs_chromium
def test_pictures_and_tables_have_names(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    nameless = browser.run("""
return [...document.querySelectorAll('svg:not([aria-hidden]), [role=img], [role=group], [role=region], button, input, table')].filter((e) => {
  const by = (e.getAttribute('aria-labelledby') || '').split(' ').map((id) => id && document.getElementById(id)?.textContent).join('');
  return !(e.getAttribute('aria-label') || by || e.textContent.trim() || e.labels?.length);
}).map((e) => e.outerHTML.slice(0, 80))""")
    assert nameless == []
    assert browser.run("return document.querySelectorAll('h1').length") == 1
    assert (
        browser.run(
            "const ids = [...document.querySelectorAll('[id]')].map((e) => e.id); return ids.length - new Set(ids).size"
        )
        == 0
    )


@needs_chromium
def test_a_script_in_a_name_does_not_run(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    write_page(path, result_page(made(8, EVIL + "{}"), Origin(EVIL, EVIL, EVIL)))
    browser.open(path)
    browser.run(OPEN_SOME)
    assert browser.run("return window.evil === undefined") is True
    assert browser.messages() == []
    # and if a name ever got through, the page's own policy would stop it
    path.write_text(path.read_text().replace("</main>", "<script>window.evil = 1</script></main>"))
    browser.open(path)
    assert browser.run("return window.evil === undefined") is True
    assert any("Content Security Policy" in message for message in browser.messages())


@needs_chromium
def test_inspections_and_verifications_are_shown_as_well(browser: Browser, tmp_path: Path) -> None:
    view = lr.inspect(models.DIGITS, details=True, methods="spatial_svd,svd", jobs=1)
    check = lr.verify(models.DIGITS, models.DIGITS)
    for number, text in enumerate(
        (inspection_page(view, Origin("a.onnx")), verification_page(check, Origin("a.onnx")))
    ):
        path = tmp_path / f"{number}.html"
        write_page(path, text)
        for width in (1280, 390):
            browser.open(path, width=width)
            browser.run(OPEN_SOME)
            assert browser.messages() == []
            assert browser.run(WIDER) == [0, []]

"""Accuracy without labels: this tool beside other ways of choosing and making low-rank chains, at the same MACs.

    python -m tools.benchmark_accuracy OUT [--data ../shared/data] [--models cifar10_resnet20 ...]

Every way gets the same model, the same share of MACs and no labels; none is fine-tuned. The table is printed as Markdown,
models and results are kept in OUT, and a second run goes on where the first one stopped. Times are measured at the end, on
one thread, all ways of a model in turn. Needs Pillow.

The others are written here after their papers, on this package's decompositions, because their codes do not take ONNX:

svd         channel SVD of the weights, the same share of every layer
vbmf_tucker EVBMF ranks in both channel modes (Kim et al. 2016), Tucker-2, all ranks scaled by one factor
vbmf_cp     EVBMF ranks, CP-3 by alternating least squares, likewise
spatial     spatial SVD of the weights, the same share of every layer (Jaderberg et al. 2014)
whitened    channel SVD of the whitened weights, ranks by one energy threshold (the recipe of BALF 2025)
enc_map     spatial SVD, the same normalised energy in every layer (ENC-Map, Kim, Khan & Kyung 2019), first layer by channel
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import onnx_lowrank as lr
from onnx_lowrank.calibration.calibrate import collect
from onnx_lowrank.candidates import Group, price
from onnx_lowrank.config import make_config
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.decompositions.weighted import output_spectrum
from onnx_lowrank.graph.save import save
from onnx_lowrank.graph.segments import cuts
from onnx_lowrank.graph.splice import Replacement, splice
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.ranks import evbmf
from onnx_lowrank.rewriting.rewrite import rewrite
from onnx_lowrank.runtime import RunSettings, Session, time_pair
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import Candidate, LayerStatistics, LowRankError, Plan, no_progress
from onnx_lowrank.work.tasks import Work
from tools.cifar import inputs, lossless

Feeds = dict[str, np.ndarray]
Samples = list[Any]
"""Batches: feeds, or feeds and labels."""

BATCH = 50


@dataclass(frozen=True)
class Task:
    """A model, its samples and the share of its MACs that is kept."""

    file: str
    macs: float
    samples: Callable[[Path], tuple[Samples, Samples]]


@dataclass(frozen=True)
class Row:
    """What one way makes of a model."""

    way: str
    macs: float
    params: float
    metric: str
    original: float
    compressed: float
    agreement: float
    sqnr: float
    seconds: float


def batches(name: str, samples: np.ndarray, labels: np.ndarray | None = None, size: int = BATCH) -> Samples:
    starts = range(0, len(samples), size)
    parts = [({name: samples[i : i + size]}, slice(i, i + size)) for i in starts]
    return [batch if labels is None else (batch, labels[at]) for batch, at in parts]


def cifar(scaled: bool) -> Callable[[Path], tuple[Samples, Samples]]:
    def load(data: Path) -> tuple[Samples, Samples]:
        parts = []
        for file in ("train_2000.npz", "test_500.npz"):
            pictures, labels = lossless(data / "cifar10" / file)
            parts.append((inputs(pictures, scaled=scaled), labels))
        (train, _), (test, labels) = parts
        return batches("input", train), batches("input", test, labels)

    return load


def photographs(data: Path) -> Iterator[tuple[Image.Image, int]]:
    """The pictures of the ImageNet sample in a fixed random order, with their classes."""
    lines = (data / "imagenet_sample" / "labels.csv").read_text().splitlines()
    header = lines[0].split(",")
    label = header.index("label")
    classes = {Path(line.split(",")[1 - label]).name: int(line.split(",")[label]) for line in lines[1:]}
    with zipfile.ZipFile(data / "imagenet_sample" / "crops256_500.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for index in np.random.default_rng(0).permutation(len(names)):
            picture = Image.open(io.BytesIO(archive.read(names[index]))).convert("RGB")
            yield picture, classes[Path(names[index]).name]


def mobilenet(data: Path) -> tuple[Samples, Samples]:
    pictures, labels = [], []
    for picture, label in photographs(data):
        pictures.append((np.asarray(picture.crop((16, 16, 240, 240)), np.float32) - 128) / 128)
        labels.append(label + 1)  # class 0 is the background
    rows = np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
    return batches("input", rows[:200], size=20), batches("input", rows[200:], np.array(labels[200:]), size=20)


def faces(data: Path) -> tuple[Samples, Samples]:
    rows = [(np.asarray(p.resize((320, 240)), np.float32) - 127) / 128 for p, _ in photographs(data)]
    stacked = np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2))
    return batches("input", stacked[:200], size=1), batches("input", stacked[200:300], size=1)


def luminance(data: Path) -> tuple[Samples, Samples]:
    rows = np.stack([np.asarray(p.convert("L").resize((84, 84)), np.float32) / 255 for p, _ in photographs(data)])
    rows = rows[:, None]
    return batches("_ppp5_expanded", rows[:300], size=20), batches("_ppp5_expanded", rows[300:], size=20)


TASKS = {
    "cifar10_resnet20": Task("model_bn.onnx", 0.5, cifar(scaled=True)),
    "cifar10_resnet56": Task("model_bn.onnx", 0.5, cifar(scaled=True)),
    "mlperf_resnet8_cifar10": Task("model.onnx", 0.5, cifar(scaled=False)),
    "mobilenet_v1_1.0_224": Task("model.onnx", 0.905, mobilenet),
    "ultraface_rfb320": Task("model.onnx", 0.7, faces),
    "superres_espcn": Task("model.onnx", 0.5, luminance),
}
"""MobileNet at 90 % of its pointwise MACs: it is factored already."""


# The other ways: a rank for every layer and a level, and the level that gives the MACs wanted

SCALES = 8.0
"""Most that ranks estimated by EVBMF are raised by, where they alone keep fewer MACs than wanted."""

Pick = Callable[[Group, float], "Candidate"]


def spatial_or_channel(group: Group, channel: bool = False) -> str:
    for name in ("channel_svd" if channel else "spatial_svd", "channel_svd", "svd"):
        if lift.refuses(find_decomposition(name), [group.layers[0].spec]) is None:
            return name
    raise LowRankError("nothing applies")


def priced(group: Group, name: str, rank: Sequence[float]) -> Candidate:
    """The candidate of about this rank; dense where that saves nothing."""
    highest = lift.max_rank(find_decomposition(name), [group.layers[0].spec])
    choice = price(group, name, tuple(min(max(1, round(r)), top) for r, top in zip(rank, highest, strict=True)), 0.0)
    return choice if choice.cost.macs < group.dense.cost.macs else group.dense


def same_share(channel: bool) -> Pick:
    def pick(group: Group, level: float) -> Candidate:
        name = spatial_or_channel(group, channel)
        one = price(group, name, (1,), 0.0).cost.macs
        return priced(group, name, (level * group.dense.cost.macs / one,))

    return pick


def scaled_vbmf(method: str) -> Pick:
    known: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def pick(group: Group, level: float) -> Candidate:
        if group.names not in known:
            layer = group.layers[0]
            name = method if lift.refuses(find_decomposition(method), [layer.spec]) is None else "svd"
            estimate = lift.estimate_rank(
                find_decomposition(name), [layer.spec], [layer.read_weight()], lambda matrix: evbmf(matrix).rank
            )
            known[group.names] = name, estimate
        name, estimate = known[group.names]
        return priced(group, name, [SCALES * level * r for r in estimate])

    return pick


def spectra(groups: Sequence[Group], seen: dict[str, LayerStatistics] | None) -> dict[tuple[str, ...], np.ndarray]:
    """Singular values of each layer in the format that the way uses: of the weights, or of the whitened ones."""
    found = {}
    for number, group in enumerate(groups):
        layer = group.layers[0]
        weight = np.asarray(layer.read_weight(), np.float64)
        if seen is not None:
            values = np.sqrt(output_spectrum(seen[layer.name].output_covariance(weight.reshape(len(weight), -1))))
        elif spatial_or_channel(group, number == 0) == "spatial_svd":
            moved = np.moveaxis(weight, (0, 1, 2), (0, -2, -1))
            values = np.linalg.svd(moved.reshape(-1, weight.shape[1] * weight.shape[2]), compute_uv=False)
        else:
            values = np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)
        found[group.names] = values
    return found


def same_energy(values: dict[tuple[str, ...], np.ndarray], *, squared: bool, channel: bool, first: Group) -> Pick:
    """The least rank whose share of the energy (above that of rank 1, as ENC counts it) reaches the level."""

    def pick(group: Group, level: float) -> Candidate:
        sums = np.cumsum(values[group.names] ** (2 if squared else 1))
        shares = (sums - sums[0]) / max(sums[-1] - sums[0], 1e-30)
        name = spatial_or_channel(group, channel or group is first)
        return priced(group, name, (1 + int(np.searchsorted(shares, level)),))

    return pick


def at_share(planner: Planner, groups: Sequence[Group], pick: Pick, macs: float) -> Plan:
    """The plan of the highest level within the MACs."""
    low, high = 0.0, 1.0
    chosen = {group.names for group in groups}

    def plan(level: float) -> Plan:
        return planner.plan([pick(g, level) if g.names in chosen else g.dense for g in planner.subject.groups])

    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if plan(middle).ratio("macs") <= macs else (low, middle)
    return plan(low)


def whitened_model(planner: Planner, plan: Plan, seen: dict[str, LayerStatistics]) -> Any:
    """Every layer by itself in the norm of its inputs, the mean in the bias: no refit."""
    biases = {cut.layer.name: cut.bias for cut in cuts(planner.subject.model, planner.subject.found, list(seen))}
    replacements = []
    for group, choice in zip(planner.subject.groups, plan.choices, strict=True):
        if choice.dense:
            continue
        layer = group.layers[0]
        made = lift.factorize(
            find_decomposition(choice.decomposition),
            [layer.spec],
            [layer.read_weight()],
            choice.rank,
            [seen[layer.name]],
            rng=np.random.default_rng(0),
        )
        first, second = (kernel.reshape(len(kernel), -1) for kernel in made.kernels[0])
        missed = np.asarray(layer.read_weight(), np.float64).reshape(len(second), -1) - second @ first
        bias = biases[layer.name]
        shifted = None if bias is None else bias + missed @ seen[layer.name].mean
        chain, kernels = choice.chains[0], made.kernels[0]
        replacements.append(Replacement(layer.name, choice.decomposition, choice.rank, chain, kernels, shifted))
    return splice(planner.subject.model, planner.subject.found, replacements)[0].proto


def make(way: str, path: Path, fit: Samples, macs: float) -> Any:
    """The model that a way makes."""
    feeds = fit
    if way == "ours":
        return lr.compress(path, calibrate=feeds, budget={"macs": macs}).model
    config = make_config(budget={"macs": macs}, calibrate=feeds)
    planner = Planner(open_subject(path, config), config, no_progress)
    specs = {g.names: g.layers[0].spec for g in planner.subject.groups}
    groups = [g for g in planner.subject.groups if not specs[g.names].depthwise and not specs[g.names].transposed]
    if way == "whitened":
        names = [g.layers[0].name for g in groups]
        seen = collect(planner.subject.model, planner.subject.found, names, feeds, seed=0, progress=no_progress)
        usable = [g for g in groups if g.layers[0].name in seen]
        values = spectra(usable, seen)
        pick = same_energy(values, squared=True, channel=True, first=groups[0])
        return whitened_model(planner, at_share(planner, usable, pick, macs), seen)
    picks = {
        "svd": lambda: same_share(channel=True),
        "spatial": lambda: same_share(channel=False),
        "vbmf_tucker": lambda: scaled_vbmf("tucker2"),
        "vbmf_cp": lambda: scaled_vbmf("cp3"),
        "enc_map": lambda: same_energy(spectra(groups, None), squared=False, channel=False, first=groups[0]),
    }
    plan = at_share(planner, groups, picks[way](), macs)
    subject = planner.subject
    return rewrite(subject.model, subject.found, subject.groups, plan, seed=0, work=Work(2), progress=no_progress)[
        0
    ].proto


WAYS = ("svd", "vbmf_tucker", "vbmf_cp", "spatial", "whitened", "enc_map", "ours")


def run(name: str, data: Path, out: Path) -> None:
    task = TASKS[name]
    path = data / "models" / name / task.file
    fit, test = task.samples(data)
    for way in WAYS:
        record, model = out / f"{name}.{way}.json", out / f"{name}.{way}.onnx"
        if record.exists():
            continue
        start = time.perf_counter()
        made = make(way, path, fit, task.macs)
        seconds = time.perf_counter() - start
        subject = open_subject(made, make_config(budget={"macs": 1}))
        save(subject.model, model)
        checked = lr.verify(path, made, evaluate=test)
        a = checked.accuracy
        ratio = checked.compressed.macs / checked.original.macs, checked.compressed.params / checked.original.params
        near = {**a.others, a.metric: a.compressed}
        row = Row(way, *ratio, a.metric, a.original, a.compressed, near.get("agreement", np.nan), near["sqnr"], seconds)
        record.write_text(json.dumps(asdict(row)))
        print(name, row, flush=True)


def speeds(name: str, data: Path, out: Path) -> dict[str, float]:
    """How many times as fast as the original each way's model is: one sample, one thread."""
    task = TASKS[name]
    feeds = {key: value[:1] for key, value in task.samples(data)[0][0].items()}
    original = Session(data / "models" / name / task.file, RunSettings())
    return {w: time_pair(original, Session(out / f"{name}.{w}.onnx", RunSettings()), feeds).speedup for w in WAYS}


def table(name: str, data: Path, out: Path) -> str:
    rows = [Row(**json.loads((out / f"{name}.{way}.json").read_text())) for way in WAYS]
    faster = speeds(name, data, out)
    lines = [
        f"\n### {name}, {TASKS[name].macs:.1%} of the MACs, {rows[0].metric} of the original {rows[0].original:.3f}\n"
    ]
    lines += ["| way | MACs | parameters | metric | agreement | SQNR, dB | speedup | seconds |", "|" + "---|" * 8]
    for r in rows:
        same = f"{r.agreement:.3f}" if r.metric == "top1" else "-"
        figures = f"{r.macs:.3f} | {r.params:.3f} | {r.compressed:.3f} | {same} | {r.sqnr:.1f}"
        lines.append(f"| {r.way} | {figures} | {faster[r.way]:.2f} | {r.seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        run(name, args.data, args.out)
    for name in args.models:
        print(table(name, args.data, args.out), flush=True)


if __name__ == "__main__":
    main()

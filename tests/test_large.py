"""Models with more external data than memory is to hold: the same results, by way of the disk, and nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

import onnx_lowrank as lr
from onnx_lowrank.cli import main
from onnx_lowrank.graph import datafile
from onnx_lowrank.graph.datafile import DataFile, is_large
from onnx_lowrank.graph.model import load
from onnx_lowrank.rewriting import rewrite
from onnx_lowrank.search import bench
from onnx_lowrank.types import LowRankError
from tests.helpers import normal, parse

TEXT = """g (float[N,96] x) => (float[N,64] y) {
  [up] a = Gemm <transB=1> (x, w0, b0) r = Relu (a)
  [down] d = MatMul (r, w1) [half] h = MatMul (d, w2) [again] g = MatMul (h, w2)
  [small] m = MatMul (g, w3) s = Add (m, c) [end] y = MatMul (s, w4)
}"""


def model() -> onnx.ModelProto:
    kernels = {"w0": normal(200, 96), "w1": normal(200, 80), "w2": normal(80, 80), "w3": normal(80, 64)}
    kernels |= {"w4": normal(64, 64, seed=4), "b0": normal(200), "c": normal(1000)[:64]}
    return parse(TEXT, **kernels)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "m.onnx"
    onnx.save(model(), file, save_as_external_data=True, location="m.data", size_threshold=1024)
    return file


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model with external data is too large for memory."""
    monkeypatch.setattr(datafile, "LARGE_BYTES", 0)


def compressed(path: Path, **options: Any) -> lr.Result:
    return lr.compress(path, **{"budget": {"params": 0.6}, "align": 1, "jobs": 1, **options})


def written(result: lr.Result, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    result.save(folder / "out.onnx")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"jobs": 2},
        {"max_drop": 0.2, "objective": "params", "budget": None, "metric": "cosine", "evaluate": "random"},
        {"budget": None, "rank": "energy=0.8", "exclude": ["end"]},
        {"methods": "svd", "exclude": ["end"], "fold_batchnorm": True},
    ],
    ids=["budget", "jobs", "search", "estimator", "folded"],
)
def test_what_is_written_is_the_same_byte_for_byte_as_by_way_of_memory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    if options.get("evaluate"):
        options |= {"evaluate": [{"x": normal(64, 96, seed=5)}]}
    before = compressed(path, **options)
    expected = written(before, tmp_path / "memory")
    monkeypatch.setattr(datafile, "LARGE_BYTES", 0)
    after = compressed(path, **options)
    assert written(after, tmp_path / "disk") == expected
    assert after.report.layers, "nothing was changed: the comparison could not fail"
    assert after.report.original == before.report.original
    assert after.report.compressed == before.report.compressed
    assert after.report.accuracy.compressed == pytest.approx(before.report.accuracy.compressed, abs=1e-6)
    assert bench.IN_PARTS in after.report.notes
    assert bench.IN_PARTS not in before.report.notes


def test_what_is_not_replaced_stays_byte_for_byte(path: Path, large: None, tmp_path: Path) -> None:
    result = compressed(path, include=["down"], budget={"params": 0.9})
    written(result, tmp_path / "out")
    after = onnx.load(tmp_path / "out" / "out.onnx")
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    for tensor in model().graph.initializer:
        if tensor.name != "w1":
            assert kept[tensor.name].tobytes() == tensor.raw_data
    assert [n.SerializeToString() for n in after.graph.node if not n.name.startswith("down")] == [
        n.SerializeToString() for n in model().graph.node if n.name != "down"
    ]


def test_large_models_are_applied_to_and_verified_too(path: Path, large: None, tmp_path: Path) -> None:
    plan = lr.analyze(path, budget={"params": 0.6}, align=1)
    result = lr.apply(path, plan, align=1)
    files = written(result, tmp_path / "out")
    assert set(files) == {"out.onnx", "out.onnx.data"}
    check = lr.verify(path, tmp_path / "out" / "out.onnx")
    assert check.accuracy.compressed == pytest.approx(result.report.accuracy.compressed)
    assert check.compressed.params == result.report.compressed.params
    names = 100  # the file of a result that waits has another name than the one that is saved
    assert check.compressed.size_bytes == pytest.approx(result.report.compressed.size_bytes, abs=names)
    assert bench.IN_PARTS in check.notes
    assert check.latency[0].speedup > 0


def test_samples_reach_layers_whose_kernels_are_outside(path: Path, large: None) -> None:
    feeds = [{"x": normal(64, 96, seed=6)}]
    result = compressed(path, calibrate=feeds, evaluate=feeds)
    assert result.met
    assert result.report.accuracy.compressed > compressed(path, evaluate=feeds).report.accuracy.compressed


def test_large_is_what_has_much_external_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = load(model())
    monkeypatch.setattr(datafile, "LARGE_BYTES", 0)
    assert is_large(load(path))
    assert not is_large(inside)
    monkeypatch.setattr(datafile, "LARGE_BYTES", 1 << 30)
    assert not is_large(load(path))


# --- nothing is left behind -------------------------------------------------------------------------------------------


def test_the_data_of_a_result_go_with_it(path: Path, large: None, scratch: Path) -> None:
    result = compressed(path)
    (kept,) = scratch.iterdir()
    assert result.folder == kept / "result"
    assert {file.name for file in result.folder.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert all(uses_external_data(t) for t in result.model.graph.initializer if np.prod(t.dims) >= 1024)
    del result
    gc.collect()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("where", ["factors", "kernels", "parts"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), LowRankError("no")])
def test_a_run_that_ends_early_leaves_the_old_result_and_nothing_else(
    path: Path,
    large: None,
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    out = tmp_path / "out"
    out.mkdir()
    (out / "o.onnx").write_bytes(b"old")
    (out / "o.onnx.data").write_bytes(b"old data")
    if where == "factors":
        monkeypatch.setattr(rewrite.FactorCache, "put", fail)
    elif where == "kernels":
        monkeypatch.setattr(DataFile, "take", fail)
    else:
        monkeypatch.setattr(bench.PartSession, "run_all", fail)
    command = ["compress", str(path), str(out / "o.onnx"), "--budget", "params=0.6", "--align", "1", "--quiet"]
    if isinstance(error, OSError) and where != "kernels":
        with pytest.raises(OSError, match="No space"):
            main(command)
    else:
        assert main(command) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    gc.collect()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {"o.onnx": b"old", "o.onnx.data": b"old data"}
    assert not list(scratch.iterdir())


def test_a_full_disk_says_where_room_is_needed(path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DataFile, tensor: onnx.TensorProto, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DataFile, "take", full)
    with pytest.raises(LowRankError, match=r"No space left on device.*room for the result; TMPDIR names another"):
        compressed(path)


def test_data_that_become_a_link_to_elsewhere_are_refused_when_they_are_read(
    path: Path, large: None, tmp_path: Path
) -> None:
    loaded = load(path)
    data = path.with_name("m.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LowRankError, match="leads outside the model's folder: refused"):
        compressed(loaded)


# --- memory -----------------------------------------------------------------------------------------------------------

SIDE, WIDE, LAYERS = 384, 2560, 50
"""Kernels of 3.9 MB, 197 MB together."""


def make_deep(path: Path) -> None:
    rng, nodes, tensors = np.random.default_rng(0), [], []
    for i in range(LAYERS):
        shape = (SIDE, WIDE) if i % 2 == 0 else (WIDE, SIDE)
        tensors.append(
            numpy_helper.from_array(rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5), f"w{i}")
        )
        nodes.append(onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"n{i}"))
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["N", SIDE]) for name in ("x0", f"x{LAYERS}")]
    graph = onnx.helper.make_graph(nodes, "deep", ends[:1], ends[1:], tensors)
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(whole, path, save_as_external_data=True, location="deep.data")


def child(source: str, warm: str, out: str) -> None:
    """How much more memory a model takes than a small one, in MB, to standard output."""
    from onnx_lowrank.verification import parts

    gc.disable()  # what is large is let go at once, and not when it happens to be found
    datafile.LARGE_BYTES, parts.PartSession.__init__.__kwdefaults__["part_bytes"] = 1 << 20, 1 << 23

    def peak() -> float:
        # not that of getrusage: what this process was started from counts there
        status = Path("/proc/self/status").read_text()
        return float(status.partition("VmHWM:")[2].split()[0]) / 1e3

    compressed(Path(warm), jobs=1)
    before = peak()
    result = compressed(Path(source), budget={"params": 0.5}, align=8)
    result.save(out)
    sys.stdout.write(json.dumps({"more": peak() - before, "layers": len(result.report.layers)}))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_bounded_by_a_layer_and_not_by_the_model(path: Path, tmp_path: Path) -> None:
    make_deep(tmp_path / "deep.onnx")
    code = "from tests.test_large import child; import sys; child(*sys.argv[1:4])"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    arguments = [str(tmp_path / "deep.onnx"), str(path), str(tmp_path / "out.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["layers"] >= LAYERS / 2
    assert seen["more"] < 80, "a result of 98 MB and a model of 197 passed through"
    assert (tmp_path / "out.onnx.data").stat().st_size > 90e6

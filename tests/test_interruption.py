"""Ctrl-C, SIGTERM and SIGKILL at any moment: the old file or the whole new one, and the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.cache import FOLDER, LIMIT
from onnx_lowrank.files import LOCK, scratch_folder, write_whole
from tests import tiny
from tests.helpers import normal, parse

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="a system without process groups")

ROOT = Path(__file__).parents[1]

NETWORK = """g (float[N, 6, 8, 8] x) => (float[N, 10] y) {
  [stem] s = Conv <pads=[1,1,1,1]> (x, k0, b0) r0 = Relu (s)
  [one] a = Conv <pads=[1,1,1,1]> (r0, k1, b0) r1 = Relu (a)
  [two] b = Conv <pads=[1,1,1,1]> (r1, k2, b0) r2 = Relu (b)
  [mean] m = GlobalAveragePool (r2) f = Flatten (m)
  [head] y = Gemm <transB=1> (f, w, v)
}"""

KILLS = 3


@dataclass
class Place:
    """A folder with a model, samples, a cache, a folder for scratch and one for results."""

    folder: Path

    def start(self, name: str, moment: int, *more: str, options: str = "") -> subprocess.CompletedProcess[str]:
        """A run that gets a signal at a moment; it is over when all of its processes are."""
        arguments = f"compress model.onnx out/small.onnx --budget macs=0.6 --align 1 --methods svd,cp3 {options}"
        command = [sys.executable, "-m", "tests.interrupted", name, str(moment), str(self.log)]
        environment = {
            **os.environ, FOLDER: str(self.folder / "cache"), LIMIT: str(1 << 28), "TMPDIR": str(self.folder / "scratch"),
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        options_ = ["--jobs", "1", "--seed", "3", *more] if "--jobs" not in options else [*more]
        return subprocess.run(
            [*command, *arguments.split(), *options_],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False, start_new_session=True,
            timeout=300,
        )  # fmt: skip

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def out(self) -> Path:
        return self.folder / "out" / "small.onnx"

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def work(self) -> list[str]:
        """Pieces of work that were begun."""
        return [line for line in self.lines() if not line.startswith("calls")]

    def left(self) -> list[str]:
        """What lies about that is not a result."""
        files = [*(self.folder / "scratch").rglob("*"), *(self.folder / "out").rglob("*")]
        others = {self.out, self.folder / "scratch" / ".ses"}  # the latter is ONNX Runtime's
        return sorted(path.relative_to(self.folder).as_posix() for path in files if path not in others)


def furnished(folder: Path) -> Place:
    kernels = {f"k{i}": normal(16, 16, 3, 3, seed=i) for i in (1, 2)}
    model = parse(NETWORK, k0=normal(16, 6, 3, 3), b0=normal(16), w=normal(10, 16), v=normal(10), **kernels)
    folder.mkdir(exist_ok=True)
    tiny.save(model, folder / "model.onnx")
    np.savez(folder / "data.npz", x=normal(16, 6, 8, 8))
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    return Place(folder)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return furnished(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, list[str], int]]:
    """By options: the result, the pieces of work and the number of calls of a run that nothing interrupts."""
    found = {}
    for options in ("", "--calibrate data.npz"):
        place = furnished(tmp_path_factory.mktemp("undisturbed"))
        done = place.start("SIGKILL", 0, options=options)
        assert done.returncode == 0, done.stderr
        *_, last = place.lines()
        found[options] = place.out.read_bytes(), place.work(), int(last.split()[1])
    return found


Undisturbed = dict[str, tuple[bytes, list[str], int]]


def test_runs_killed_at_random_moments_leave_nothing_partial_and_the_next_goes_on(
    place: Place, undisturbed: Undisturbed
) -> None:
    options = "--calibrate data.npz"
    result, work, calls = undisturbed[options]
    assert len(set(work)) == len(work) > 4
    rng = np.random.default_rng(5)
    killed = 0
    while killed < KILLS:
        before = place.work()
        done = place.start("SIGKILL", int(rng.integers(1, calls)), options=options)
        began = place.work()[len(before) :]
        assert len(set(began) & set(before)) <= 1, "more than the layer in hand was done again"
        if done.returncode == -signal.SIGKILL:
            killed += 1
            assert not place.out.exists() or place.out.read_bytes() == result
        else:  # it was through before its moment came, as much was done already
            assert done.returncode == 0, done.stderr
            assert place.out.read_bytes() == result
            assert place.left() == []
            for path in sorted((place.folder / "cache").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            place.log.unlink()
            place.out.unlink()
    done = place.start("SIGKILL", 0, options=options)
    assert done.returncode == 0, done.stderr
    assert place.out.read_bytes() == result
    assert place.left() == [], "what killed runs left is there still"
    assert set(place.work()) == set(work)


@pytest.mark.parametrize(
    ("name", "code", "word", "jobs"), [("SIGINT", 130, "interrupted", 2), ("SIGTERM", 143, "terminated", 1)]
)
def test_a_stopped_run_says_so_and_leaves_the_old_file(
    name: str, code: int, word: str, jobs: int, place: Place, undisturbed: Undisturbed
) -> None:
    calls = undisturbed[""][2]
    place.out.write_bytes(b"the old file")
    done = place.start(name, calls // 30, "--jobs", str(jobs), options="")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"onnx-lowrank: {word}; nothing was written\n"
    assert place.out.read_bytes() == b"the old file"
    assert place.left() == []


HANGING = """
import os, signal, sys, threading
from onnx_lowrank import cli, pipeline
cli.GRACE_SECONDS = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)
def compress(*given, **options):
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        threading.Event().wait()
    finally:
        threading.Event().wait()
pipeline.compress = compress
sys.exit(cli.main(["compress", "model.onnx", "small.onnx", "--budget", "macs=0.5"]))
"""


@pytest.mark.parametrize(("name", "code", "how"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_run_that_cannot_clean_up_ends_all_the_same(place: Place, name: str, code: int, how: str) -> None:
    """Its processes may have died while they sent what it waits for."""
    run = subprocess.run(
        [sys.executable, "-c", HANGING, name], cwd=place.folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (code, f"onnx-lowrank: {how}; nothing was written\n")


def test_processes_end_with_the_one_that_started_them(place: Place, undisturbed: Undisturbed) -> None:
    """They would hold the ends of the pipes that the run is read from."""
    done = place.start("SIGKILL", undisturbed[""][2] // 15, "--jobs", "2")
    assert done.returncode == -signal.SIGKILL
    done = place.start("SIGKILL", 0, "--jobs", "2")
    assert (done.returncode, place.left()) == (0, [])
    assert place.out.read_bytes() == undisturbed[""][0]


def test_what_was_done_is_not_done_again_and_makes_the_same_bytes(place: Place, undisturbed: Undisturbed) -> None:
    options = "--calibrate data.npz"
    result, work, calls = undisturbed[options]
    for expected in (work, []):
        place.log.unlink(missing_ok=True)
        done = place.start("SIGKILL", 0, options=options)
        assert done.returncode == 0, done.stderr
        assert place.out.read_bytes() == result
        assert sorted(place.work()) == sorted(expected)
    assert int(place.lines()[-1].split()[1]) < calls


def test_a_damaged_cache_is_made_again(place: Place, undisturbed: Undisturbed) -> None:
    assert place.start("SIGKILL", 0).returncode == 0
    for number, path in enumerate(sorted((place.folder / "cache" / "layers").rglob("*/*"))):
        data = path.read_bytes()
        path.write_bytes((data[: len(data) // 2], data[:-1] + bytes([data[-1] ^ 1]), b"", data)[number % 4])
    done = place.start("SIGKILL", 0)
    assert done.returncode == 0, done.stderr
    assert place.out.read_bytes() == undisturbed[""][0]
    assert len(set(place.work())) < len(place.work()) < 2 * len(set(place.work()))


def test_runs_at_a_time_share_the_cache(place: Place, undisturbed: Undisturbed) -> None:
    command = [sys.executable, "-m", "tests.interrupted", "SIGKILL", "0", str(place.log), "compress", "model.onnx"]
    options = ["--budget", "macs=0.6", "--align", "1", "--methods", "svd,cp3", "--jobs", "1", "--seed", "3"]
    environment = {**os.environ, FOLDER: str(place.folder / "cache"), LIMIT: str(1 << 28), "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen(
            [*command, f"out/{n}.onnx", *options], cwd=place.folder, env=environment, stdout=subprocess.DEVNULL
        )
        for n in range(2)
    ]
    assert [run.wait(300) for run in runs] == [0, 0]
    assert {path.read_bytes() for path in (place.folder / "out").iterdir()} == {undisturbed[""][0]}
    place.log.unlink()
    assert place.start("SIGKILL", 0).returncode == 0
    assert place.work() == []


# --- files and folders ------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, [b"a", memoryview(b"bc")])
    assert path.read_bytes() == b"abc"
    (tmp_path / "another").touch()
    assert path.stat().st_mode == (tmp_path / "another").stat().st_mode
    (tmp_path / "another").unlink()

    def broken() -> object:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken())  # type: ignore[arg-type]
    assert path.read_bytes() == b"abc"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("prefix", [".small.onnx-", ".[a]*.onnx-"])
def test_folders_of_killed_runs_go_with_the_next_and_those_in_use_stay(tmp_path: Path, prefix: str) -> None:
    left = tmp_path / f"{prefix}left"
    left.mkdir()
    (left / LOCK).touch()
    (left / "part").write_text("half")
    others = [tmp_path / f"{prefix}of-another", tmp_path / ".other-left"]
    for other in others:
        other.mkdir()
        (other / "kept").touch()
    with scratch_folder(tmp_path, prefix) as one:
        assert not left.exists()
        (one / "part").touch()
        with scratch_folder(tmp_path, prefix) as two:
            assert one != two
            assert one.is_dir() and two.is_dir()
            assert one.name.startswith(prefix) and two.name.startswith(prefix)
        assert (one / "part").exists()
    assert sorted(tmp_path.iterdir()) == sorted(others)

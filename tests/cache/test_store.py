"""The cache on disk: bounded, shared, and never believed where it is damaged."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.cache import FOLDER, LIMIT, Store, fingerprint, open_cache, open_store
from onnx_lowrank.cache.store import ABANDONED_SECONDS, BOUND, LOOKS
from onnx_lowrank.cli import main
from onnx_lowrank.types import LowRankError

KEYS = [fingerprint(number) for number in range(64)]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_what_is_put_is_there_for_another_run(tmp_path: Path) -> None:
    Store(tmp_path / "new" / "folder").put(KEYS[0], ("a", 1.5))
    assert Store(tmp_path / "new" / "folder").get(KEYS[0]) == ("a", 1.5)
    assert Store(tmp_path / "new" / "folder").get(KEYS[1]) is None
    assert Store(tmp_path / "another").get(KEYS[0]) is None


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_no_result_and_goes(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.put(KEYS[0], np.arange(100.0))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert store.get(KEYS[0]) is None
    assert "is damaged" in caplog.text and "made again" in caplog.text
    assert files(tmp_path) == []
    store.put(KEYS[0], 1)
    assert store.get(KEYS[0]) == 1


def test_a_file_under_the_name_of_another_is_no_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEYS[0], 1)
    place = tmp_path / KEYS[1][:2]
    place.mkdir(exist_ok=True)
    os.replace(files(tmp_path)[0], place / KEYS[1])
    assert store.get(KEYS[1]) is None


def test_results_stay_within_the_bound_and_those_read_last_stay_longest(tmp_path: Path) -> None:
    bound = 40_000
    for number, key in enumerate(KEYS):
        store = Store(tmp_path, bound)
        store.put(key, np.full(125, number, dtype=np.float64))
        for age, path in enumerate(reversed(sorted(files(tmp_path), key=os.path.getmtime))):
            os.utime(path, (1e9 - age, 1e9 - age))  # in the order of their use, whatever the clock's step
        assert Store(tmp_path, bound).get(KEYS[0]) is not None  # used again and again
        assert used(tmp_path) <= bound
    kept = [key for key in KEYS if Store(tmp_path, bound).get(key) is not None]
    assert 20 < len(kept) < 40
    assert kept == [KEYS[0], *KEYS[-len(kept) + 1 :]]


def test_one_run_looks_through_the_folder_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    prune = Store._prune
    monkeypatch.setattr(Store, "_prune", lambda self: (looks.append(1), prune(self)))
    store = Store(tmp_path, 100_000)
    for key in KEYS:
        store.put(key, np.zeros(125))
        assert used(tmp_path) <= 100_000 * (1 + 1 / LOOKS)
    assert 2 < len(looks) < len(KEYS) / 4


def test_a_result_above_the_bound_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    store.put(KEYS[0], 1)
    store.put(KEYS[1], np.zeros(1000))
    assert (store.get(KEYS[0]), store.get(KEYS[1])) == (1, None)


def test_a_result_of_another_kind_is_not_kept_and_no_error(tmp_path: Path) -> None:
    Store(tmp_path).put(KEYS[0], ("a", [1]))
    assert files(tmp_path) == []


def test_what_a_killed_run_left_goes_and_what_is_being_made_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEYS[0], 1)
    old, new = (files(tmp_path)[0].with_name(f".{KEYS[0]}-{name}.part") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    past = new.stat().st_mtime - ABANDONED_SECONDS - 60
    os.utime(old, (past, past))
    Store(tmp_path).put(KEYS[1], 1)
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        store.put(KEYS[0], 1)
        assert store.get(KEYS[0]) is None
    assert "cannot be kept" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"


def test_several_at_a_time_read_whole_results_or_none(tmp_path: Path) -> None:
    values = {key: np.full(2000, number) for number, key in enumerate(KEYS[:8])}
    wrong: list[str] = []

    def run(seed: int) -> None:
        rng = np.random.default_rng(seed)
        store = Store(tmp_path, 100_000)  # so small that they remove each other's
        for _ in range(150):
            key = KEYS[int(rng.integers(8))]
            found = store.get(key)
            if found is None:
                store.put(key, values[key])
            elif found.tobytes() != values[key].tobytes():
                wrong.append(key)

    runs = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert not wrong
    assert all(path.suffix != ".part" for path in files(tmp_path))


# --- the environment and the command ----------------------------------------------------------------------------------


def test_the_environment_says_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv(LIMIT)
    assert open_cache().bound == BOUND  # type: ignore[union-attr]
    monkeypatch.setenv(LIMIT, "5000")
    store = open_store()
    assert store is not None
    store.put(KEYS[0], 1)
    store.put(KEYS[1], np.zeros(1000))
    assert len(files(tmp_path)) == 1
    for name, value in ((LIMIT, "0"), (FOLDER, "")):
        monkeypatch.setenv(name, value)
        assert open_store() is None
    monkeypatch.setenv(LIMIT, "2GB")
    with pytest.raises(LowRankError, match="ONNX_LOWRANK_CACHE_BYTES=2GB was given: a number of bytes"):
        open_store()


def test_the_command_tells_what_is_kept_and_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(LIMIT, "5000000")
    Store(tmp_path / "layers").put(KEYS[0], np.zeros(250_000))
    (tmp_path / "training").mkdir()
    ours = [tmp_path / "latency-0123.json", tmp_path / "training" / "ab.pt", tmp_path / "layers" / "ab" / ".x.part"]
    others = [tmp_path / "notes.txt", tmp_path / "training" / "mine.txt", tmp_path / "layers" / "mine.bin"]
    for path in (*ours, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert main(["cache"]) == 0
    told = capsys.readouterr().out
    assert "2 results of layers (2.0 MB), 1 tables of times" in told and "at most 5 MB" in told
    assert str(tmp_path) in told
    assert main(["cache", "--clear"]) == 0
    assert "0 results of layers (0.0 MB), 0 tables of times (0.0 MB), 0 checkpoints" in capsys.readouterr().out
    assert files(tmp_path) == sorted(others)
    monkeypatch.setenv(FOLDER, "")
    assert main(["cache", "--clear"]) == 0
    assert "nothing is kept" in capsys.readouterr().out

"""Every form of data, what it becomes, and what is refused."""

from __future__ import annotations

import io
import logging
import re
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lowrank.data import Preprocess, apply_preprocess, load_function, load_preprocess, open_data
from onnx_lowrank.graph.tensors import read_tensor_file
from onnx_lowrank.types import InputSpec, LowRankError
from tests.helpers import SHARED, arrays, needs_shared

FILES = Path(__file__).parent / "data"

RAW = Preprocess()


def spec(name: str, *shape: int | str | None, dtype: str = "float32") -> InputSpec:
    return InputSpec(name, shape, np.dtype(dtype))


X = [spec("x", "N", 2)]
OPEN_FILES = Path("/proc/self/fd")
PICTURES = [spec("x", "N", 3, 4, 5)]


def ramp(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def pixels(*shape: int) -> np.ndarray:
    return (ramp(*shape, dtype="int64") * 7 % 256).astype(np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def save_picture(path: Path, array: np.ndarray) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(array).save(path)
    return array


def listed(labels: np.ndarray | None) -> list[Any]:
    assert labels is not None
    return list(labels.tolist())


def gather(batches: Iterator[tuple[dict[str, np.ndarray], Any]], name: str = "x") -> np.ndarray:
    return np.concatenate([feeds[name] for feeds, _ in batches])


# Archives and arrays


@pytest.mark.parametrize("store", [np.savez, np.savez_compressed])
def test_an_npz_gives_its_rows_in_order_with_their_labels(tmp_path: Path, store: Callable[..., None]) -> None:
    x, z, labels = ramp(7, 2), ramp(7, 3, 2, dtype="int64"), np.arange(7) % 3
    store(tmp_path / "d.npz", z=z, x=x, labels=labels, remark=np.arange(4))
    data = open_data(tmp_path / "d.npz", [*X, spec("z", "N", 3, None, dtype="int64")])
    assert (data.samples, data.labelled) == (7, True)
    for _ in range(2):  # again and again
        batches = list(data.batches(3))
        assert [len(feeds["x"]) for feeds, _ in batches] == [3, 3, 1]
        np.testing.assert_array_equal(gather(iter(batches)), x)
        np.testing.assert_array_equal(gather(iter(batches), "z"), z)
        np.testing.assert_array_equal(np.concatenate([part for _, part in batches]), labels)
    assert all(list(feeds) == ["x", "z"] and feeds["x"].flags.writeable for feeds, _ in batches)


@pytest.mark.parametrize("store", [np.savez, np.savez_compressed])
def test_a_big_npz_is_never_held_whole(tmp_path: Path, store: Callable[..., None]) -> None:
    path, size_bytes = tmp_path / "d.npz", 2000 * 4096 * 4
    store(path, x=np.ones((2000, 4096), np.float32))
    data = open_data(path, [spec("x", "N", 4096)])
    tracemalloc.start()
    try:
        assert sum(len(feeds["x"]) for feeds, _ in data.batches(8)) == 2000
        streamed = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert len(arrays(path)["x"]) == 2000
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert whole > size_bytes  # so the figure below means something
    assert streamed < size_bytes / 16


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="only Linux lists what a process has open")
def test_an_archive_is_closed_where_reading_ends_early_and_where_it_fails(tmp_path: Path) -> None:
    def is_open(path: Path) -> bool:
        return path in {file.resolve() for file in OPEN_FILES.iterdir()}

    good = save(tmp_path / "good.npz", x=ramp(9, 2), labels=np.arange(9))
    batches = open_data(good, X).batches(2)
    next(batches)
    assert is_open(good)
    batches.close()
    assert not is_open(good)
    values = ramp(9, 2)
    values[4] = np.nan
    bad = save(tmp_path / "bad.npz", x=values)
    with pytest.raises(LowRankError) as caught:
        list(open_data(bad, X).batches(2))
    assert caught and not is_open(bad)  # though the traceback holds on to all that was under way


def test_an_npz_is_opened_without_pickle_and_refuses_objects(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("unpickled",))

    bombs = np.array([Bomb(), Bomb()], dtype=object)
    save(tmp_path / "x.npz", x=bombs)
    save(tmp_path / "labels.npz", x=ramp(2, 2), labels=bombs)
    np.save(tmp_path / "x.npy", bombs)
    with pytest.raises(LowRankError, match="array 'x' holds Python objects, which are never unpickled"):
        open_data(tmp_path / "x.npz", X)
    with pytest.raises(LowRankError, match="array 'labels' holds Python objects"):
        open_data(tmp_path / "labels.npz", X)
    with pytest.raises(LowRankError, match=r"not a readable \.npy file"):
        open_data(tmp_path / "x.npy", X)


@pytest.mark.parametrize("name", ["label", "y", "targets"])
def test_labels_under_another_name_are_not_left_out_in_silence(tmp_path: Path, name: str) -> None:
    told = f"d.npz: array '{name}' is not used: labels are called 'labels': rename it"
    for labels in (np.zeros(7, int), np.array(["cat"] * 7)):
        with pytest.raises(LowRankError, match=told):
            open_data(save(tmp_path / "d.npz", **{"x": ramp(7, 2), name: labels}), X)
    with pytest.raises(LowRankError, match=told):
        arrays = {"images": pixels(7, 4, 5, 3), name: np.zeros(7, int)}
        open_data(save(tmp_path / "d.npz", **arrays), PICTURES, preprocess=RAW)
    # what is no label for each sample is ignored, and so is what stands beside labels
    remarks = {"mean": np.zeros(2), "table": np.zeros((7, 2)), "eight": np.zeros(8), "single": np.float32(1)}
    assert open_data(save(tmp_path / "d.npz", x=ramp(7, 2), **remarks), X).labelled is False
    assert open_data(save(tmp_path / "d.npz", x=ramp(7, 2), labels=np.zeros(7), **{name: np.zeros(7)}), X).labelled


def test_text_in_the_place_of_labels_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=ramp(2, 2), labels=np.array(["cat", "dog"]))
    with pytest.raises(LowRankError, match=r"d\.npz: labels of dtype <U3 were given: integers were expected"):
        open_data(path, X)


@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
def test_fortran_order_and_foreign_byte_order_are_read(tmp_path: Path, name: str) -> None:
    x = ramp(5, 2)
    stored = np.asfortranarray(x.astype(">f4"))
    np.save(tmp_path / name, stored) if name.endswith("npy") else save(tmp_path / name, x=stored)
    result = gather(open_data(tmp_path / name, X).batches(2))
    np.testing.assert_array_equal(result, x)
    assert result.dtype == np.dtype("float32")
    assert result.dtype.isnative


def test_an_npy_feeds_a_single_input_in_its_dtype(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", ramp(5, 2, dtype="float64"))
    data = open_data(str(tmp_path / "d.npy"), X)
    assert (data.samples, data.labelled) == (5, False)
    np.testing.assert_array_equal(gather(data.batches(4)), ramp(5, 2))
    with pytest.raises(LowRankError, match=r"a \.npy feeds a model of one input, this one has x, y"):
        open_data(tmp_path / "d.npy", [*X, spec("y", "N")])


@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
def test_bytes_under_the_name_of_a_float_input_need_a_preprocess_file(tmp_path: Path, name: str) -> None:
    images = pixels(3, 4, 5, 3)
    np.save(tmp_path / name, images) if name.endswith("npy") else save(tmp_path / name, x=images)
    with pytest.raises(LowRankError, match=r"holds uint8, .*as the preprocess file says, never guessed; give one"):
        open_data(tmp_path / name, [spec("x", "N", 4, 5, 3)])
    result = gather(open_data(tmp_path / name, PICTURES, preprocess=RAW).batches(2))
    np.testing.assert_array_equal(result, images.transpose(0, 3, 1, 2).astype(np.float32))


def test_bytes_go_as_they_are_into_an_integer_input(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=pixels(3, 4, 5, 3))
    for preprocess in (None, RAW):
        data = open_data(path, [spec("x", "N", 4, 5, 3, dtype="uint8")], preprocess=preprocess)
        np.testing.assert_array_equal(gather(data.batches(2)), pixels(3, 4, 5, 3))


def test_images_in_an_npz_are_pictures_only_with_a_preprocess_file(tmp_path: Path) -> None:
    images = pixels(3, 4, 5, 3)
    path = save(tmp_path / "d.npz", images=images, labels=np.array([2, 0, 1], np.uint8))
    with pytest.raises(LowRankError, match=r"needs a preprocess file .*never guessed"):
        open_data(path, PICTURES)
    data = open_data(path, PICTURES, preprocess=Preprocess(channels="BGR", scale=0.5, mean=(1, 2, 3), std=(1, 1, 2)))
    (feeds, labels), _ = data.batches(2)
    assert (data.samples, listed(labels)) == (3, [2, 0])
    # Known answer, channel by channel: B, G, R of the first two pictures.
    expected = np.stack(
        [images[:2, ..., 2] * 0.5 - 1, images[:2, ..., 1] * 0.5 - 2, (images[:2, ..., 0] * 0.5 - 3) / 2], 1
    )
    np.testing.assert_array_equal(feeds["x"], expected.astype(np.float32))


def test_arrays_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    for name, images in {"a": pixels(3, 3, 4, 5), "b": ramp(3, 4, 5, 3), "c": pixels(3, 20)}.items():
        path = save(tmp_path / f"{name}.npz", images=images)
        with pytest.raises(LowRankError, match="are no pictures: expected uint8"):
            open_data(path, PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match="the model wants arrays x, y, the file holds images"):
        open_data(path, [*X, spec("y", "N")], preprocess=RAW)


def jpeg_archive(path: Path, pictures: list[np.ndarray], **changed: np.ndarray) -> Path:
    parts = []
    for index, picture in enumerate(pictures):
        save_picture(path.parent / f"{index}.jpg", picture)
        parts.append((path.parent / f"{index}.jpg").read_bytes())
    arrays = {
        "jpeg": np.frombuffer(b"".join(parts), np.uint8),
        "offsets": np.cumsum([0, *map(len, parts)]),
        "labels": np.arange(len(parts)),
    }
    return save(path, **{**arrays, **changed})


def test_jpeg_files_end_to_end_are_decoded(tmp_path: Path) -> None:
    flat = [np.full((4, 5, 3), value, np.uint8) for value in (10, 100, 200)]  # even grey survives JPEG
    data = open_data(jpeg_archive(tmp_path / "d.npz", flat), PICTURES, preprocess=RAW)
    assert data.samples == 3
    (feeds, labels), (last, last_labels) = data.batches(2)
    assert (listed(labels), listed(last_labels)) == ([0, 1], [2])
    np.testing.assert_allclose(feeds["x"][:, 0, 0, 0], [10, 100], atol=1)  # one step of JPEG rounding
    np.testing.assert_allclose(last["x"], 200, atol=1)
    (skipped, skipped_labels), *_ = data.skip(1).batches(1)
    np.testing.assert_allclose(skipped["x"], 100, atol=1)
    assert listed(skipped_labels) == [1]
    assert [listed(part) for _, part in data.slice(1, 2).batches(1)] == [[1]]


def test_a_jpeg_archive_that_does_not_hold_together_is_refused(tmp_path: Path) -> None:
    flat = [np.full((4, 5, 3), 9, np.uint8)] * 2
    with pytest.raises(LowRankError, match="offsets must rise from 0"):
        open_data(jpeg_archive(tmp_path / "a.npz", flat, offsets=np.array([0, 9, 5])), PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match="sample 0: not a picture that can be decoded"):
        open_data(jpeg_archive(tmp_path / "b.npz", flat, offsets=np.array([5, 50, 90])), PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match=r"labels \(3,\) for 2 samples"):
        open_data(jpeg_archive(tmp_path / "c.npz", flat, labels=np.arange(3)), PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match="jpeg without offsets"):
        open_data(save(tmp_path / "d.npz", jpeg=pixels(9)), PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match=r"holds jpeg float32 \(9,\) .*expected uint8 \(bytes,\)"):
        open_data(save(tmp_path / "e.npz", jpeg=ramp(9), offsets=np.array([0, 9])), PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match="jpeg needs a preprocess file"):
        open_data(tmp_path / "d.npz", PICTURES)


def test_an_archive_that_does_not_suit_the_model_is_refused_at_once(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y": ramp(3, 2), "z": ramp(3)}, "the model wants arrays x, the file holds y, z"),
        ({"x": ramp(3, 4)}, r"array 'x' has shape \(1, 4\) .*the model's input is x float32 \(N, 2\)"),
        ({"x": ramp(6)}, r"array 'x' has shape \(1,\)"),
        ({"x": np.float32(3)}, "a single number, expected samples along its first axis"),
        ({"x": ramp(3, 2), "labels": np.arange(4)}, r"labels \(4,\) for 3 samples"),
        ({"x": ramp(3, 2), "labels": 4}, "array 'labels' is a single number"),
        ({"x": ramp(0, 2)}, "no samples: it is empty$"),
        ({"x": np.ones((3, 2), complex)}, "holds complex128, which cannot be cast safely"),
        ({"x": np.full((3, 2), "a")}, "holds <U1, which cannot be cast safely"),
        ({"x": ramp(3, 2, dtype="int64")}, "holds int64, .*never guessed"),
    ]
    for index, (held, message) in enumerate(cases):
        with pytest.raises(LowRankError, match=message):
            open_data(save(tmp_path / f"{index}.npz", **held), X)
    path = save(tmp_path / "unequal.npz", x=ramp(3, 2), y=ramp(4))
    with pytest.raises(LowRankError, match=r"unequal numbers of samples .*x float32 \(3, 2\), y float32 \(4,\)"):
        open_data(path, [*X, spec("y", "N")])


def test_damaged_files_give_one_clear_line(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=ramp(300, 2))
    content = path.read_bytes()
    (tmp_path / "short.npz").write_bytes(content[:1000])
    middle = content.index(ramp(300, 2)[100].tobytes())
    (tmp_path / "flipped.npz").write_bytes(content[:middle] + b"\xff" + content[middle + 1 :])
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x.npy", "hello, world")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "lies.npz", "w") as new:
        new.writestr("x.npy", old.read("x.npy").replace(b"(300, 2)", b"(999, 2)"))
    with pytest.raises(LowRankError, match=r"short\.npz: not a readable \.npz archive"):
        open_data(tmp_path / "short.npz", X)
    with pytest.raises(LowRankError, match=r"flipped\.npz: not a readable \.npz archive .*CRC"):
        list(open_data(tmp_path / "flipped.npz", X).batches(7))
    with pytest.raises(LowRankError, match=r"short\.npy: not a readable \.npy file"):
        open_data(tmp_path / "short.npy", X)
    with pytest.raises(LowRankError, match="'x' is not an array that can be read"):
        open_data(tmp_path / "text.npz", X)
    with pytest.raises(LowRankError, match="array 'x' is damaged"):
        open_data(tmp_path / "lies.npz", X)


@pytest.mark.parametrize("source", ["missing.npz", "missing", "data.csv", "pictures.zip"])
def test_a_path_that_is_missing_or_of_no_known_form_lists_the_forms(tmp_path: Path, source: str) -> None:
    if "missing" not in source:
        (tmp_path / source).write_text("1")
    with pytest.raises(LowRankError, match=r"(no such file or folder|not a form of data).*a \.npz.*FILE\.py:function"):
        open_data(tmp_path / source, X)


# What the model asks of its feeds


def test_numbers_that_are_not_finite_are_named_with_their_sample(tmp_path: Path) -> None:
    x = ramp(9, 2)
    x[7, 1] = np.nan
    data = open_data(save(tmp_path / "d.npz", x=x), X)
    with pytest.raises(LowRankError, match=r"array 'x' is not finite .* in sample 7"):
        list(data.batches(3))
    with pytest.raises(LowRankError, match="in sample 7"):
        list(data.skip(6).batches(2))
    assert len(gather(data.take(7).batches(4))) == 7
    with pytest.raises(LowRankError, match=r"infinite as float32.* in sample 0"):
        open_data([{"x": np.full((1, 2), 1e300)}], X)


def test_integers_are_cast_only_where_they_keep_their_value() -> None:
    tokens = [spec("x", "N", 2, dtype="int32")]
    (feeds, _), *_ = open_data([{"x": ramp(2, 2, dtype="int64")}], tokens).batches(2)
    assert feeds["x"].dtype == np.dtype("int32")
    np.testing.assert_array_equal(feeds["x"], ramp(2, 2))
    with pytest.raises(LowRankError, match="holds int64 values that do not fit int32"):
        open_data([{"x": np.full((1, 2), 2**40)}], tokens)
    with pytest.raises(LowRankError, match="holds float32, which cannot be cast safely"):
        open_data([{"x": ramp(1, 2)}], tokens)
    with pytest.raises(LowRankError, match="holds bool, which cannot be cast safely"):
        open_data([{"x": np.ones((1, 2), bool)}], X)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_fixed_batch_dimension_decides_and_what_does_not_fill_it_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    path = save(tmp_path / "d.npz", x=ramp(7, 2), labels=np.arange(7))
    one = open_data(path, [spec("x", 1, 2)])
    assert [feeds["x"].shape for feeds, _ in one.batches(size)] == [(1, 2)] * 7
    with caplog.at_level(logging.WARNING):
        assert one.samples == 7
        assert not caplog.records
        three = open_data(path, [spec("x", 3, 2)])
        assert three.samples == 6
        assert [listed(labels) for _, labels in three.batches(size)] == [[0, 1, 2], [3, 4, 5]]
    assert "the last 1 samples are left out: the model takes 3 at a time" in caplog.text
    with pytest.raises(LowRankError, match="the model takes 8 at a time and there are 7"):
        open_data(path, [spec("x", 8, 2)])


def test_slices_are_samples_whatever_the_source(tmp_path: Path) -> None:
    x, labels = ramp(10, 2), np.arange(10)
    np.save(tmp_path / "d.npy", x)
    feeds = [({"x": x[:4]}, labels[:4]), ({"x": x[4:5]}, labels[4:5]), ({"x": x[5:]}, labels[5:])]
    sources: list[Any] = [save(tmp_path / "d.npz", x=x), tmp_path / "d.npy", feeds]
    for data in (open_data(source, X) for source in sources):
        for size in (1, 3, 20):
            np.testing.assert_array_equal(gather(data.slice(2, 9).batches(size)), x[2:9])
            assert {len(feeds["x"]) for feeds, _ in data.take(9).batches(size)} == {min(size, 9)}
            np.testing.assert_array_equal(gather(data.slice(2, 9).skip(1).take(4).batches(size)), x[3:7])
            np.testing.assert_array_equal(gather(data.take(99).batches(size)), x)
            np.testing.assert_array_equal(gather(data.take(3).slice(1, 9).batches(size)), x[1:3])
    assert data.samples is None  # feeds are not counted beforehand
    known = open_data(sources[0], X)
    assert (known.slice(2, 9).samples, known.take(99).samples, known.skip(8).samples) == (7, 10, 2)
    with pytest.raises(LowRankError, match="nothing between samples 10 and the end: it has 10 samples"):
        known.skip(10)
    with pytest.raises(LowRankError, match="expected 0 <= start < stop"):
        known.slice(3, 3)
    with pytest.raises(LowRankError, match="no samples: it is empty"):
        list(data.skip(10).batches(1))
    with pytest.raises(LowRankError, match="batches of 0 samples asked for"):
        known.batches(0)


@pytest.mark.parametrize("stored", ["npz", "compressed", "npy", "folder", "pictures", "jpeg"])
def test_a_few_samples_of_many_are_from_all_over(tmp_path: Path, stored: str) -> None:
    pictures = [np.full((2, 2, 3), 20 * i, np.uint8) for i in range(11)]
    labels = np.arange(11)
    source, inputs = tmp_path / "d.npz", [spec("x", "N", 3, 2, 2)]
    config: Preprocess | None = Preprocess()
    if stored in ("npz", "compressed", "npy"):
        inputs, config = [spec("x", "N", 12)], None
        rows = np.stack(pictures).reshape(11, 12).astype(np.float32)
        if stored == "npy":
            source = tmp_path / "d.npy"
            np.save(source, rows)
        else:
            (np.savez if stored == "npz" else np.savez_compressed)(source, x=rows, labels=labels)
    elif stored == "pictures":
        save(source, images=np.stack(pictures), labels=labels)
    elif stored == "jpeg":
        jpeg_archive(source, pictures, labels=labels)
    else:
        source = tmp_path / "folder"
        for i, picture in enumerate(pictures):
            save_picture(source / f"{i:02}" / "only.png", picture)
    data = open_data(source, inputs, preprocess=config).spread(4)
    assert data.samples == 4
    for size in (1, 3, 9):
        batches = list(data.batches(size))
        first = np.concatenate([feeds["x"].reshape(len(feeds["x"]), -1)[:, 0] for feeds, _ in batches])
        np.testing.assert_allclose(first / 20, [0, 3, 6, 9], atol=0.1)
        if stored != "npy":
            assert np.concatenate([part for _, part in batches]).tolist() == [0, 3, 6, 9]
    assert [len(feeds["x"]) for feeds, _ in data.slice(1, 3).batches(9)] == [2]
    everything = open_data(source, inputs, preprocess=config).spread(11)
    assert everything.samples == 11


# Pictures


def test_class_folders_are_labels_in_sorted_order(tmp_path: Path) -> None:
    a = save_picture(tmp_path / "ant" / "2.PNG", pixels(4, 5, 3))
    b = save_picture(tmp_path / "ant" / "deep" / "1.bmp", pixels(4, 5, 3)[::-1])
    c = save_picture(tmp_path / "bee" / "0.png", pixels(4, 5, 3)[:, ::-1])
    (tmp_path / "bee" / "remarks.txt").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    data = open_data(tmp_path, PICTURES, preprocess=RAW)
    assert (data.samples, data.labelled) == (3, True)
    ((feeds, labels),) = data.batches(8)
    assert listed(labels) == [0, 0, 1]
    assert [listed(part) for _, part in data.slice(1, 3).batches(8)] == [[0, 1]]
    np.testing.assert_array_equal(feeds["x"], np.stack([a, b, c]).transpose(0, 3, 1, 2).astype(np.float32))


def test_a_flat_folder_has_no_labels_and_batches_break_where_the_size_changes(tmp_path: Path) -> None:
    for index, height in enumerate([4, 4, 6, 4]):
        save_picture(tmp_path / f"{index}.png", pixels(height, 5, 3))
    data = open_data(tmp_path, [spec("x", "N", 3, "H", "W")], preprocess=RAW)
    assert (data.samples, data.labelled) == (4, False)
    assert [feeds["x"].shape for feeds, _ in data.batches(3)] == [(2, 3, 4, 5), (1, 3, 6, 5), (1, 3, 4, 5)]
    with pytest.raises(LowRankError, match="takes batches of 3, but the arrays change shape at sample 2"):
        open_data(tmp_path, [spec("x", 3, 3, "H", "W")], preprocess=RAW)
    with pytest.raises(LowRankError, match=r"2\.png: a picture of 6 x 5 .* \(3, 6, 5\).*x float32 \(N, 3, 4, 5\)"):
        list(open_data(tmp_path, PICTURES, preprocess=RAW).batches(1))


def test_folders_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowRankError, match=r"no pictures in it, expected \.png"):
        open_data(tmp_path / "empty", PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match="empty: no pictures in this class folder"):
        open_data(tmp_path, PICTURES, preprocess=RAW)
    save_picture(tmp_path / "1.png", pixels(4, 5, 3))
    with pytest.raises(LowRankError, match="holds both pictures and folders"):
        open_data(tmp_path, PICTURES, preprocess=RAW)
    with pytest.raises(LowRankError, match="a folder of pictures needs a preprocess file"):
        open_data(tmp_path, PICTURES)
    with pytest.raises(LowRankError, match="a folder of pictures feeds a model of one input, this one has x, y"):
        open_data(tmp_path, [*PICTURES, spec("y", "N")], preprocess=RAW)


def test_class_folders_that_are_numbers_are_those_classes_with_gaps(tmp_path: Path) -> None:
    for name in ("2", "10", "0003"):
        save_picture(tmp_path / name / "1.png", pixels(4, 5, 3))
    (tmp_path / "4").mkdir()  # a class without pictures shifts none
    data = open_data(tmp_path, PICTURES, preprocess=RAW)
    assert [listed(labels) for _, labels in data.batches(8)] == [[3, 10, 2]]
    save_picture(tmp_path / "3" / "1.png", pixels(4, 5, 3))
    with pytest.raises(LowRankError, match="two folders for class 3: one for each class was expected"):
        open_data(tmp_path, PICTURES, preprocess=RAW)


def test_one_name_that_is_no_number_makes_all_class_folders_names(tmp_path: Path) -> None:
    for name in ("2", "10", "x"):
        save_picture(tmp_path / name / "1.png", pixels(4, 5, 3))
    data = open_data(tmp_path, PICTURES, preprocess=RAW)
    assert [listed(labels) for _, labels in data.batches(8)] == [[0, 1, 2]]  # 10, 2, x


def test_numbered_class_folders_without_a_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(LowRankError, match=r"no pictures in any of its class folders, expected \.png"):
        open_data(tmp_path, PICTURES, preprocess=RAW)


@pytest.mark.parametrize(
    ("preprocess", "told"),
    [
        (
            Preprocess(resize=8, crop=6),
            r"with resize = 8 and crop = 6, channels = RGB and layout = NCHW gives \(3, 6, 6\)",
        ),
        (Preprocess(resize=(4, 6)), r"with resize = \[4, 6\], channels"),
        (Preprocess(channels="GRAY"), r"neither resize nor crop, channels = GRAY and layout = NCHW gives \(1, 4, 5\)"),
        (
            Preprocess(layout="NHWC"),
            r"layout = NHWC gives \(4, 5, 3\), the model's input is x float32 \(N, 3, 4, 5\): correct",
        ),
    ],
)
def test_a_picture_that_comes_out_in_another_shape_is_told_by_the_preprocess(
    tmp_path: Path, preprocess: Preprocess, told: str
) -> None:
    pytest.importorskip("PIL")
    path = save(tmp_path / "d.npz", images=pixels(2, 4, 5, 3))
    with pytest.raises(LowRankError, match=rf"d\.npz: sample 0: a picture of 4 x 5 \(height x width\) .*{told}"):
        open_data(path, PICTURES, preprocess=preprocess)


def test_arrays_in_the_other_layout_are_told_how_to_be_turned(tmp_path: Path) -> None:
    cases = [
        ((2, 4, 5, 3), PICTURES, r"NHWC: store array.transpose\(0, 3, 1, 2\)"),
        ((2, 3, 4, 5), [spec("x", "N", None, None, 3)], r"NCHW: store array.transpose\(0, 2, 3, 1\)"),
        ((2, 4, 6, 3), PICTURES, r"\(N, 3, 4, 5\)$"),
    ]
    for shape, inputs, told in cases:
        with pytest.raises(LowRankError, match=told):
            open_data(save(tmp_path / "d.npz", x=ramp(*shape)), inputs)


def test_pictures_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    save_picture(tmp_path / "good.png", pixels(40, 50, 3))
    (tmp_path / "broken" / "1.png").parent.mkdir()
    (tmp_path / "broken" / "1.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    with pytest.raises(LowRankError, match=r"1\.png: not a picture that can be decoded"):
        open_data(tmp_path / "broken", PICTURES, preprocess=RAW)
    save_picture(tmp_path / "deep" / "1.png", np.full((4, 5), 60000, np.uint16))
    with pytest.raises(LowRankError, match=r"1\.png: a picture of mode I.*expected 8 bits"):
        open_data(tmp_path / "deep", PICTURES, preprocess=RAW)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1.png").write_bytes(b"")
    path = save(tmp_path / "d.npz", images=pixels(3, 4, 5, 3))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(LowRankError, match=r"pip install 'onnx-lowrank\[images\]'"):
        open_data(tmp_path, PICTURES, preprocess=RAW)
    assert open_data(path, PICTURES, preprocess=RAW).samples == 3  # pixels need no decoder


def test_pictures_for_an_integer_input_must_stay_whole_numbers(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", images=pixels(3, 4, 5, 3))
    inputs = [spec("x", "N", 4, 5, 3, dtype="uint8")]
    data = open_data(path, inputs, preprocess=Preprocess(layout="NHWC"))
    np.testing.assert_array_equal(gather(data.batches(2)), pixels(3, 4, 5, 3))
    with pytest.raises(LowRankError, match=r"do not fit the model's input x uint8 .*leave out scale"):
        open_data(path, inputs, preprocess=Preprocess(layout="NHWC", scale=1 / 255))
    even = np.full((3, 4, 5, 3), 2, np.uint8)
    even[2] = 3
    data = open_data(save(tmp_path / "e.npz", images=even), inputs, preprocess=Preprocess(layout="NHWC", scale=0.5))
    with pytest.raises(LowRankError, match="sample 2: preprocessed values do not fit"):
        list(data.skip(1).batches(1))


# Preprocess


def test_a_preprocess_file_is_read_and_every_mistake_named(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        'resize = [8, 9]\ncrop = 4\nchannels = "BGR"\nscale = 0.5\nmean = 3\nstd = [1, 2.5, 3]\nlayout = "NHWC"'
    )
    assert load_preprocess(path) == Preprocess((8, 9), 4, "BGR", 0.5, (3.0,), (1.0, 2.5, 3.0), "NHWC", "bilinear")
    path.write_text("")
    assert load_preprocess(str(path)) == Preprocess()
    for text, message in {
        "size = 3": "unknown key size; known are resize, crop, channels, scale, mean, std, layout, interpolation",
        "crop = 0": "crop = 0, expected a number of pixels",
        "resize = [1, 2, 3]": r"resize = \[1, 2, 3\], expected a number of pixels or \[height, width\]",
        "crop = true": "crop = True, expected a number of pixels",
        "crop = 2.5": "crop = 2.5, expected",
        'channels = "rgb"': "channels = 'rgb', expected one of RGB, BGR, GRAY",
        'layout = "CHW"': "layout = 'CHW', expected one of NCHW, NHWC",
        'interpolation = "area"': "expected one of nearest, bilinear, bicubic, lanczos",
        "mean = [1, 2]": r"mean = \[1, 2\], expected 3 finite numbers",
        "std = [1, 0, 1]": r"std = \[1.0, 0.0, 1.0\]: expected finite numbers other than 0",
        "scale = 0": "scale = 0, .*expected finite numbers other than 0",
        "scale = nan": "scale = nan",
        'mean = "a"': "mean = 'a', expected 3 finite numbers",
        "resize 3": "not valid TOML",
    }.items():
        path.write_text(text)
        with pytest.raises(LowRankError, match=rf"{re.escape(str(path))}: .*{message}"):
            load_preprocess(path)
    with pytest.raises(LowRankError, match="the preprocess file cannot be read"):
        load_preprocess(tmp_path / "missing.toml")


def test_the_centre_is_cropped_and_an_odd_margin_rounds_half_to_even() -> None:
    picture = pixels(7, 10, 3)
    result = apply_preprocess(picture, Preprocess(crop=(4, 3), layout="NHWC"))  # margins 1.5 -> 2 and 3.5 -> 4
    np.testing.assert_array_equal(result, picture[2:6, 4:7])
    with pytest.raises(LowRankError, match="7 x 10 is smaller than the crop of 8 x 8"):
        apply_preprocess(picture, Preprocess(crop=8))


def test_resizing_keeps_the_proportion_or_takes_height_and_width() -> None:
    pytest.importorskip("PIL")
    picture = np.repeat(np.repeat(pixels(3, 5, 3), 4, 0), 4, 1)  # blocks of 4 x 4, so that the answer is known
    nearest = apply_preprocess(picture, Preprocess(resize=3, layout="NHWC", interpolation="nearest"))
    np.testing.assert_array_equal(nearest, pixels(3, 5, 3))
    assert apply_preprocess(picture.swapaxes(0, 1), Preprocess(resize=5)).shape == (3, 8, 5)
    assert apply_preprocess(picture, Preprocess(resize=(7, 6))).shape == (3, 7, 6)
    bilinear = apply_preprocess(np.array([[0, 0, 200, 200]], np.uint8), Preprocess(resize=(1, 2), channels="GRAY"))
    assert 0 < bilinear[0, 0, 0] < 100 < bilinear[0, 0, 1] < 200  # antialiased: the neighbours count


def test_grey_and_colour_are_turned_into_each_other() -> None:
    pytest.importorskip("PIL")
    picture = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    assert apply_preprocess(picture, Preprocess(channels="GRAY"))[0, 0, 0] == 76  # 0.299 * 255
    grey = pixels(2, 2)
    np.testing.assert_array_equal(apply_preprocess(grey, RAW), [grey] * 3)
    np.testing.assert_array_equal(apply_preprocess(grey[:, :, None], Preprocess(channels="GRAY")), [grey])
    with pytest.raises(LowRankError, match="expected uint8"):
        apply_preprocess(ramp(2, 2), RAW)


# Feeds


def write_tensor(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array).SerializeToString())


def test_onnx_test_data_is_read_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    inputs = [*X, spec("y", "N", dtype="int64")]
    x = ramp(22, 2)
    for index in range(11):  # 10 comes after 9
        write_tensor(tmp_path / f"test_data_set_{index}" / "input_0.pb", x[2 * index : 2 * index + 2])
        write_tensor(tmp_path / f"test_data_set_{index}" / "input_1.pb", np.full(2, index))
        write_tensor(tmp_path / f"test_data_set_{index}" / "output_0.pb", np.zeros(1))
    several = open_data(tmp_path, inputs)
    np.testing.assert_array_equal(gather(several.batches(5)), x)
    assert (several.samples, several.labelled) == (None, False)
    ((feeds, _),) = open_data(tmp_path / "test_data_set_3", inputs).batches(5)
    np.testing.assert_array_equal(feeds["x"], x[6:8])
    assert feeds["y"].tolist() == [3, 3]
    with pytest.raises(LowRankError, match=r"holds input_0\.pb, input_1\.pb, the model wants input_0\.pb \(x\)$"):
        open_data(tmp_path, X)
    (tmp_path / "test_data_set_0" / "input_1.pb").unlink()
    with pytest.raises(LowRankError, match=r"holds input_0\.pb, the model wants input_0\.pb \(x\), input_1\.pb \(y\)"):
        open_data(tmp_path, inputs)


def test_a_tensor_file_that_holds_no_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "input_0.pb"
    write_tensor(path, ramp(3, 2))
    np.testing.assert_array_equal(read_tensor_file(path), ramp(3, 2))
    short = onnx.TensorProto(dims=[3, 2], data_type=onnx.TensorProto.FLOAT, raw_data=b"1234")
    for content in (path.read_bytes()[:-3], b"", b"not a tensor", short.SerializeToString()):
        path.write_bytes(content)
        with pytest.raises(LowRankError, match=r"input_0\.pb: not an ONNX tensor"):
            read_tensor_file(path)
    with pytest.raises(LowRankError, match="no such tensor file"):
        read_tensor_file(tmp_path / "input_1.pb")


SCRIPT = """
from __future__ import annotations
import numpy as np
from dataclasses import dataclass
from beside import ROWS
@dataclass
class Row:
    index: int
calls = []
def data():
    calls.append(1)
    for row in range(ROWS):
        yield {"x": np.full((1, 2), row, np.float32)}, [row]
def unlabelled():
    return [{"x": np.zeros((2, 2))}]
def nothing():
    return None
def fails():
    yield {"x": np.zeros((1, 2))}
    raise KeyError("picture 2")
def needs(argument):
    pass
def wrong():
    yield [1, 2, 3]
number = 3
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "beside.py").write_text("ROWS = 5")
    (tmp_path / "feeds.py").write_text(SCRIPT)
    return str(tmp_path / "feeds.py")


def test_a_function_in_a_file_is_called_at_each_reading(script: str) -> None:
    path = list(sys.path)
    data = open_data(f"{script}:data", X)
    assert sys.path == path
    for _ in range(2):
        batches = list(data.batches(2))
        assert [listed(labels) for _, labels in batches] == [[0, 1], [2, 3], [4]]
        np.testing.assert_array_equal(gather(iter(batches))[:, 0], range(5))
    assert (data.samples, data.labelled) == (None, True)
    assert open_data(f"{script}:unlabelled", X).labelled is False


def test_what_is_wrong_with_a_function_in_a_file_is_said(script: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    for reference, message in {
        f"{tmp_path}/leaves.py:data": "executing the file failed: SystemExit",
        script: r"name the function after a colon",
        f"{script}:": r"name the function after a colon",
        f"{tmp_path}/missing.py:data": r"no such file: .*missing\.py",
        f"{script}:date": r"no function 'date' in it; it has Row, data, dataclass, fails, needs, nothing",
        f"{script}:number": "no function 'number' in it",
        f"{tmp_path}/broken.py:data": "executing the file failed: ModuleNotFoundError",
        f"{script}:nothing": r"the function returned NoneType, expected to yield dict\[str, ndarray\] or",
        f"{script}:needs": "the function raised TypeError: .*argument",
        f"{script}:wrong": r"item 0: is of type list, expected dict\[str, ndarray\]",
    }.items():
        with pytest.raises(LowRankError, match=message):
            open_data(reference, X)
    data = open_data(f"{script}:fails", X)
    with pytest.raises(LowRankError, match="the function raised KeyError: 'picture 2'"):
        list(data.batches(1))
    assert load_function(f"{script}:unlabelled")()[0]["x"].shape == (2, 2)


class Reader:
    """A calibration reader of onnxruntime: one-shot, None at its end."""

    def __init__(self) -> None:
        self.feeds = iter([{"x": ramp(1, 2)}, {"x": ramp(1, 2) + 1}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


class RewindingReader(Reader):
    def rewind(self) -> None:
        self.__init__()  # type: ignore[misc]


def test_python_sources_can_be_gone_through_again() -> None:
    feeds = [{"x": ramp(1, 2)}, {"x": ramp(1, 2) + 1}]
    sources: list[Any] = [feeds, tuple(feeds), lambda: feeds, lambda: iter(feeds), lambda: (f for f in feeds), Reader]
    sources.append(RewindingReader())
    for source in sources:
        data = open_data(source, X)
        for _ in range(2):
            np.testing.assert_array_equal(gather(data.batches(2)), [[0, 1], [1, 2]])
    assert open_data(data, X) is data
    with pytest.raises(LowRankError, match="was opened for a model with other inputs"):
        open_data(data, PICTURES)


def test_what_can_be_read_only_once_is_refused_and_the_cure_named() -> None:
    sources: list[Any] = [iter([{"x": ramp(1, 2)}]), ({"x": ramp(1, 2)} for _ in range(2)), Reader()]
    for source in sources:
        with pytest.raises(LowRankError, match=r"can be read only once, .*give a function that returns a new one"):
            open_data(source, X)
    once = iter([{"x": ramp(1, 2)}, {"x": ramp(1, 2)}])
    data = open_data(lambda: once, X)
    list(data.batches(1))
    with pytest.raises(LowRankError, match=r"no samples: .*a function must give a new iterator at each call"):
        list(data.batches(1))


def test_a_reader_that_is_rewound_begins_at_its_first_feed_and_is_not_read_twice_at_once() -> None:
    reader = RewindingReader()
    reader.get_next()
    data = open_data(reader, X)
    np.testing.assert_array_equal(gather(data.batches(1)), [[0, 1], [1, 2]])
    one = data.batches(1)
    next(one)
    assert len(list(data.batches(1))) == 2
    with pytest.raises(LowRankError, match="was rewound while it was being read: give a function that returns a new"):
        next(one)
    with pytest.raises(LowRankError, match=r"only once, .*give a function that returns a new one, or .* a rewind\(\)"):
        open_data(Reader(), X)


def test_wrong_things_from_python_are_refused() -> None:
    good = {"x": ramp(2, 2)}
    cases: list[tuple[Any, str]] = [
        (good, "this is one feed, expected a sequence of .*put it into a list"),
        (ramp(2, 2), r"data \(ndarray\): this is one feed"),
        (7, r"data \(int\): expected a path, a sequence of"),
        ([], "no samples: it is empty; a function must give a new iterator"),
        ([ramp(2, 2)], "item 0: is of type ndarray, expected"),
        ([{"y": ramp(2, 2)}], "item 0: has y, the model wants x"),
        ([{**good, "y": 1}], "item 0: has x, y, the model wants x"),
        ([(good, [1, 2, 3])], r"item 0: labels of shape \(3,\) for 2 samples"),
        ([(good, 1)], r"labels of shape \(\) for 2 samples"),
        ([(good, ["a", "b"])], "item 0: labels is of dtype <U1, expected numbers"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "item 0: array 'x' cannot be made an array"),
        ([{"x": np.array([[None, 1]])}], "array 'x' is of dtype object, expected numbers"),
        ([{"x": ramp(2, 3)}], r"array 'x' has shape \(1, 3\)"),
        ([{"x": np.float32(1)}], r"array 'x' has shape \(\)"),
    ]
    for source, message in cases:
        with pytest.raises(LowRankError, match=message):
            open_data(source, X)
    with pytest.raises(LowRankError, match="the model has no inputs"):
        open_data([good], [])
    mixed = open_data([(good, [0, 1]), good], X)
    with pytest.raises(LowRankError, match="sample 2: some samples have labels and others have none"):
        list(mixed.batches(3))


def test_a_feed_without_a_common_first_axis_is_passed_on_whole() -> None:
    inputs = [spec("x", "N", 2), spec("state", 3, "N"), spec("gain")]
    feeds = [{"x": ramp(2, 2) + i, "state": ramp(3, 2), "gain": np.float32(i)} for i in range(3)]
    pairs = open_data([{"x": feed["x"], "state": feed["state"]} for feed in feeds], inputs[:2])
    assert [feed["state"].shape for feed, _ in pairs.batches(64)] == [(3, 2)] * 3
    data = open_data(feeds, inputs)
    assert [float(f["gain"]) for f, _ in data.batches(64)] == [0, 1, 2]
    ((feed, _),) = data.slice(1, 2).batches(1)
    np.testing.assert_array_equal(feed["x"], ramp(2, 2) + 1)


def test_one_sample_may_have_a_bare_number_as_its_label() -> None:
    data = open_data([({"x": ramp(1, 2)}, 4), ({"x": ramp(1, 2)}, np.int64(5))], X)
    ((_, labels),) = data.batches(2)
    assert listed(labels) == [4, 5]


# The layers and the real sets


def test_the_data_modules_import_neither_onnx_nor_a_runtime() -> None:
    folder = Path(sys.modules[open_data.__module__].__file__ or "").parent
    sources = [path.read_text() for path in folder.glob("*.py")]
    assert len(sources) > 5
    assert not any(re.search(r"^\s*(import|from) (onnx|onnxruntime|torch)\b", text, re.MULTILINE) for text in sources)


@needs_shared
def test_the_cifar_pictures_are_normalised_as_the_file_says() -> None:
    inputs = [spec("input", "N", 3, 32, 32)]
    path = SHARED / "cifar10" / "test_500.npz"
    data = open_data(path, inputs, preprocess=FILES / "cifar10.toml")
    assert (data.samples, data.labelled) == (500, True)
    batches = list(data.batches(64))
    assert [len(feeds["input"]) for feeds, _ in batches] == [64] * 7 + [52]
    with np.load(path) as archive:
        values = archive["images"] / 255.0
        expected = ((values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), archive["labels"])
    # Rounded to float32 once, from float64: half a unit in the last place, and the scale's own rounding.
    np.testing.assert_allclose(gather(iter(batches), "input"), expected, rtol=2e-7, atol=1e-7)


@needs_shared
def test_the_cifar_jpeg_files_are_decoded_where_they_lie() -> None:
    image = pytest.importorskip("PIL.Image")
    path = SHARED / "cifar10" / "jpeg_test_5000.npz"
    data = open_data(path, [spec("input", "N", 3, 32, 32)], preprocess=RAW)
    assert (data.samples, data.labelled) == (5000, True)
    ((feeds, labels),) = data.skip(4990).batches(32)
    with np.load(path) as archive:
        start, stop = archive["offsets"][4993:4995]
        picture = np.asarray(image.open(io.BytesIO(archive["jpeg"][start:stop].tobytes())))
        np.testing.assert_array_equal(labels, archive["labels"][4990:])
    assert feeds["input"].shape == (10, 3, 32, 32)
    np.testing.assert_array_equal(feeds["input"][3], picture.transpose(2, 0, 1).astype(np.float32))


@needs_shared
def test_the_mnist_pictures_gain_their_channel_and_the_batch_of_the_model() -> None:
    data = open_data(
        SHARED / "mnist" / "test_10000.npz", [spec("Input3", 1, 1, 28, 28)], preprocess=FILES / "mnist.toml"
    )
    assert data.samples == 10000
    shapes = {feeds["Input3"].shape for feeds, _ in data.take(50).batches(16)}
    assert shapes == {(1, 1, 28, 28)}

"""A file is the old one or the whole new one; the source and its data are never touched; large models go outside."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.graph import model as model_module
from onnx_lowrank.graph import save as module
from onnx_lowrank.graph.datafile import ALIGNMENT, EXTERNAL_FROM
from onnx_lowrank.graph.model import Model, load, serialize, stored_tensors
from onnx_lowrank.graph.save import check_destination, save
from onnx_lowrank.types import LowRankError
from tests.helpers import assert_close, decompose, feeds_of, normal, parse, run

WEIGHT, SECOND = normal(32, 24), normal(24, 16)


def two_products() -> onnx.ModelProto:
    return parse(
        "g (float[3,32] x) => (float[m,n] y) { a = MatMul (x, w) b = Add (a, c) y = MatMul (b, v) }",
        w=WEIGHT,
        v=SECOND,
        c=normal(24),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with both of its large tensors in one data file."""
    path = tmp_path / "source" / "m.onnx"
    path.parent.mkdir()
    onnx.save(
        two_products(),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=EXTERNAL_FROM,
        convert_attribute=True,
    )
    return path


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is too large for one message of protobuf."""
    monkeypatch.setattr(module, "MAX_PROTO_BYTES", 100)
    monkeypatch.setattr(module, "MARGIN", 0)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- where to --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.onnx", "../source/m.onnx", "link.onnx", "hard.onnx"])
def test_the_source_is_never_written_over(source: Path, name: str) -> None:
    (source.parent / "link.onnx").symlink_to(source)
    (source.parent / "hard.onnx").hardlink_to(source)
    before = contents(source.parent)
    with pytest.raises(LowRankError, match="is the model that was given: choose another name for the result"):
        save(load(source), source.parent / name)
    assert contents(source.parent) == before


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"the folder .*nowhere does not exist: make it first"):
        save(load(two_products()), tmp_path / "nowhere" / "out.onnx")


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match="is a folder: the path of a file to write was expected"):
        save(load(two_products()), tmp_path)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(LowRankError, match="cannot be written to: choose another or change its permissions"):
        check_destination(tmp_path / "out.onnx", None)


@pytest.mark.parametrize("name", ["m.data", "../source/m.data", "link.data"])
def test_the_data_of_the_source_are_never_written_over_by_the_model(source: Path, name: str) -> None:
    (source.parent / "link.data").symlink_to(source.parent / "m.data")
    before = contents(source.parent)
    with pytest.raises(LowRankError, match="holds the weights of the model that was given: choose another name"):
        save(load(source), source.parent / name)
    assert contents(source.parent) == before


def test_the_data_of_the_source_are_never_written_over_by_data(source: Path) -> None:
    model = onnx.load(source, load_external_data=False)
    for tensor in filter(uses_external_data, model.graph.initializer):
        tensor.external_data[0].value = "out.onnx.data"
    onnx.save(model, source)
    (source.parent / "m.data").rename(source.parent / "out.onnx.data")
    before = contents(source.parent)
    with pytest.raises(LowRankError, match=r"out\.onnx\.data holds the weights of the model that was given"):
        save(load(source), source.parent / "out.onnx")
    assert contents(source.parent) == before


def test_the_data_of_the_source_are_safe_even_where_the_result_needs_none_of_them(source: Path) -> None:
    model = load(source)
    inline = Model(decompose(source, "svd").model, model.folder, model.path, model.data_files)
    assert not any(map(uses_external_data, inline.graph.initializer))
    with pytest.raises(LowRankError, match="holds the weights of the model that was given"):
        save(inline, source.parent / "m.data")


# --- how -------------------------------------------------------------------------------------------------------------


def test_a_small_model_is_one_file_of_the_same_bytes(tmp_path: Path) -> None:
    model = load(two_products())
    save(model, tmp_path / "out.onnx")
    assert contents(tmp_path) == {"out.onnx": serialize(model)}
    save(load(parse("g (float[1] x) => (float[] y) { y = Neg (x) }")), str(tmp_path / "out.onnx"))
    assert files(tmp_path) == {"out.onnx"}
    assert len(load(tmp_path / "out.onnx").graph.node) == 1


def test_external_tensors_stay_external_and_land_beside_the_result(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(load(source), tmp_path / "out" / "small.onnx")
    assert files(tmp_path / "out") == {"small.onnx", "small.onnx.data"}
    written = onnx.load(tmp_path / "out" / "small.onnx", load_external_data=False)
    outside = [tensor for tensor in written.graph.initializer if uses_external_data(tensor)]
    assert [tensor.name for tensor in outside] == ["w", "v"]
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "small.onnx.data"
        assert int(place["offset"]) % ALIGNMENT == 0
    onnx.checker.check_model(tmp_path / "out" / "small.onnx", full_check=True)
    feeds = feeds_of(two_products())
    assert_close(run(str(tmp_path / "out" / "small.onnx"), feeds), run(str(source), feeds), 0)


def test_the_source_stays_as_it_was_when_a_result_is_written_beside_it(source: Path) -> None:
    before = contents(source.parent)
    save(load(source), source.parent / "small.onnx")
    assert {name: data for name, data in contents(source.parent).items() if "small" not in name} == before


def test_kernels_made_for_a_model_with_data_outside_go_outside_too(source: Path, tmp_path: Path) -> None:
    model = load(source)
    smaller = decompose(source, "svd", only=["a"]).model
    save(Model(smaller, model.folder, model.path, model.data_files), tmp_path / "small.onnx")
    written = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    outside = {tensor.name: uses_external_data(tensor) for tensor in written.graph.initializer}
    assert outside == {"v": True, "c": False, "w_lowrank_0": True, "w_lowrank_1": True}
    feeds = feeds_of(two_products())
    assert_close(run(str(tmp_path / "small.onnx"), feeds), run(str(source), feeds), 1e-5)


@pytest.mark.usefixtures("limit")
def test_a_model_too_large_for_one_message_is_written_with_its_tensors_outside(tmp_path: Path) -> None:
    save(load(two_products()), tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert {t.name: uses_external_data(t) for t in written.graph.initializer} == {"w": True, "v": True, "c": False}
    assert all(not tensor.raw_data for tensor in written.graph.initializer if uses_external_data(tensor))
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    feeds = feeds_of(two_products())
    assert_close(run(str(tmp_path / "out.onnx"), feeds), run(two_products(), feeds), 0)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "bool", "uint8"])
def test_tensors_of_every_type_come_back_from_outside_as_they_were(tmp_path: Path, dtype: str) -> None:
    model = two_products()
    value = (100 * normal(40, 40)).astype(dtype)
    model.graph.initializer.append(numpy_helper.from_array(value, "raw"))
    field = helper.make_tensor("field", numpy_helper.from_array(value).data_type, value.shape, value.ravel())
    assert not field.HasField("raw_data")
    model.graph.initializer.append(field)
    save(load(model), tmp_path / "out.onnx")
    back = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for name in ("raw", "field"):
        np.testing.assert_array_equal(numpy_helper.to_array(back[name]), value)
        assert back[name].data_type == field.data_type


@pytest.mark.usefixtures("limit")
def test_strings_stay_inside(tmp_path: Path) -> None:
    model = two_products()
    words = np.array([f"word {i}" for i in range(1000)], object)
    model.graph.initializer.append(numpy_helper.from_array(words, "words"))
    save(load(model), tmp_path / "out.onnx")
    back = next(t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name == "words")
    np.testing.assert_array_equal(numpy_helper.to_array(back), words)


def test_external_data_of_attributes_sparse_tensors_and_bodies_move_with_the_model(tmp_path: Path) -> None:
    def outside(name: str, dims: list[int]) -> TensorProto:
        size = int(np.prod(dims))
        value = normal(size, seed=len(name))
        (tmp_path / f"{name}.bin").write_bytes(value.tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.bin")
        return tensor

    model = parse(
        """g (float[3,4] x, bool c) => (float[] y) {
            y = If (c) <
                then_branch = t () => (float[] p) { p = MatMul (x, in_body) },
                else_branch = e () => (float[] q) { q = MatMul (x, attribute) }
            >
        }"""
    )
    branches = {a.name: a.g for a in model.graph.node[0].attribute}
    branches["then_branch"].initializer.append(outside("in_body", [4, 2]))
    constant = helper.make_node("Constant", [], ["attribute"], value=outside("attribute", [4, 2]))
    branches["else_branch"].node.insert(0, constant)
    sparse = model.graph.sparse_initializer.add(dims=[8])
    sparse.values.CopyFrom(outside("values", [2]))
    sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [2], [1, 5]))
    onnx.save(model, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    assert {path.name for path in loaded.data_files} == {"in_body.bin", "attribute.bin", "values.bin"}
    (tmp_path / "out").mkdir()
    save(loaded, tmp_path / "out" / "m.onnx")
    back = load(tmp_path / "out" / "m.onnx")
    assert back.data_files == {tmp_path / "out" / "m.onnx.data"}
    for tensor in filter(uses_external_data, stored_tensors(back.proto)):
        value = numpy_helper.to_array(tensor, base_dir=str(tmp_path / "out"))
        assert value.tobytes() == (tmp_path / f"{tensor.name}.bin").read_bytes()
    assert len(list(filter(uses_external_data, stored_tensors(back.proto)))) == 3


def test_a_data_file_that_is_missing_is_an_error_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    model = load(source)
    (source.parent / "m.data").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(LowRankError, match=r"tensor 'w' is stored in .*m\.data, which is not there"):
        save(model, tmp_path / "out" / "small.onnx")
    assert files(tmp_path / "out") == set()


@pytest.mark.parametrize("data_type", [0, 99])
def test_a_tensor_of_no_type_is_an_error_that_names_it(tmp_path: Path, data_type: int) -> None:
    model = two_products()
    model.graph.initializer.append(TensorProto(name="odd", data_type=data_type, dims=[2]))
    with pytest.raises(LowRankError, match=f"tensor 'odd' is damaged .no type {data_type}."):
        save(load(model), tmp_path / "out.onnx")


# --- when it fails ---------------------------------------------------------------------------------------------------


def failing(at: int, error: BaseException) -> Callable[..., None]:
    """os.replace that fails at its call number `at`."""
    real, calls = os.replace, 0

    def replace(source: object, target: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        real(source, target)  # type: ignore[arg-type]

    return replace


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("old", [{}, {"out.onnx": b"old model"}])
def test_when_the_renaming_fails_the_old_file_is_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: dict[str, bytes]
) -> None:
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(os, "replace", failing(1, FULL))
    with pytest.raises(
        LowRankError, match=r"out\.onnx cannot be written \(No space left on device\): nothing was changed"
    ):
        save(load(two_products()), tmp_path / "out.onnx")
    assert contents(tmp_path) == old


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_when_either_renaming_fails_the_old_model_keeps_its_old_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    save(load(decomposed_small()), tmp_path / "out.onnx")
    before = contents(tmp_path)
    assert set(before) == {"out.onnx", "out.onnx.data"}
    monkeypatch.setattr(os, "replace", failing(at, error))
    with pytest.raises((LowRankError, KeyboardInterrupt)):
        save(load(two_products()), tmp_path / "out.onnx")
    assert contents(tmp_path) == before


def decomposed_small() -> onnx.ModelProto:
    return decompose(two_products(), "svd", lambda rank: (12,)).model


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("at", [1, 2])
def test_when_either_renaming_fails_without_old_files_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(os, "replace", failing(at, FULL))
    with pytest.raises(LowRankError, match="nothing was changed"):
        save(load(two_products()), tmp_path / "out.onnx")
    assert files(tmp_path) == set()


def test_a_disk_that_fills_up_while_writing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "out.onnx").write_bytes(b"old model")
    with pytest.raises(LowRankError, match="No space left on device"):
        save(load(two_products()), tmp_path / "out.onnx")
    assert contents(tmp_path) == {"out.onnx": b"old model"}


def test_a_model_that_cannot_be_serialised_says_to_give_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge:
        def SerializeToString(self) -> bytes:
            raise model_module.EncodeError("too large")

    with pytest.raises(LowRankError, match="the model is larger than 2 GB in memory: give it by its path"):
        serialize(Model(TooLarge(), Path()))  # type: ignore[arg-type]


@pytest.mark.usefixtures("limit")
def test_the_comparison_of_outputs_fails_for_data_at_the_wrong_place(tmp_path: Path) -> None:
    save(load(two_products()), tmp_path / "out.onnx")
    data = bytearray((tmp_path / "out.onnx.data").read_bytes())
    data[:4], data[4:8] = data[4:8], data[:4]
    (tmp_path / "out.onnx.data").write_bytes(bytes(data))
    feeds = feeds_of(two_products())
    with pytest.raises(AssertionError, match="off by"):
        assert_close(run(str(tmp_path / "out.onnx"), feeds), run(two_products(), feeds), 0)

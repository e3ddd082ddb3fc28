"""Sources that give whole feeds: ONNX test data, a function in a file, Python iterables and calibration readers."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.data.dataset import Dataset
from onnx_lowrank.data.pieces import Piece, window
from onnx_lowrank.graph.tensors import read_tensor_file
from onnx_lowrank.runtime import Feeds
from onnx_lowrank.types import InputSpec, LowRankError

WANTED = "dict[str, ndarray] or (dict, labels)"


def open_feeds(name: str, produce: Callable[[], Iterable[Any]], inputs: Sequence[InputSpec]) -> Dataset:
    """A source whose feeds are made anew by each call of `produce`."""
    return Dataset(name, tuple(inputs), partial(read_feeds, name, produce, tuple(inputs)))


def read_feeds(
    name: str,
    produce: Callable[[], Iterable[Any]],
    inputs: Sequence[InputSpec],
    start: int,
    stop: int | None,
    size: int,
) -> Generator[Piece, None, None]:
    """Samples of feeds. A `Reader` once its first three are bound; `size` is left to the regrouping."""
    pieces = (_piece(item, inputs, f"{name}: item {index}: ") for index, item in enumerate(_items(produce(), name)))
    return window(pieces, start, stop)


def open_python(source: Any, inputs: Sequence[InputSpec]) -> Dataset:
    """A re-iterable, a calibration reader that can be rewound, or a function without arguments that returns either."""
    name = f"data ({getattr(source, '__name__', type(source).__name__)})"
    is_instance = not isinstance(source, type)
    if isinstance(source, (Mapping, np.ndarray)):
        raise LowRankError(f"{name}: this is one feed, expected a sequence of {WANTED}: put it into a list")
    is_reader = is_instance and callable(getattr(source, "get_next", None))
    if is_reader and callable(getattr(source, "rewind", None)):
        return open_feeds(name, _Rewound(source, name), inputs)
    if is_reader or (is_instance and isinstance(source, Iterator)):
        hint = ", or give the reader a rewind()" if is_reader else ""
        raise LowRankError(
            f"{name}: can be read only once, and data are read several times: give a function that returns a new one{hint}"
        )
    if is_instance and isinstance(source, Iterable):
        return open_feeds(name, partial(iter, source), inputs)
    if callable(source):
        return open_feeds(name, source, inputs)
    raise LowRankError(f"{name}: expected a path, a sequence of {WANTED}, or a function that returns one")


class _Rewound:
    """A calibration reader from its beginning at each call; it has one place, so that two readings cannot alternate."""

    def __init__(self, reader: Any, name: str) -> None:
        self._reader, self._name, self._readings = reader, name, 0

    def __call__(self) -> Iterator[Any]:
        self._readings += 1
        reading = self._readings
        self._reader.rewind()
        for item in _items(self._reader, self._name):
            yield item
            if reading != self._readings:
                raise LowRankError(
                    f"{self._name}: was rewound while it was being read: give a function that returns a new reader"
                )


def is_script(reference: str) -> bool:
    """True for ``FILE.py:function`` and for ``FILE.py``, whose function is then asked for."""
    return re.search(r"\.py(:[^/\\]*)?$", reference) is not None


def open_script(reference: str, inputs: Sequence[InputSpec]) -> Dataset:
    """``FILE.py:function``; the file is executed now, the function called at each reading."""
    return open_feeds(reference, partial(_call, load_function(reference), reference), inputs)


def load_function(reference: str) -> Callable[..., Any]:
    """Execute a Python file and return one of its functions.

    Parameters
    ----------
    reference
        ``FILE.py:function``. The file may import what lies beside it.

    Raises
    ------
    LowRankError
        Where the file is missing or fails, or has no such function.
    """
    text, _, function = reference.rpartition(":")
    if not text.endswith(".py") or not function:
        raise LowRankError(f"{reference}: expected FILE.py:function: name the function after a colon")
    path = Path(text)
    if not path.is_file():
        raise LowRankError(f"{reference}: no such file: {path}")
    name = f"onnx_lowrank_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise LowRankError(f"{reference}: executing the file failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    found: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(found):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise LowRankError(f"{reference}: no function {function!r} in it; it has {', '.join(names) or 'none'}")
    return found


def open_test_data(path: Path, inputs: Sequence[InputSpec]) -> Dataset:
    """A ``test_data_set_*`` folder (one feed, ``input_N.pb`` in the order of the inputs), or the folder of several."""
    return open_feeds(str(path), partial(_test_data, _test_folders(path), tuple(inputs)), inputs)


def is_test_data(path: Path) -> bool:
    """True for a folder of ONNX test data, or of several."""
    return bool(_test_folders(path)) or path.name.startswith("test_data_set_")


def _test_folders(path: Path) -> list[Path]:
    if (path / "input_0.pb").exists() or path.name.startswith("test_data_set_"):
        return [path]
    # test_data_set_10 comes after test_data_set_9
    return sorted(path.glob("test_data_set_*"), key=lambda item: (len(item.name), item.name))


def _test_data(folders: Sequence[Path], inputs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    for folder in folders:
        files = [folder / f"input_{index}.pb" for index in range(len(inputs))]
        if not all(file.is_file() for file in files) or (folder / f"input_{len(inputs)}.pb").exists():
            held = ", ".join(sorted(file.name for file in folder.glob("input_*.pb"))) or "no input_0.pb"
            wanted = ", ".join(f"{file.name} ({spec.name})" for file, spec in zip(files, inputs, strict=True))
            raise LowRankError(f"{folder}: holds {held}, the model wants {wanted}")
        yield {spec.name: read_tensor_file(file) for spec, file in zip(inputs, files, strict=True)}


def _call(function: Callable[[], Iterable[Any]], reference: str) -> Iterator[Any]:
    """The user's function, whose exceptions become one clear line."""
    try:
        yield from _items(function(), reference)
    except LowRankError:
        raise
    except Exception as error:
        raise LowRankError(f"{reference}: the function raised {type(error).__name__}: {error}") from error


def _items(produced: Any, name: str) -> Iterator[Any]:
    """The items of an iterable, or of an onnxruntime ``CalibrationDataReader``."""
    get_next = getattr(produced, "get_next", None)
    if callable(get_next):
        while (item := get_next()) is not None:
            yield item
    elif isinstance(produced, Iterable) and not isinstance(produced, (Mapping, str, bytes, np.ndarray)):
        yield from produced
    else:
        raise LowRankError(f"{name}: the function returned {type(produced).__name__}, expected to yield {WANTED}")


def _piece(item: Any, inputs: Sequence[InputSpec], where: str) -> Piece:
    labels = None
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Mapping):
        item, labels = item[0], _array(item[1], f"{where}labels")
    if not isinstance(item, Mapping):
        raise LowRankError(f"{where}is of type {type(item).__name__}, expected {WANTED}")
    wanted = [spec.name for spec in inputs]
    if set(item) != set(wanted):
        raise LowRankError(f"{where}has {', '.join(map(str, item)) or 'no array'}, the model wants {', '.join(wanted)}")
    feeds = {name: _array(item[name], f"{where}array {name!r}") for name in wanted}
    lengths = {array.shape[:1] for array in feeds.values()}
    if len(lengths) > 1 or () in lengths:
        return Piece(feeds, labels, None)
    rows = lengths.pop()[0]
    if labels is not None and labels.shape[:1] != (rows,):
        if labels.ndim or rows != 1:
            raise LowRankError(f"{where}labels of shape {labels.shape} for {rows} samples, expected {rows} labels")
        labels = labels[None]
    return Piece(feeds, labels, rows)


def _array(value: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the tensor of another library objects to, or lists of unequal lengths
        raise LowRankError(f"{where} cannot be made an array ({error})") from error
    if array.dtype.kind not in "biufV":  # V: the small floats of ml_dtypes
        raise LowRankError(f"{where} is of dtype {array.dtype}, expected numbers")
    return array


def random_feeds(inputs: Iterable[tuple[str, tuple[int, ...], np.dtype]], seed: int = 0) -> Feeds:
    """Feeds of the shapes given: standard normal numbers, or zeros where the input is not of floats."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) if dtype.kind == "f" or dtype.name == "bfloat16" else np.zeros(shape)).astype(
            dtype
        )
        for name, shape, dtype in inputs
    }


def first_feeds(batches: Iterator[tuple[Feeds, np.ndarray | None]]) -> Feeds:
    """The feeds of the first batch."""
    for feeds, _ in batches:
        return feeds
    raise LowRankError("the data holds no sample: at least one was expected")


def count(batches: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Samples in all batches: the length of the first input that has one."""
    return sum(next((len(value) for value in batch.values() if value.ndim), 1) for batch in batches)

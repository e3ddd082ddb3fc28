"""One grammar for calibration and evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnx_lowrank.data.archives import Header, map_npy, read_headers, read_npy, read_npz
from onnx_lowrank.data.dataset import Dataset
from onnx_lowrank.data.feeds import is_script, is_test_data, open_python, open_script, open_test_data
from onnx_lowrank.data.pictures import open_jpeg_archive, open_picture_arrays, open_picture_folder
from onnx_lowrank.data.preprocess import Preprocess, load_preprocess
from onnx_lowrank.types import InputSpec, LowRankError

DataSource: TypeAlias = "str | PathLike[str] | Iterable[Any] | Callable[[], Any] | Dataset"

FORMS = "a .npz, a .npy, a folder of pictures, a test_data_set_* folder or FILE.py:function"


def open_data(
    source: DataSource,
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | str | PathLike[str] | None = None,
) -> Dataset:
    """Open calibration or evaluation data of any accepted form.

    The first axis is samples everywhere. Nothing is held in memory but the batch in hand. The first sample is read
    at once, so that what cannot be used is refused before any work is done.

    Parameters
    ----------
    source
        One of

        * ``.npz`` whose arrays are named as the inputs, with optional ``labels`` (without those, an array of one number
          for each sample under another name is refused); or, for a model of one input and with
          `preprocess`, ``images`` (uint8, (samples, height, width[, 1 or 3])) or ``jpeg`` with ``offsets``;
        * ``.npy``, for a model of one input;
        * a folder of pictures, with `preprocess`: class folders, sorted as text, are labels 0, 1, 2..., or the numbers
          that all of them are named by; a flat folder has no labels;
        * an ONNX ``test_data_set_*`` folder, or a folder of several;
        * ``FILE.py:function``: executed; without arguments, yields ``dict[str, ndarray]`` or ``(dict, labels)``;
        * in Python, such an iterable (not a one-shot one); an onnxruntime ``CalibrationDataReader`` with a ``rewind()``;
          or a function that returns an iterable or a reader. A feed whose arrays have no first axis in common is passed
          on whole.
    inputs
        The model's inputs.
    preprocess
        How pictures become inputs, or the TOML file that says it. Data that are no pictures do not use it.

    Returns
    -------
    Dataset
        Opened and tried.

    Raises
    ------
    LowRankError
        For a source that is missing or of no accepted form, and for whatever the model cannot take.

    Examples
    --------
    >>> x = InputSpec("x", ("N", 2), np.dtype("float32"))
    >>> data = open_data([({"x": np.zeros((3, 2), np.float32)}, [0, 1, 0])], [x])
    >>> [(feeds["x"].shape, labels.tolist()) for feeds, labels in data.batches(2)]
    [((2, 2), [0, 1]), ((1, 2), [0])]
    """
    if not inputs:
        raise LowRankError("the model has no inputs: no data can be fed to it")
    if isinstance(source, Dataset):
        if source.inputs != tuple(inputs):
            raise LowRankError(f"{source.name}: was opened for a model with other inputs: open it again")
        return source
    if isinstance(preprocess, (str, PathLike)):
        preprocess = load_preprocess(preprocess)
    if isinstance(source, (str, PathLike)):
        dataset = _open_path(fspath(source), tuple(inputs), preprocess)
    else:
        dataset = open_python(source, inputs)
    _, labels = next(iter(dataset.batches(1)))
    return replace(dataset, labelled=labels is not None)


def _open_path(text: str, inputs: tuple[InputSpec, ...], preprocess: Preprocess | None) -> Dataset:
    if is_script(text):
        return open_script(text, inputs)
    path = Path(text)
    if not path.exists():
        raise LowRankError(f"{path}: no such file or folder; expected {FORMS}")
    if path.is_dir():
        if is_test_data(path):
            return open_test_data(path, inputs)
        return open_picture_folder(path, *_for_pictures(path, "a folder of pictures", inputs, preprocess))
    if path.suffix.lower() == ".npz":
        return _open_npz(path, inputs, preprocess)
    if path.suffix.lower() == ".npy":
        return _open_npy(path, inputs, preprocess)
    raise LowRankError(f"{path}: not a form of data that is known; expected {FORMS}")


def _open_npz(path: Path, inputs: tuple[InputSpec, ...], preprocess: Preprocess | None) -> Dataset:
    headers = read_headers(path)
    wanted = [spec.name for spec in inputs]
    labels = None if "labels" in wanted else headers.get("labels")
    if labels is not None:
        _check_rows(path, labels)
        if labels.dtype.kind not in "biuf":
            raise LowRankError(
                f"{path}: labels of dtype {labels.dtype} were given: integers were expected, the numbers of the classes in the "
                f"model's scores: store those"
            )
    columns = {name: headers[name] for name in wanted if name in headers}
    if not columns and len(inputs) == 1 and headers.keys() & {"images", "jpeg"}:
        dataset = _open_pictures(path, headers, labels, inputs, preprocess)
    elif len(columns) < len(wanted):
        raise LowRankError(
            f"{path}: the model wants arrays {', '.join(wanted)}, the file holds {', '.join(headers) or 'none'}: "
            f"name them as the inputs"
        )
    elif preprocess is not None and _are_pictures(columns[wanted[0]], inputs):
        dataset = _open_pictures(path, {"images": columns[wanted[0]]}, labels, inputs, preprocess)
    else:
        for header in columns.values():
            _check_rows(path, header)
        if len({header.shape[0] for header in columns.values()}) > 1:
            held = ", ".join(header.describe() for header in columns.values())
            raise LowRankError(f"{path}: arrays of unequal numbers of samples (first axis): {held}")
        read = partial(read_npz, path, columns, labels)
        dataset = Dataset(str(path), inputs, read, columns[wanted[0]].shape[0])
    if labels is not None and labels.shape[:1] != (dataset.available,):
        raise LowRankError(f"{path}: labels {labels.shape} for {dataset.available} samples, expected one for each")
    if "labels" not in headers:
        _check_unused(path, headers, {*wanted, "images", "jpeg", "offsets"}, dataset.available)
    return dataset


def _check_unused(path: Path, headers: dict[str, Header], used: set[str], samples: int | None) -> None:
    """See that no array that looks like labels goes by another name: figures would quietly be made without them."""
    for name, header in headers.items():
        if name not in used and header.shape == (samples,):
            raise LowRankError(
                f"{path}: array {name!r} is not used: labels are called 'labels': rename it, or leave it out of the file"
            )


def _open_pictures(
    path: Path,
    headers: dict[str, Header],
    labels: Header | None,
    inputs: tuple[InputSpec, ...],
    preprocess: Preprocess | None,
) -> Dataset:
    spec, preprocess = _for_pictures(path, "images" if "images" in headers else "jpeg", inputs, preprocess)
    if "images" in headers:
        images = headers["images"]
        return open_picture_arrays(
            path, images, partial(read_npz, path, {images.name: images}, labels), spec, preprocess
        )
    if "offsets" not in headers:
        raise LowRankError(f"{path}: holds jpeg without offsets, expected file i to be jpeg[offsets[i]:offsets[i + 1]]")
    return open_jpeg_archive(path, headers["jpeg"], headers["offsets"], labels, spec, preprocess)


def _open_npy(path: Path, inputs: tuple[InputSpec, ...], preprocess: Preprocess | None) -> Dataset:
    if len(inputs) != 1:
        raise LowRankError(f"{path}: a .npy feeds a model of one input, this one has {_names(inputs)}: store a .npz")
    array = map_npy(path)
    header = Header(inputs[0].name, array.shape, array.dtype, False)
    read = partial(read_npy, path, header.name)
    if preprocess is not None and _are_pictures(header, inputs):
        return open_picture_arrays(path, header, read, inputs[0], preprocess)
    _check_rows(path, header)
    return Dataset(str(path), inputs, read, len(array))


def _are_pictures(header: Header, inputs: tuple[InputSpec, ...]) -> bool:
    """True for bytes under the name of a float input; for an integer input they are what it takes, as they are."""
    return len(inputs) == 1 and header.dtype == np.uint8 and inputs[0].dtype.kind == "f"


def _for_pictures(
    path: Path, what: str, inputs: tuple[InputSpec, ...], preprocess: Preprocess | None
) -> tuple[InputSpec, Preprocess]:
    if len(inputs) != 1:
        raise LowRankError(f"{path}: {what} feeds a model of one input, this one has {_names(inputs)}")
    if preprocess is None:
        raise LowRankError(
            f"{path}: {what} needs a preprocess file (--preprocess F.toml): integer pictures are converted as the "
            f"preprocess file says, never guessed"
        )
    return inputs[0], preprocess


def _check_rows(path: Path, header: Header) -> None:
    if header.dtype.hasobject:
        raise LowRankError(
            f"{path}: array {header.name!r} holds Python objects, which are never unpickled: store numbers"
        )
    if not header.shape:
        raise LowRankError(f"{path}: array {header.name!r} is a single number, expected samples along its first axis")


def _names(inputs: Sequence[InputSpec]) -> str:
    return ", ".join(spec.name for spec in inputs)

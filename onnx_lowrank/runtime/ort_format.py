"""Results in the format of mobile builds of ONNX Runtime (.ort): converted as its own tool does, loaded again and compared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from onnx_lowrank.files import scratch_folder
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.save import check_destination, save
from onnx_lowrank.runtime import Feeds, Session, convert_to_ort
from onnx_lowrank.types import LowRankError

SUFFIX = ".ort"


def save_ort(model: Model, path: Path, feeds: Feeds, *, compiled: bool) -> None:
    """Write `model` to `path` in the .ort format, once what was written gives the same outputs.

    Parameters
    ----------
    feeds
        What both are run on.
    compiled
        See :func:`~onnx_lowrank.runtime.mobile.convert_to_ort`.

    Raises
    ------
    LowRankError
        Where it cannot be written, converted or loaded again, or returns something else.
    """
    check_destination(path, model.path)
    try:
        with scratch_folder(path.parent, f".{path.name}-") as scratch:
            source, made = scratch / "model.onnx", scratch / f"made{SUFFIX}"
            save(model, source)
            convert_to_ort(source, made, compiled=compiled)
            _compare(Session(source).run(feeds), Session(made).run(feeds), path)
            os.replace(made, path)
    except OSError as error:
        raise LowRankError(f"{path} cannot be written ({error.strerror or error}): nothing was changed") from error


def _compare(expected: list[np.ndarray], actual: list[np.ndarray], path: Path) -> None:
    """See that outputs differ by no more than the order of sums does."""
    for index, (first, second) in enumerate(zip(expected, actual, strict=True)):
        if first.dtype.kind == "f":
            # fusions change the order in which numbers are added: half of the digits may be gone at worst
            size = np.abs(first).max(initial=0, where=np.isfinite(first))
            near = float(np.sqrt(np.finfo(first.dtype).eps) * size)
            same = first.shape == second.shape and np.allclose(first, second, rtol=0, atol=near, equal_nan=True)
        else:
            same = np.array_equal(first, second)
        if not same:
            raise LowRankError(f"output {index} of the model changes in the .ort format: save {path.stem}.onnx instead")

"""Kernels of layers as other processes find them again: by their place in the model's file and their hash."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.cache import fingerprint
from onnx_lowrank.graph.constants import Constants, read_external
from onnx_lowrank.graph.model import Model, load, serialize, stored_tensors
from onnx_lowrank.types import LowRankError


class Kernel:
    """Reads the kernel of a layer. Sent to another process, it is read there from the model's file.

    Parameters
    ----------
    read
        Reads it here.
    path
        File of the model; None where it is in memory only.
    tensor
        Name of the constant in the model.
    transposed
        Whether the constant is the kernel's transpose.
    """

    def __init__(self, read: Callable[[], np.ndarray], path: Path | None, tensor: str, transposed: bool) -> None:
        self._read, self._path = read, path.absolute() if path else None
        self._tensor, self._transposed = tensor, transposed

    def __call__(self) -> np.ndarray:
        return self._read()

    @cached_property
    def digest(self) -> str:
        """Hash of the kernel."""
        return fingerprint(self())

    @property
    def placed(self) -> bool:
        """Whether it can be read by another process."""
        return self._path is not None

    def __reduce__(self) -> tuple[type[PlacedKernel], tuple[str, str, bool, str]]:
        return PlacedKernel, (str(self._path), self._tensor, self._transposed, self.digest)


def model_digest(model: Model) -> str:
    """Hash of a model and of its external data, which is read tensor by tensor."""
    external = (tensor for tensor in stored_tensors(model.proto) if uses_external_data(tensor))
    return fingerprint(serialize(model), [fingerprint(read_external(tensor, model.folder)) for tensor in external])


class PlacedKernel:
    """A kernel in the file of a model, as another process named it."""

    def __init__(self, path: str, tensor: str, transposed: bool, digest: str) -> None:
        self._place, self.digest = (path, tensor, transposed), digest

    def __call__(self) -> np.ndarray:
        """Read it.

        Raises
        ------
        LowRankError
            Where it is not there, or is another.
        """
        path, tensor, transposed = self._place
        try:
            state = Path(path).stat()
            constant = _constants(path, state.st_size, state.st_mtime_ns).find(tensor)
        except OSError as error:
            raise LowRankError(f"{path} cannot be read here ({error.strerror})") from error
        if constant is None:
            raise LowRankError(f"{path} has no '{tensor}' here")
        value = constant.read().T if transposed else constant.read()
        if fingerprint(value) != self.digest:
            raise LowRankError(f"'{tensor}' in {path} is another here")
        return value


@lru_cache(maxsize=1)
def _constants(path: str, size: int, changed: int) -> Constants:
    """The constants of the model that was asked for last: its layers are asked for one after the other."""
    return Constants(load(path))

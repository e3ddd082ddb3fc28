"""Kernels of layers as other processes find them again: by their place in a file and their hash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from onnx_lowrank.cache import fingerprint
from onnx_lowrank.graph.constants import external_place, read_external
from onnx_lowrank.graph.limits import dtype_of
from onnx_lowrank.graph.model import Model, serialize, stored_tensors
from onnx_lowrank.graph.places import raw_places
from onnx_lowrank.types import LowRankError


class Kernel:
    """Reads the kernel of a layer. Sent to another process, it is read there from the model's file.

    Parameters
    ----------
    read
        Reads it here.
    model
        What it is in.
    tensor
        The stored tensor that holds it; None where it is derived from one.
    transposed
        Whether that is the kernel's transpose.
    """

    def __init__(
        self, read: Callable[[], np.ndarray], model: Model, tensor: onnx.TensorProto | None, transposed: bool
    ) -> None:
        self._read, self._model, self._tensor, self._transposed = read, model, tensor, transposed

    def __call__(self) -> np.ndarray:
        return self._read()

    @cached_property
    def digest(self) -> str:
        """Hash of the kernel."""
        return fingerprint(self())

    @property
    def placed(self) -> bool:
        """Whether another process can read it, if it sees the files of the model."""
        stored = self._tensor is not None and (self._tensor.HasField("raw_data") or uses_external_data(self._tensor))
        return self._model.path is not None and stored

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        place = self._place()
        if place is None:
            return partial, (np.asarray, self())
        path, offset = place
        assert self._tensor is not None
        shape, dtype = tuple(self._tensor.dims), dtype_of(self._tensor).name
        return PlacedKernel, (str(path), offset, dtype, shape, self._transposed, self.digest)

    def _place(self) -> tuple[Path, int] | None:
        """File and first byte; None where it is not in one as it is."""
        if not self.placed or self._tensor is None or self._model.path is None:
            return None
        if uses_external_data(self._tensor):
            return external_place(self._tensor, self._model.folder)
        path = self._model.path.absolute()
        try:
            state = path.stat()
            return path, raw_places(str(path), state.st_size, state.st_mtime_ns)[self._tensor.name][0]
        except (OSError, ValueError, KeyError, IndexError):  # the file is another by now
            return None


@dataclass(frozen=True)
class PlacedKernel:
    """A kernel in a file, as another process named it."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    digest: str

    def __call__(self) -> np.ndarray:
        """Read it.

        Raises
        ------
        LowRankError
            Where it is not there, or is another.
        """
        dtype = np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype).newbyteorder("<")
        try:
            flat = np.fromfile(self.path, dtype, int(np.prod(self.shape)), offset=self.offset)
            value = flat.reshape(self.shape)
        except (OSError, ValueError) as error:
            raise LowRankError(f"{self.path} cannot be read here ({error})") from error
        kernel = value.T if self.transposed else value
        if fingerprint(kernel) != self.digest:
            raise LowRankError(f"{self.path} is another file here")
        return kernel


def model_digest(model: Model) -> str:
    """Hash of a model and of its external data, which is read tensor by tensor."""
    external = (tensor for tensor in stored_tensors(model.proto) if uses_external_data(tensor))
    return fingerprint(serialize(model), [fingerprint(read_external(tensor, model.folder)) for tensor in external])

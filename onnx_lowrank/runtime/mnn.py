"""MNN: models converted and run by its Python package (extra ``mnn``). The only importer of MNN.

The package's own ``MNN.tools.mnnconvert`` is not used: on import it installs a package for telemetry over the network. The
converter itself is the extension module that it wraps, here in a process of its own, for it prints, and ends the process
on models that it does not take.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.runtime.apart import python
from onnx_lowrank.runtime.providers import one_line
from onnx_lowrank.types import LowRankError

NAME = "MNN"
"""What stands for a provider in reports."""

CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv[1:])"
"""Run by another Python: its converter takes a command line."""

SECONDS = 600
"""Longest time that a conversion may take."""

TOLERANCE = 1e-3
"""Largest difference to ONNX Runtime, relative to the largest output: its fast convolutions round otherwise."""


def require_mnn() -> None:
    """See that MNN is there.

    Raises
    ------
    LowRankError
        Where its package is not installed.
    """
    if find_spec("MNN") is None or find_spec("_tools") is None:
        raise LowRankError("target mnn needs MNN, which is not installed: pip install 'onnx-lowrank[mnn]'")


def mnn_version() -> str:
    """Version of MNN."""
    return str(_mnn().version())


@cache
def _mnn() -> Any:
    require_mnn()
    with _silence():
        return importlib.import_module("MNN")


class MNNSession:
    """A model ready to run on MNN's CPU backend, in float32."""

    provider = NAME
    fallback = ""
    runs_there = True

    def __init__(
        self, model: Path, shapes: Mapping[str, Sequence[int]], outputs: Sequence[str], folder: Path, threads: int = 1
    ) -> None:
        """Convert and load `model`.

        Parameters
        ----------
        shapes
            Sizes of its inputs.
        outputs
            Names of its outputs, in order.
        folder
            For the converted file, which goes again; exists already.

        Raises
        ------
        LowRankError
            Where MNN is not installed, or does not take the model.
        """
        self.outputs, self.placement = tuple(outputs), dict[str, int]()
        self._mnn = _mnn()
        path = folder / "model.mnn"
        _convert(model, path)
        try:
            with _silence():
                self._net = self._mnn.Interpreter(str(path))
                config = {"backend": "CPU", "numThread": threads or os.cpu_count() or 1, "precision": "high"}
                self._session = self._net.createSession(config)
                inputs = self._net.getSessionInputAll(self._session)
                self._inputs = {name: inputs[name] for name in shapes}
                for name, sizes in shapes.items():
                    self._net.resizeTensor(self._inputs[name], tuple(sizes))
                self._net.resizeSession(self._session)
                known = self._net.getSessionOutputAll(self._session)
                self._results = [known[name] for name in outputs]
        except Exception as error:  # bare Exception is what it raises
            raise LowRankError(f"MNN cannot load the model: {one_line(error)}") from error
        finally:
            path.unlink(missing_ok=True)

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Values of the outputs."""
        kept = {name: self._host(np.asarray(value)) for name, value in feeds.items()}
        for name, (tensor, _) in kept.items():
            self._inputs[name].copyFrom(tensor)
        self._net.runSession(self._session)
        return [self._read(result) for result in self._results]

    def _host(self, value: np.ndarray) -> tuple[Any, np.ndarray]:
        """A tensor of MNN over an array, which has to outlive it."""
        whole = value.dtype.kind in "iub"
        array = np.ascontiguousarray(value, dtype=np.int32 if whole else np.float32)
        kind = self._mnn.Halide_Type_Int if whole else self._mnn.Halide_Type_Float
        return self._mnn.Tensor(array.shape, kind, array, self._mnn.Tensor_DimensionType_Caffe), array

    def _read(self, result: Any) -> np.ndarray:
        tensor, array = self._host(np.zeros(result.getShape(), dtype=np.float32))
        result.copyToHostTensor(tensor)
        values = np.array(tensor.getNumpyData(), dtype=np.float32)
        return values.reshape(array.shape)


def disagreement(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str:
    """Why outputs of MNN are not those of ONNX Runtime; empty where they are, within ``TOLERANCE``.

    Examples
    --------
    >>> disagreement([np.ones(3)], [np.ones(3)])
    ''
    """
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if one.size != other.size:
            return f"output {index} has {one.size} elements on MNN and {other.size} on ONNX Runtime"
        if not other.size:
            continue
        far = np.abs(one.ravel() - other.ravel().astype(np.float64)).max()
        largest = max(float(np.abs(other).max()), np.finfo(np.float32).tiny)
        if not far <= TOLERANCE * largest:
            return f"output {index} differs on MNN from ONNX Runtime by {far / largest:.2g} of its largest value"
    return ""


def _convert(model: Path, out: Path) -> None:
    words = ["-f", "ONNX", "--modelFile", str(model.resolve()), "--MNNModel", str(out), "--bizCode", "onnx_lowrank"]
    command, log = [*python(CONVERT), "mnnconvert", *words], out.with_suffix(".log")
    try:
        with open(log, "wb") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise LowRankError(f"MNN's converter gave no result in {SECONDS} seconds") from error
    if not out.is_file():  # it succeeds by its own word, whatever happens
        lines = log.read_text(errors="replace").splitlines()
        said = next((line for line in lines if "Check failed" in line or "ERROR" in line), f"code {done.returncode}")
        raise LowRankError(f"MNN cannot convert the model: {said.strip()}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the standard output of the process: MNN prints there from C++."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        _flush()
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush() -> None:
    """Of what C keeps back: it would come out later."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)

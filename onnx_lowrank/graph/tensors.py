"""Tensors outside a model: the ``.pb`` files of ONNX test data."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

from onnx_lowrank.graph.constants import read_tensor
from onnx_lowrank.types import LowRankError


def read_tensor_file(path: str | PathLike[str]) -> np.ndarray:
    """Read one serialised ``TensorProto``, as in ``test_data_set_0/input_0.pb``.

    Parameters
    ----------
    path
        The file. Data stored outside it is looked for beside it.

    Returns
    -------
    ndarray
        In the shape and dtype of the tensor.

    Raises
    ------
    LowRankError
        Where the file is missing or holds no tensor (a sequence or an optional value, damage).
    """
    path = Path(fspath(path))
    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        # Any few bytes can parse as an empty message: only a data type makes it a tensor.
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise ValueError("it has no data type")
        return read_tensor(tensor, path.parent)
    except FileNotFoundError as error:
        raise LowRankError(f"{path}: no such tensor file ({error})") from error
    except (DecodeError, OSError, ValueError) as error:
        raise LowRankError(
            f"{path}: not an ONNX tensor, a serialised TensorProto was expected ({error}); "
            f"write it again with onnx.save_tensor"
        ) from error

"""Calibration data of every form for the tools that take onnxruntime's ``CalibrationDataReader``."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np

from onnx_lowrank.data import DataSource, Feeds, Preprocess, open_data
from onnx_lowrank.data.dataset import fixed_batch
from onnx_lowrank.graph.shapes import model_inputs
from onnx_lowrank.subject import open_model


class CalibrationReader:
    """Calibration data as ``onnxruntime.quantization.quantize_static`` takes them.

    One feed is one sample, or as many as the model insists on. It is a ``CalibrationDataReader`` to onnxruntime, which
    takes anything with ``get_next`` for one, and it is one of the forms of DATA here, since it can be rewound.

    Parameters
    ----------
    data
        In any form that :func:`onnx_lowrank.data.open_data` reads.
    model
        What they are fed to: a path, a ModelProto, a graphsurgeon Graph or an onnx-ir Model.
    preprocess
        How pictures become inputs, or the TOML file that says it.

    Raises
    ------
    LowRankError
        For data or a model that cannot be used, at once or from the sample on that the model cannot take.

    Examples
    --------
    >>> import models
    >>> reader = CalibrationReader(models.DIGITS_CALIBRATE, models.DIGITS)
    >>> len(reader), reader.get_next()["input"].shape
    (512, (1, 1, 8, 8))
    """

    def __init__(
        self, data: DataSource, model: Any, preprocess: Preprocess | str | PathLike[str] | None = None
    ) -> None:
        inputs = model_inputs(open_model(model))
        self._data = self._range = open_data(data, inputs, preprocess=preprocess)
        self._samples_of_a_feed = fixed_batch(inputs) or 1
        self.rewind()

    def get_next(self) -> Feeds | None:
        """The next feed, by the names of the model's inputs; None after the last."""
        feeds, _ = next(self._batches, (None, None))
        return feeds

    def rewind(self) -> None:
        """Begin again at the first feed, or at the first of the range that is set."""
        self._batches: Iterator[tuple[Feeds, np.ndarray | None]] = self._range.batches(1)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give only the feeds from `start_index` to before `end_index`, and begin at the first of them."""
        size = self._samples_of_a_feed
        self._range = self._data.slice(start_index * size, end_index * size)
        self.rewind()

    def __len__(self) -> int:
        """Number of feeds in all, whatever range is set; counted by reading them where nothing else tells."""
        if self._data.samples is None:
            return sum(1 for _ in self._data.batches(1))
        return self._data.samples // self._samples_of_a_feed

    def __iter__(self) -> CalibrationReader:
        return self

    def __next__(self) -> Feeds:
        if (feeds := self.get_next()) is None:
            raise StopIteration
        return feeds

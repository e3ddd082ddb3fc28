"""Scripts for Polygraphy: the data of this tool as its inputs, and a comparison that fits low-rank models.

A script of Polygraphy's is a file of two lines of one's own, which it executes; nothing here needs Polygraphy itself::

    from onnx_lowrank.integrations.polygraphy import compare_outputs, loader

    load_data = loader("calibrate.npz")
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import numpy as np

from onnx_lowrank.data import DataSource, Feeds, Preprocess, open_data
from onnx_lowrank.graph.shapes import model_inputs
from onnx_lowrank.subject import open_model
from onnx_lowrank.types import InputSpec, LowRankError
from onnx_lowrank.verification.metrics import NEED_LABELS, find_metric, is_broken

logger = logging.getLogger(__name__)

LEAST = 0.99
"""Cosine of an output with the original's, for one sample: what :func:`compare_outputs` passes."""


class Loader:
    """A data loader: goes through `data` anew each time, for the model that Polygraphy is about to run."""

    def __init__(
        self,
        data: DataSource,
        model: Any,
        preprocess: Preprocess | str | PathLike[str] | None,
        batch: int,
        samples: int | None,
    ) -> None:
        self.input_metadata: Mapping[str, Any] | None = None
        """Set by Polygraphy before it reads: name -> (its dtype, shape)."""
        self._data, self._preprocess, self._batch, self._samples = data, preprocess, batch, samples
        self._inputs = None if model is None else model_inputs(open_model(model))

    def __iter__(self) -> Iterator[Feeds]:
        inputs = self._inputs
        if inputs is None:
            if self.input_metadata is None:
                raise LowRankError("nobody says what the model takes: give it, as in loader(data, model='model.onnx')")
            inputs = tuple(_input(name, *entry) for name, entry in self.input_metadata.items())
        data = open_data(self._data, inputs, preprocess=self._preprocess)
        for feeds, _ in (data if self._samples is None else data.take(self._samples)).batches(self._batch):
            yield feeds


def loader(
    data: DataSource,
    model: Any = None,
    preprocess: Preprocess | str | PathLike[str] | None = None,
    *,
    batch: int = 1,
    samples: int | None = None,
) -> Callable[[], Loader]:
    """A ``load_data`` for ``polygraphy run --data-loader-script``.

    Parameters
    ----------
    data
        In any form that :func:`onnx_lowrank.data.open_data` reads.
    model
        What they are fed to; None for the model that Polygraphy runs, whose inputs it tells. Functions that nobody
        tells anything, such as those that this tool reads as ``FILE.py:load_data``, need it.
    preprocess
        How pictures become inputs, or the TOML file that says it.
    batch
        Samples of a feed; a model whose inputs fix it decides itself.
    samples
        Only that many from the beginning. Polygraphy holds all that it is given in memory, unless it streams.

    Raises
    ------
    LowRankError
        For data that the model cannot take, when they are read.
    """
    return lambda: Loader(data, model, preprocess, batch, samples)


def _input(name: str, dtype: Any, shape: Any) -> InputSpec:
    """An input from Polygraphy's description of it; sizes that are open are text, None or negative."""
    try:
        number = np.dtype(dtype.numpy())
    except Exception as error:  # Polygraphy's own, and those of types that numpy does not have
        raise LowRankError(
            f"input '{name}' is of {dtype}, which numpy does not have: give the model, as in "
            f"loader(data, model='model.onnx')"
        ) from error
    return InputSpec(name, tuple(_size(size) for size in shape), number)


def _size(size: Any) -> int | str | None:
    return size if isinstance(size, str) or (size is not None and size > 0) else None


def comparer(metric: str = "cosine", least: float = LEAST) -> Callable[[Any, Any], OrderedDict[str, bool]]:
    """A ``compare_outputs`` for ``polygraphy run --compare-func-script``.

    Tolerances for single elements, as Polygraphy's own, say little of a low-rank model: it differs everywhere by a little.
    Here an output passes where every sample scores at least `least`, and none has become NaN or infinite.

    Parameters
    ----------
    metric
        ``cosine``, ``agreement`` (share of positions with the same highest class), ``sqnr`` or ``psnr`` (dB).
    least
        What each sample has to reach.

    Raises
    ------
    LowRankError
        For an unknown metric, or one that needs labels.

    Examples
    --------
    >>> first, second = {"y": np.array([[3.0, 4.0]])}, {"y": np.array([[3.1, 4.0]])}
    >>> comparer()(first, second)["y"], comparer("sqnr", 60.0)(first, second)["y"]
    (True, False)
    """
    score = find_metric(metric)
    if metric in NEED_LABELS:
        raise LowRankError(f"metric {metric} was given, and Polygraphy hands on no labels: use agreement or cosine")

    def compare(result0: Any, result1: Any) -> OrderedDict[str, bool]:
        passed = OrderedDict((name, False) for name in (*result0, *result1))
        for name in passed:
            if name not in result0 or name not in result1:
                logger.warning("output %s: only one of the two models has it", name)
                continue
            reference, output = [np.asarray(result0[name])], [np.asarray(result1[name])]
            if reference[0].shape != output[0].shape:
                logger.warning("output %s: %s and %s", name, reference[0].shape, output[0].shape)
            elif is_broken(output, reference).any():
                logger.warning("output %s: NaN or infinite where it was not", name)
            else:
                worst = float(np.min(score(output, reference, None)))
                passed[name] = worst >= least
                logger.info("output %s: %s of the worst sample %.6g, at least %g", name, metric, worst, least)
        return passed

    return compare


def compare_outputs(result0: Any, result1: Any) -> OrderedDict[str, bool]:
    """Whether each output of the second result lies as near the first as the default of :func:`comparer` asks.

    Parameters
    ----------
    result0, result1
        Polygraphy's ``IterationResult``, or any mapping from outputs to arrays; the original's first.
    """
    return comparer()(result0, result1)

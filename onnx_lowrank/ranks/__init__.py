"""How many components of a matrix are worth keeping, by its numbers alone.

Every member takes a matrix (m, n) in either orientation and returns a rank; 0 means "do not compress". A new estimator
is one file and one line in the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np

from onnx_lowrank.ranks.break_even import break_even
from onnx_lowrank.ranks.energy import energy
from onnx_lowrank.ranks.ratio import ratio
from onnx_lowrank.ranks.vbmf import EVBMF, evbmf, evbmf_from_singular_values, vbmf
from onnx_lowrank.ranks.weakened_vbmf import weakened_vbmf
from onnx_lowrank.types import LowRankError

RANK_ESTIMATORS: dict[str, Callable[..., int]] = {
    "vbmf": vbmf,
    "energy": energy,
    "ratio": ratio,
    "break_even": break_even,
    "weakened_vbmf": weakened_vbmf,
}

__all__ = [
    "EVBMF",
    "RANK_ESTIMATORS",
    "break_even",
    "energy",
    "evbmf",
    "evbmf_from_singular_values",
    "parse_estimator",
    "ratio",
    "vbmf",
    "weakened_vbmf",
]


def parse_estimator(text: str) -> Callable[[np.ndarray], int]:
    """The estimator that the command line names as ``NAME`` or ``NAME=VALUE``.

    Parameters
    ----------
    text
        ``vbmf``, ``vbmf=SIGMA2`` (known noise variance), ``energy=SHARE``, ``ratio=SHARE``, ``break_even``,
        ``weakened_vbmf=FACTOR``. Without a value the estimator's default is used.

    Returns
    -------
    Callable[[numpy.ndarray], int]
        Matrix (m, n) -> rank.

    Raises
    ------
    LowRankError
        No such name, or a value that this estimator does not take.

    Examples
    --------
    >>> parse_estimator("energy=0.85")(np.diag([3.0, 1.0, 0.1]))
    1
    >>> parse_estimator("break_even")(np.ones((512, 4608)))
    460
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    usage = f"give NAME or NAME=VALUE, with NAME one of {', '.join(RANK_ESTIMATORS)}"
    if name.lstrip("-").replace(".", "", 1).isdigit():
        raise LowRankError(
            f"rank {text!r} was given: an estimator was expected, one of {', '.join(RANK_ESTIMATORS)}; ranks by hand go "
            f"into a plan: write one with compress --plan F, edit it and give it to apply"
        )
    if name not in RANK_ESTIMATORS:
        raise LowRankError(f"rank estimator {text!r}: there is no {name!r}; {usage}")
    estimator = RANK_ESTIMATORS[name]
    if not equals:
        return estimator
    parameters = [p.name for p in inspect.signature(estimator).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(parameters) == 1:
        raise LowRankError(f"rank estimator {text!r}: {name} takes no value; {usage}")
    try:
        configured = partial(estimator, **{parameters[1]: float(value)})
        configured(np.eye(2))  # the estimator knows its range: a bad value fails now, not after the model is loaded
    except ValueError as error:
        raise LowRankError(f"rank estimator {text!r}: {error}; {usage}") from error
    return configured

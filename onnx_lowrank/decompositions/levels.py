"""How much of a layer a rank keeps, as a level from 0 (rank 1) to 1 (everything): the metric of ENC."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lowrank.decompositions import lift
from onnx_lowrank.decompositions.matrix import MatrixDecomposition
from onnx_lowrank.linalg import singular_values
from onnx_lowrank.types import ConvSpec, Decomposition, Rank

NONE = 1e-6
"""The level of rank 1, which has none: so that a product of levels can be told from another."""


def energy_levels(
    decomposition: Decomposition, specs: Sequence[ConvSpec], weights: Sequence[np.ndarray], ranks: Sequence[Rank]
) -> np.ndarray:
    """The PCA-energy metric ``y(r) = (S(r) - S(1)) / (S(r_max) - S(1))``, S the running sum of the singular values.

    The values are not squared. Where a decomposition has none, the kept share of the norm stands for them, from
    that at rank 1 on: our reading. Of several groups the mean.

    Parameters
    ----------
    specs, weights
        Of the layer; kernels in ONNX order.
    ranks
        To tell the level of.

    Returns
    -------
    array (len(ranks),)
        From ``NONE`` to 1.

    References
    ----------
    Kim, Khan & Kyung (2019), "Efficient Neural Network Compression", eq. 4.
    """
    if isinstance(decomposition, MatrixDecomposition):
        parts = np.split(weights[0], specs[0].group)
        levels = np.mean([_levels(singular_values(decomposition.matricize(part)), ranks) for part in parts], axis=0)
    else:
        least = (1,) * len(lift.max_rank(decomposition, specs))
        first, *errors = np.sqrt(lift.errors(decomposition, specs, weights, [least, *ranks]))
        levels = 1 - np.array(errors) / first if first > 0 else np.ones(len(ranks))
    return np.clip(levels, NONE, 1.0)


def _levels(values: np.ndarray, ranks: Sequence[Rank]) -> np.ndarray:
    sums = np.cumsum(values)
    span = sums[-1] - sums[0]
    places = np.minimum([rank for (rank,) in ranks], len(sums)) - 1
    return (sums[places] - sums[0]) / span if span > 0 else np.ones(len(ranks))

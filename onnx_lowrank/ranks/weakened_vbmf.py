"""The VBMF rank, taken part of the way."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.ranks._checks import checked_share
from onnx_lowrank.ranks.vbmf import vbmf


def weakened_vbmf(matrix: np.ndarray, value: float = 0.7) -> int:
    """Part of the way from the full rank R to the VBMF rank: ``int(R - value (R - R_vbmf))``.

    MUSCO compresses in several mild steps with fine-tuning between them, because the VBMF rank in one step loses
    too much. R is there the rank of the layer at hand. Here it is min(m, n), the rank of a layer that has not been
    decomposed yet: the estimator sees one matrix and no history, and the kernel of a layer that was decomposed
    before is itself the (smaller) matrix it is given next time.

    A VBMF rank of 0 says that no part of the matrix stands out of the noise. There is then nothing to move towards,
    and the answer is 0 as well: do not compress.

    Parameters
    ----------
    matrix
        Shape (m, n), in either orientation.
    value
        How far to go, above 0 and up to 1, where 1 is the VBMF rank itself.

    Returns
    -------
    int
        From the VBMF rank to min(m, n); 0 when VBMF finds no signal.

    Raises
    ------
    LowRankError
        The matrix is not a matrix of finite real numbers, or `value` is outside (0, 1].

    References
    ----------
    Gusak, Kholiavchenko, Ponomarev, Markeeva, Blagoveschensky, Cichocki, Oseledets 2019, "Automated multi-stage
    compression of neural networks" (MUSCO).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> matrix = rng.normal(size=(40, 10)) @ rng.normal(size=(10, 90)) + 0.1 * rng.normal(size=(40, 90))
    >>> weakened_vbmf(matrix, 1.0), weakened_vbmf(matrix, 0.5)
    (10, 25)
    """
    value = checked_share(value, "the weakening factor")
    extreme, full = vbmf(matrix), min(np.shape(matrix))
    return int(full - value * (full - extreme)) if extreme else 0

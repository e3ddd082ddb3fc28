"""Spectra of kernels; as work that processes do, with numpy and scipy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lowrank.candidates import Group, group_candidates
from onnx_lowrank.decompositions import find_decomposition
from onnx_lowrank.decompositions.matrix import MatrixDecomposition
from onnx_lowrank.layer_tasks import loaded
from onnx_lowrank.linalg import unfold
from onnx_lowrank.ranks import evbmf
from onnx_lowrank.types import Candidate

THINNED = 64
"""Points of a spectrum that are kept."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a kernel read as a matrix.

    Parameters
    ----------
    shape
        Of the matrix.
    places, values
        Some of the singular values, at most ``THINNED``: their places from 1 on, and their sizes over the largest.
    threshold
        Of VBMF, over the largest singular value: what lies below is noise.
    vbmf_rank
        Singular values above it.
    rank
        What the layer was cut to along this matrix; None where it was not.
    """

    shape: tuple[int, int]
    places: tuple[int, ...]
    values: tuple[float, ...]
    threshold: float
    vbmf_rank: int
    rank: int | None


def look_at(given: tuple[Any, ...]) -> tuple[tuple[Spectrum, ...], tuple[Candidate, ...]]:
    """Of a task: spectra of a group's kernel, with its choice if it has one, and its candidates by some methods."""
    group, choice, methods, block, refuses = given
    group = loaded(group)  # it is read twice
    made = group_candidates(group, methods, block, refuses=refuses)[0] if methods else ()
    return _spectra(group, choice), made


def _spectra(group: Group, choice: Candidate | None) -> tuple[Spectrum, ...]:
    """Of the matrices that a choice cuts, of the first group of channels; of the kernel's rows where it cuts none.

    A depthwise kernel has none worth showing: each of its channels is one row.
    """
    spec = group.layers[0].spec
    if spec.depthwise:
        return ()
    kernel = np.split(group.layers[0].read_weight(), spec.group)[0]
    cuts: list[tuple[np.ndarray, int | None]] = [(unfold(kernel, 0), None)]
    if choice is not None and not choice.dense:
        decomposition = find_decomposition(choice.decomposition)
        if isinstance(decomposition, MatrixDecomposition):
            cuts = [(decomposition.matricize(kernel), choice.rank[0])]
        elif len(choice.rank) == 2:  # (out, in) of Tucker-2
            cuts = [(unfold(kernel, mode), rank) for mode, rank in enumerate(choice.rank)]
    return tuple(spectrum(matrix, rank) for matrix, rank in cuts)


def spectrum(matrix: np.ndarray, rank: int | None = None) -> Spectrum:
    """Singular values of a matrix (m, n), thinned, and what VBMF makes of them.

    Examples
    --------
    >>> spectrum(np.diag([4.0, 2.0, 1.0]), 2).values
    (1.0, 0.5, 0.25)
    """
    found = evbmf(matrix)
    values = found.singular_values
    scale = float(values[0]) if len(values) and values[0] > 0 else 1.0
    picks = evenly(len(values), THINNED)
    return Spectrum(
        (int(matrix.shape[0]), int(matrix.shape[1])),
        tuple(i + 1 for i in picks),
        tuple(float(values[i]) / scale for i in picks),
        found.threshold / scale,
        found.rank,
        rank,
    )


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spaced, both ends among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})

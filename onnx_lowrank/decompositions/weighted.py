r"""Fits in the norm of a layer's inputs: least error of the OUTPUT, not of the kernel.

With ``S = E[(x - mean)(x - mean)^T]`` over input patches x, a kernel W~ in the place of W changes the output by
``||(W - W~) S^{1/2}||_F^2`` on average. Every chain computes ``W~ = U T``, the last stage U after a linear map T of the
patch that the earlier stages make. Given T, the best U is a least-squares solution, so only T is searched
(variable projection):

    B = W S T^T,  G = T S T^T,  U = B G^{-1},  error = tr(W S W^T) - tr(U B^T),  d error / d T = -2 U^T (W - U T) S

The gradient is that of the error with U held fixed, because U is stationary. What distinguishes the formats is only
how T depends on its parameters.

References
----------
Golub & Pereyra (1973), "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM J. Numer. Anal. 10, section 4 (the projection); Zhang, Zou, He & Sun (2015), "Accelerating very deep
convolutional networks for classification and detection", section 3.1 (the norm, for ``channel_svd``, in closed form).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize

from onnx_lowrank.linalg import fix_signs, leading_basis, mode_dot, unfold, unit_columns

RIDGE = 1e-9
"""Added to G, relative to its mean diagonal: features of a dead input or of a surplus rank stay harmless."""

LONG, FURTHER, SHORT = 120, 40, 20
"""Iterations of a fit that is kept, of one that goes on from an earlier fit, and of one that only predicts."""

MORE, CHEAP_PATCH = 4.0, 576
"""Times as many where patches are short, and the length up to which an iteration takes milliseconds."""


def iterations_of(start: object, draft: bool, length: int) -> int:
    """Iterations of a fit to patches of `length` numbers that begins at `start`, or by itself where that is None."""
    if draft:
        return SHORT
    return round((LONG if start is None else FURTHER) * min(MORE, max(1.0, MORE * (CHEAP_PATCH / length) ** 3)))


WHITEN = 1e-6
"""Floor of eigenvalues in whitening, relative to the largest: directions without input are not blown up."""


@dataclass(frozen=True)
class WeightedFit:
    """``W~ = outer @ inner``: `outer` (O, F), parameters of the inner map, squared relative error in the norm of S."""

    outer: np.ndarray
    parameters: np.ndarray
    error: float
    converged: bool


class InnerMap(ABC):
    """How the linear map T (features, patch) of the earlier stages depends on its parameters."""

    @abstractmethod
    def matrix(self, parameters: np.ndarray) -> np.ndarray:
        """T, shape (F, D)."""

    @abstractmethod
    def pullback(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Gradient in the parameters from the gradient in T."""


def variable_projection(
    target: np.ndarray,
    moment: np.ndarray,
    inner: InnerMap,
    start: np.ndarray,
    *,
    iterations: int,
    out_rank: int | None = None,
    penalty: float = 0.0,
) -> WeightedFit:
    """Minimise the error of ``U T(parameters)`` against `target` in the norm of `moment`.

    Parameters
    ----------
    target
        Kernel (O, D), rows by output channel, columns by patch entry.
    moment
        Covariance of the patches (D, D).
    inner
        The map of the earlier stages.
    start
        Parameters to start from.
    iterations
        Most iterations of L-BFGS.
    out_rank
        Rank to which U is restricted (Tucker-2); None leaves it free.
    penalty
        Weight of the output energies of the single features, which T is searched with: terms that cancel each other have
        more than their sum. It keeps CP out of its swamps, where an error falls slowly while such terms grow. The U returned
        is the best for the T found, without it.
    """
    weighted = target @ moment
    total = float(np.sum(weighted * target)) or 1.0
    shape = start.shape

    def project(parameters: np.ndarray, penalty: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        mapped = inner.matrix(parameters)
        mapped_moment = mapped @ moment
        gram = mapped_moment @ mapped.T
        cross = weighted @ mapped.T
        if penalty:
            gram[np.diag_indices_from(gram)] *= 1 + penalty
        outer = solve_spd(gram, cross.T).T
        if out_rank is not None and out_rank < len(outer):
            basis = np.linalg.eigh(outer @ cross.T)[1][:, -out_rank:]
            outer = basis @ (basis.T @ outer)
        return outer, mapped, mapped_moment, cross

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = flat.reshape(shape)
        outer, _, mapped_moment, cross = project(parameters, penalty)
        error = 1.0 - float(np.sum(outer * cross)) / total
        gradient = (-2.0 / total) * (outer.T @ (weighted - outer @ mapped_moment))
        if penalty:
            gradient += (2.0 * penalty / total) * np.square(outer).sum(axis=0)[:, None] * mapped_moment
        return error, inner.pullback(parameters, gradient).ravel()

    if iterations:
        found = minimize(
            objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 20}
        )
        parameters, converged = found.x.reshape(shape), bool(found.success)
    else:
        parameters, converged = start, True
    outer, _, _, cross = project(parameters)
    return WeightedFit(outer, parameters, max(0.0, 1.0 - float(np.sum(outer * cross)) / total), converged)


def solve_spd(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``matrix^{-1} right`` for a positive semidefinite matrix, with a ridge of rounding size; pseudo-inverse where even that fails."""
    ridge = RIDGE * max(np.trace(matrix) / len(matrix), np.finfo(float).tiny)
    padded = matrix + ridge * np.eye(len(matrix))
    try:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(padded, check_finite=False), right, check_finite=False)
    except np.linalg.LinAlgError:
        return np.linalg.pinv(padded, hermitian=True) @ right


def leading_outputs(covariance: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal basis (O, rank) of most energy, of outputs with a `covariance` (O, O): ``U U^T W`` is the best kernel of that rank.

    The optimum of reduced-rank regression needs the eigenvectors of the output covariance only, no square root or
    inverse of S, so that a rank-deficient S is no special case.
    """
    vectors = np.linalg.eigh(covariance)[1]
    return fix_signs(vectors[:, ::-1][:, :rank])


def output_spectrum(covariance: np.ndarray) -> np.ndarray:
    """Energies of the output's principal directions, descending: tails of it are the errors of every rank."""
    return np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0.0)


def root_and_inverse(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric ``C^{1/2}`` and ``C^{-1/2}``, eigenvalues floored at a share of the largest."""
    values, vectors = np.linalg.eigh(covariance)
    if values[-1] <= 0:  # an input that never varies: no direction counts for more than another
        return np.eye(len(values)), np.eye(len(values))
    floor = WHITEN * values[-1]
    roots = np.sqrt(np.maximum(values, floor))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def block_mean(moment: np.ndarray, outer: int, inner: int, *, keep: str) -> np.ndarray:
    """Mean of the diagonal blocks of a moment over patches ordered (outer, inner): covariance of one factor alone.

    `keep` ``outer`` gives (outer, outer), averaged over the inner index; ``inner`` the other way round.
    """
    blocks = moment.reshape(outer, inner, outer, inner)
    return np.einsum("aibi->ab", blocks) / inner if keep == "outer" else np.einsum("aiaj->ij", blocks) / outer


def level(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with equal norms in each column of `left` and row of `right`."""
    before, after = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    scale = np.sqrt(np.where((before > 0) & (after > 0), after / np.where(before > 0, before, 1.0), 1.0))
    return left * scale, right / scale[:, None]


@dataclass(frozen=True)
class ChannelMap(InnerMap):
    """A first stage before `positions` taps of a second: parameters (r, in), features (r, positions).

    `in` are the input channels of a pointwise stage, or the channels and taps of a first stage that spans an axis.

    Parameters are in whitened inputs (`unwhiten` is the inverse root of their covariance), in which the
    objective is about as steep in every direction.
    """

    unwhiten: np.ndarray
    positions: int

    def matrix(self, parameters: np.ndarray) -> np.ndarray:
        stage = self.stage(parameters)
        taps = np.eye(self.positions)
        return np.einsum("ri,jk->rjik", stage, taps).reshape(-1, stage.shape[1] * self.positions)

    def pullback(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        blocks = gradient.reshape(len(parameters), self.positions, -1, self.positions)
        return np.einsum("rjij->ri", blocks) @ self.unwhiten

    def stage(self, parameters: np.ndarray) -> np.ndarray:
        """Kernel (r, in) of the stage."""
        return parameters @ self.unwhiten


@dataclass(frozen=True)
class RankOneMap(InnerMap):
    """A pointwise stage, then depthwise ones: parameters (r, in + k1 + k2 ...), one feature for each r."""

    unwhiten: np.ndarray
    kernel: tuple[int, ...]

    def matrix(self, parameters: np.ndarray) -> np.ndarray:
        pointwise, *depthwise = self.stages(parameters)
        taps = self._outer(depthwise)
        return (pointwise[:, :, None] * taps[:, None, :]).reshape(len(parameters), -1)

    def pullback(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        pointwise, *depthwise = self.stages(parameters)
        cube = gradient.reshape(len(parameters), pointwise.shape[1], -1)
        parts = [np.einsum("rik,rk->ri", cube, self._outer(depthwise)) @ self.unwhiten]
        taps = np.einsum("rik,ri->rk", cube, pointwise).reshape(len(parameters), *self.kernel)
        for axis in range(len(self.kernel)):
            left = taps
            for other in reversed(range(len(self.kernel))):
                if other != axis:
                    shape = [len(parameters)] + [1] * (left.ndim - 1)
                    shape[1 + other] = -1
                    left = (left * depthwise[other].reshape(shape)).sum(axis=1 + other, keepdims=True)
            parts.append(left.reshape(len(parameters), -1))
        return np.concatenate(parts, axis=1)

    def stages(self, parameters: np.ndarray) -> list[np.ndarray]:
        """Kernels: (r, in), then (r, k) for each depthwise stage."""
        inner = len(self.unwhiten)
        cuts = np.cumsum([inner, *self.kernel])[:-1]
        pointwise, *depthwise = np.split(parameters, cuts, axis=1)
        return [pointwise @ self.unwhiten, *depthwise]

    @staticmethod
    def _outer(depthwise: list[np.ndarray]) -> np.ndarray:
        taps = depthwise[0]
        for other in depthwise[1:]:
            taps = (taps[:, :, None] * other[:, None, :]).reshape(len(taps), -1)
        return taps


@dataclass(frozen=True)
class DepthwiseMap(InnerMap):
    """Depthwise filters of `channels` input channels: parameters (channels * r, k), one feature for each."""

    channels: int

    def matrix(self, parameters: np.ndarray) -> np.ndarray:
        filters = parameters.reshape(self.channels, -1, parameters.shape[1])
        owner = np.eye(self.channels)
        return np.einsum("crk,ci->crik", filters, owner).reshape(len(parameters), -1)

    def pullback(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        blocks = gradient.reshape(self.channels, -1, self.channels, parameters.shape[1])
        return np.einsum("crck->crk", blocks).reshape(parameters.shape)


FITTED_AT = 5
"""Ranks at which a prediction really fits: as many spaced evenly, and as many spaced evenly in their logarithm."""

STEEPEST = 1e-2
"""Least share of an error that is left at the next rank fitted, for what is in between: at full rank it drops to nothing."""


def interpolated_errors(fit: Callable[[int], float], ranks: Sequence[int]) -> np.ndarray:
    """Errors at `ranks` from fits at some of them and from the error 1 of rank 0, not increasing with the rank.

    Errors fall about exponentially with the rank: their logarithm is interpolated, by monotone cubics.
    """
    known = np.unique(ranks)
    count = min(FITTED_AT, len(known))
    wanted = [*np.geomspace(known[0], known[-1], count), *np.linspace(known[0], known[-1], count)]
    picks = np.unique([known[np.abs(known - rank).argmin()] for rank in wanted])
    reached = np.minimum.accumulate([fit(int(rank)) for rank in picks])
    logs = [0.0]
    for error in reached:
        logs.append(max(math.log(max(error, np.finfo(float).tiny)), logs[-1] + math.log(STEEPEST)))
    between = np.exp(PchipInterpolator([0, *picks], logs)(ranks))
    exact = dict(zip(picks.tolist(), reached.tolist(), strict=True))
    return np.array([exact.get(int(rank), value) for rank, value in zip(ranks, between, strict=True)])


def fit_first_stage(
    weight: np.ndarray,
    moment: np.ndarray,
    rank: int,
    iterations: int,
    out_rank: int | None = None,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, WeightedFit]:
    """A stage (rank, in) and what follows it, (O, rank * k), of a kernel (O, in, k...).

    Goes on from the stage `start`, or begins at the principal directions of the kernel in whitened inputs; what follows
    is restricted to `out_rank` where that is given.
    """
    out, inner = weight.shape[:2]
    target = weight.reshape(out, -1)
    positions = target.shape[1] // inner
    root, unwhiten = root_and_inverse(block_mean(moment, inner, positions, keep="outer"))
    if start is None:
        first = leading_basis(unfold(mode_dot(weight, root, 1), 1), rank)
    else:
        first = unit_columns(root @ start.reshape(rank, inner).T)
    mapped = ChannelMap(unwhiten, positions)
    fit = variable_projection(target, moment, mapped, first.T, iterations=iterations, out_rank=out_rank)
    return mapped.stage(fit.parameters), fit

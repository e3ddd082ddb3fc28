"""Fits in the norm of the inputs: their answers are known, and nothing near them is better."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from onnx_lowrank.decompositions import DECOMPOSITIONS, cp, lift
from onnx_lowrank.decompositions.weighted import (
    ChannelMap,
    DepthwiseMap,
    InnerMap,
    RankOneMap,
    block_mean,
    interpolated_errors,
    leading_outputs,
    root_and_inverse,
    solve_spd,
    variable_projection,
)
from onnx_lowrank.types import ConvSpec, LayerStatistics

OUT, IN, KERNEL = 12, 8, (3, 3)
SPEC = ConvSpec((OUT, IN, *KERNEL), pads=(1, 1, 1, 1))
RANKS = {
    "channel_svd": (5,),
    "channel_svd_in": (4,),
    "spatial_svd": (6,),
    "tucker2": (6, 4),
    "cp3": (16,),
    "cp4": (16,),
    "separable": (2,),
}
FULL = {name: lift.max_rank(DECOMPOSITIONS[name], [SPEC]) for name in RANKS}


def kernel(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SPEC.weight_shape)


def seen(*, directions: int = 72, rows: int = 600, seed: int = 1, channels: int = IN) -> LayerStatistics:
    """Moments of patches that vary much in few directions, as those of pictures do, and have a mean."""
    rng = np.random.default_rng(seed)
    size = channels * 9
    mix = rng.standard_normal((directions, size)) * np.exp(-np.arange(directions) / 15)[:, None]
    patches = rng.standard_normal((rows, directions)) @ mix + rng.standard_normal(size)
    return LayerStatistics(patches.mean(axis=0), patches.T @ patches / rows, rows)


def composed(name: str, kernels: tuple[np.ndarray, ...]) -> np.ndarray:
    """The kernel that a chain amounts to, written out for each format."""
    flat = [k.reshape(k.shape[:2]) if k.shape[2:] == (1, 1) else k for k in kernels]
    match name:
        case "channel_svd":
            return np.einsum("or,rikl->oikl", flat[1], flat[0])
        case "channel_svd_in":
            return np.einsum("orkl,ri->oikl", flat[1], flat[0])
        case "spatial_svd":
            return np.einsum("orl,rik->oikl", flat[1][:, :, 0], flat[0][..., 0])
        case "tucker2":
            return np.einsum("op,pqkl,qi->oikl", flat[2], flat[1], flat[0])
        case "cp3":
            return np.einsum("or,rkl,ri->oikl", flat[2], flat[1][:, 0], flat[0])
        case "separable":
            filters = flat[0].reshape(IN, -1, *KERNEL)  # (I, r, k...)
            return np.einsum("oir,irkl->oikl", flat[1].reshape(OUT, IN, -1), filters)
    return np.einsum("or,rk,rl,ri->oikl", flat[3], flat[1][:, 0, :, 0], flat[2][:, 0, 0], flat[0])


def output_error(weight: np.ndarray, approximation: np.ndarray, moment: np.ndarray) -> float:
    """Squared error of the output over its energy."""
    target = weight.reshape(len(weight), -1)
    missed = target - approximation.reshape(target.shape)
    return float(np.trace(missed @ moment @ missed.T) / np.trace(target @ moment @ target.T))


def fitted(name: str, rank: tuple[int, ...], stats: LayerStatistics | None, weight: np.ndarray | None = None):
    weight = kernel() if weight is None else weight
    given = None if stats is None else [stats]
    return lift.factorize(DECOMPOSITIONS[name], [SPEC], [weight], rank, given, rng=np.random.default_rng(0))


@pytest.mark.parametrize("name", RANKS)
def test_the_reported_error_is_that_of_the_output(name: str) -> None:
    stats = seen()
    made = fitted(name, RANKS[name], stats)
    measured = output_error(kernel(), composed(name, made.kernels[0]), stats.covariance)
    assert made.relative_error**2 == pytest.approx(measured, rel=1e-5)
    assert made.relative_error**2 != pytest.approx(
        output_error(kernel(), 1.01 * composed(name, made.kernels[0]), stats.covariance), rel=1e-5
    )


@pytest.mark.parametrize("name", RANKS)
def test_the_output_error_is_below_that_of_the_fit_to_the_kernel(name: str) -> None:
    stats = seen()
    blind = composed(name, fitted(name, RANKS[name], None).kernels[0])
    aware = composed(name, fitted(name, RANKS[name], stats).kernels[0])
    errors = [output_error(kernel(), each, stats.covariance) for each in (aware, blind)]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("name", RANKS)
def test_full_rank_gives_the_output_exactly(name: str) -> None:
    stats = seen()
    made = fitted(name, FULL[name], stats)
    assert output_error(kernel(), composed(name, made.kernels[0]), stats.covariance) < 1e-10


@pytest.mark.parametrize("name", RANKS)
def test_inputs_that_span_few_directions_are_no_obstacle(name: str) -> None:
    stats = seen(directions=10)  # covariance of rank 10, of 72
    made = fitted(name, RANKS[name], stats)
    assert all(np.isfinite(k).all() for k in made.kernels[0])
    assert output_error(kernel(), composed(name, made.kernels[0]), stats.covariance) < 0.5


@pytest.mark.parametrize("name", RANKS)
def test_dead_inputs_are_no_obstacle(name: str) -> None:
    size = IN * 9
    nothing = LayerStatistics(np.zeros(size), np.zeros((size, size)), 10)
    made = fitted(name, RANKS[name], nothing)
    assert all(np.isfinite(k).all() for k in made.kernels[0])


@pytest.mark.parametrize("name", RANKS)
def test_the_predicted_error_falls_with_the_rank_and_is_near_the_reached_one(name: str) -> None:
    stats = seen()
    halves = [tuple(max(1, r * share // 4) for r in FULL[name]) for share in (1, 2, 3)]
    predicted = lift.errors(DECOMPOSITIONS[name], [SPEC], [kernel()], halves, [stats])
    assert (np.diff(predicted) <= 1e-12).all()
    reached = [fitted(name, rank, stats).relative_error ** 2 for rank in halves]
    assert predicted[0] <= 4 * reached[0]  # the fits that predict are short, so they bound from above
    assert (predicted >= 0.9 * np.array(reached) - 1e-9).all()


@pytest.mark.parametrize("name", ["channel_svd", "tucker2", "cp3", "separable"])
def test_each_group_of_channels_is_fitted_to_what_it_sees(name: str) -> None:
    spec = ConvSpec((OUT, IN // 2, *KERNEL), pads=(1, 1, 1, 1), group=2)
    weight = np.random.default_rng(3).standard_normal(spec.weight_shape)
    stats = seen()
    rank = tuple(max(1, r // 2) for r in RANKS[name])
    made = lift.factorize(DECOMPOSITIONS[name], [spec], [weight], rank, [stats], rng=np.random.default_rng(0))
    alone = ConvSpec((OUT // 2, IN // 2, *KERNEL))
    for index in range(2):
        part = lift.factorize(
            DECOMPOSITIONS[name],
            [alone],
            [np.split(weight, 2)[index]],
            rank,
            [stats.of_group(index, 2)],
            rng=np.random.default_rng(0),
        )
        for whole, piece in zip(made.kernels[0], part.kernels[0], strict=True):
            np.testing.assert_array_equal(np.split(whole, 2)[index], piece)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("channel_svd", SPEC),
        ("channel_svd", ConvSpec((OUT, IN, 9), pads=(4, 4))),
        ("channel_svd", ConvSpec((OUT, IN, 3, 3, 1), pads=(1, 1, 1, 1, 0, 0))),
        ("svd", ConvSpec((OUT, 9 * IN))),
        ("svd", ConvSpec((OUT, 9 * IN, 1, 1))),
    ],
    ids=["2-D", "1-D", "3-D", "matrix", "pointwise"],
)
def test_no_perturbation_of_the_closed_form_lowers_the_error(name: str, spec: ConvSpec) -> None:
    stats, weight, rng = seen(), kernel().reshape(spec.weight_shape), np.random.default_rng(5)
    factors = lift.factorize(DECOMPOSITIONS[name], [spec], [weight], (5,), [stats], rng=rng).kernels[0]

    def error(first: np.ndarray, second: np.ndarray) -> float:
        return output_error(weight, second.reshape(OUT, -1) @ first.reshape(5, -1), stats.covariance)

    best = error(*factors)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(40):
            assert error(*(k + size * k.std() * rng.standard_normal(k.shape) for k in factors)) >= best


@pytest.mark.parametrize(
    ("name", "spec"), [("channel_svd", SPEC), ("svd", ConvSpec((OUT, 9 * IN)))], ids=["channel_svd", "svd"]
)
def test_long_patches_give_the_fit_that_their_moment_gives(name: str, spec: ConvSpec) -> None:
    rng = np.random.default_rng(8)
    patches = (rng.standard_normal((50, 9 * IN)) * np.exp(-np.arange(9 * IN) / 15)).astype(np.float32)
    patches -= patches.mean(axis=0)
    share, variance = 0.2, float(np.square(patches).mean())
    covariance = (1 - share) * patches.T.astype(np.float64) @ patches / 50 + share * variance * np.eye(9 * IN)
    mean, weight = np.zeros(9 * IN), kernel().reshape(spec.weight_shape)
    long = LayerStatistics(mean, np.empty((0, 0)), 50, patches, (share, variance))
    short = LayerStatistics(mean, covariance, 50)

    def reached(stats: LayerStatistics) -> tuple[float, float]:
        made = lift.factorize(DECOMPOSITIONS[name], [spec], [weight], (5,), [stats], rng=rng)
        first, second = made.kernels[0]
        whole = second.reshape(OUT, -1) @ first.reshape(5, -1)
        return output_error(weight, whole, covariance), made.relative_error**2

    assert reached(long) == pytest.approx(reached(short), rel=1e-3)
    ranks = [(r,) for r in (1, 5, 9)]
    predicted = [lift.errors(DECOMPOSITIONS[name], [spec], [weight], ranks, [stats]) for stats in (long, short)]
    np.testing.assert_allclose(predicted[0], predicted[1], rtol=1e-3)


@pytest.mark.parametrize("name", ["channel_svd_in", "spatial_svd", "tucker2", "cp3", "cp4", "separable"])
def test_no_perturbation_of_the_last_stage_lowers_the_error(name: str) -> None:
    stats, weight, rng = seen(), kernel(), np.random.default_rng(6)
    *others, last = fitted(name, RANKS[name], stats).kernels[0]
    best = output_error(weight, composed(name, (*others, last)), stats.covariance)
    for size in (1e-1, 1e-3):
        for _ in range(20):
            moved = last + size * last.std() * rng.standard_normal(last.shape)
            assert output_error(weight, composed(name, (*others, moved)), stats.covariance) >= best * (1 - 1e-7)


@pytest.mark.parametrize("kind", ["channel", "spatial", "rank one", "rank one of two", "depthwise"])
@pytest.mark.parametrize(("out_rank", "penalty"), [(None, 0.0), (None, 0.1), (4, 0.0)])
def test_the_gradient_is_that_of_finite_differences(
    kind: str, out_rank: int | None, penalty: float, monkeypatch
) -> None:
    stats, target = seen(), kernel().reshape(OUT, -1)
    _, unwhiten = root_and_inverse(block_mean(stats.covariance, IN, 9, keep="outer"))
    _, rows = root_and_inverse(block_mean(stats.covariance, IN * 3, 3, keep="outer"))
    maps: dict[str, tuple[InnerMap, tuple[int, int]]] = {
        "channel": (ChannelMap(unwhiten, 9), (3, IN)),
        "spatial": (ChannelMap(rows, 3), (3, IN * 3)),
        "rank one": (RankOneMap(unwhiten, (9,)), (6, IN + 9)),
        "rank one of two": (RankOneMap(unwhiten, KERNEL), (6, IN + 6)),
        "depthwise": (DepthwiseMap(IN), (2 * IN, 9)),
    }
    inner, shape = maps[kind]
    start = np.random.default_rng(2).standard_normal(shape)
    caught = []

    def catch(objective, first, **options):
        caught.append(objective)
        raise StopIteration

    monkeypatch.setattr("onnx_lowrank.decompositions.weighted.minimize", catch)
    with pytest.raises(StopIteration):
        variable_projection(target, stats.covariance, inner, start, iterations=1, out_rank=out_rank, penalty=penalty)
    (objective,) = caught
    scale = np.linalg.norm(objective(start.ravel())[1])
    off = check_grad(lambda p: objective(p)[0], lambda p: objective(p)[1], start.ravel(), epsilon=1e-6)
    assert off < 1e-3 * scale


def test_terms_that_cancel_each_other_are_kept_out_of_cp_at_no_cost_in_error(monkeypatch) -> None:
    stats, usual = seen(), cp.PENALTY

    def reached(penalty: float) -> tuple[float, float]:
        monkeypatch.setattr(cp, "PENALTY", penalty)
        made = fitted("cp3", RANKS["cp3"], stats)
        first, second, third = (k.reshape(len(k), -1) for k in made.kernels[0])
        terms = np.square(third).sum(axis=0) * np.square(second).sum(axis=1) * np.square(first).sum(axis=1)
        return made.relative_error, float(terms.sum() / np.square(composed("cp3", made.kernels[0])).sum())

    (free, large), (held, small) = reached(0.0), reached(usual)
    assert held <= 1.02 * free
    assert 3 * small < large


def test_reduced_rank_regression_keeps_the_outputs_of_most_energy() -> None:
    target, moment = np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 9.0, 1.0])
    basis = leading_outputs(target @ moment @ target.T, 1)
    np.testing.assert_allclose(np.abs(basis[:, 0]), [0, 1, 0], atol=1e-12)  # 2^2 * 9 is more than 3^2 * 1
    assert LayerStatistics(np.zeros(3), moment, 1).output_energy(target) == pytest.approx(9 + 36 + 1)


def test_a_singular_system_is_solved_as_far_as_it_can_be() -> None:
    matrix = np.diag([1.0, 0.0])
    np.testing.assert_allclose(matrix @ solve_spd(matrix, np.array([[2.0], [0.0]])), [[2.0], [0.0]], atol=1e-6)


@pytest.mark.parametrize("name", ["channel_svd_in", "spatial_svd", "tucker2", "cp3", "cp4", "separable"])
def test_going_on_from_an_earlier_fit_never_ends_above_it(name: str) -> None:
    stats = seen()
    first = fitted(name, RANKS[name], stats)
    again = lift.factorize(
        DECOMPOSITIONS[name],
        [SPEC],
        [kernel()],
        RANKS[name],
        [stats],
        rng=np.random.default_rng(0),
        start=first.kernels,
    )
    assert again.relative_error <= first.relative_error * (1 + 1e-6)


def test_a_prediction_is_near_the_error_at_ranks_that_were_not_fitted() -> None:
    def linear(rank: int) -> float:
        return 1 - rank / 64  # nothing is left at full rank

    ranks = list(range(1, 65))
    np.testing.assert_allclose(interpolated_errors(linear, ranks)[:48], [linear(r) for r in ranks[:48]], rtol=0.5)

    def steep(rank: int) -> float:
        return float(np.exp(-rank / 8))

    fitted_at: list[int] = []
    predicted = interpolated_errors(lambda rank: fitted_at.append(rank) or steep(rank), ranks)
    np.testing.assert_allclose(predicted, [steep(r) for r in ranks], rtol=1e-6)
    assert len(fitted_at) <= 10

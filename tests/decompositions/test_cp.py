from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.decompositions.cp import CP3, CP4, predict
from onnx_lowrank.types import ConvSpec, LowRankError

SHAPES = [
    (6, 5, 3, 3),
    (5, 6, 3, 3),
    (20, 3, 3, 3),
    (3, 20, 3, 2),
    (6, 5, 3),
    (4, 3, 2, 3, 2),
    (4, 5, 1, 3, 3),
    (2, 2, 5, 5),
    (1, 1, 3, 3),
]
BOTH = [(member, shape) for member in (CP3(), CP4()) for shape in SHAPES if member.refuses([ConvSpec(shape)]) is None]


def dense(kernels):
    """The kernel that a chain stands for: W[o, i, k...] = sum_r last[o, r] first[r, i] prod depthwise[r, k...]."""
    first, *depthwise, last = kernels
    taps = 1.0
    for kernel in depthwise:
        taps = taps * kernel[:, 0]  # (r, 1, k...) -> (r, k...), of size 1 along the axes that it does not span
    return np.einsum("or,ri,r...->oi...", last.reshape(last.shape[:2]), first.reshape(first.shape[:2]), taps)


def distance(weight, kernels):
    return np.linalg.norm(weight - dense(kernels)) / np.linalg.norm(weight)


def factorize(member, weight, rank, seed=0):
    return member.factorize([weight], (rank,), rng=np.random.default_rng(seed))


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def power_law(out, inner, positions, exponents=(0.5, 0.5, 0.5), seed=0):
    """A kernel with decaying spectra along every axis, as trained ones have."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out, inner, positions))
    for mode, exponent in enumerate(exponents):
        n = weight.shape[mode]
        mixing = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.arange(1, n + 1) ** -exponent
        weight = np.moveaxis(np.tensordot(mixing, weight, (1, mode)), 0, mode)
    side = int(np.sqrt(positions))
    return weight.reshape(out, inner, side, side)


def planted(member, shape, rank, seed=0):
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal(stage.spec.weight_shape) for stage in member.chain([ConvSpec(shape)], (rank,))[0]]
    return dense(kernels)


def test_the_checker_sees_a_wrong_kernel():
    weight = gaussian((6, 5, 3, 3))
    first, middle, last = factorize(CP3(), weight, 30).kernels[0]
    assert distance(weight, (first, middle, last)) < 1e-12
    assert distance(weight, (first, middle, 1.01 * last)) == pytest.approx(0.01, rel=1e-6)
    assert distance(weight, (first, middle[:, :, ::-1], last)) > 0.1


def test_strides_pads_and_dilations_stay_with_the_depthwise_stage_of_their_axis():
    spec = ConvSpec((64, 32, 3, 5), strides=(2, 1), pads=(1, 2, 3, 4), dilations=(1, 2))
    first, middle, last = (stage.spec for stage in CP3().chain([spec], (16,))[0])
    assert (first.weight_shape, middle.weight_shape, last.weight_shape) == (
        (16, 32, 1, 1),
        (16, 1, 3, 5),
        (64, 16, 1, 1),
    )
    assert (middle.strides, middle.pads, middle.dilations, middle.group) == ((2, 1), (1, 2, 3, 4), (1, 2), 16)
    assert first.strides == last.strides == (1, 1) and first.pads == last.pads == (0, 0, 0, 0)

    _, rows, columns, _ = (stage.spec for stage in CP4().chain([spec], (16,))[0])
    assert (rows.weight_shape, rows.strides, rows.pads, rows.dilations) == ((16, 1, 3, 1), (2, 1), (1, 0, 3, 0), (1, 1))
    assert (columns.weight_shape, columns.strides, columns.pads) == ((16, 1, 1, 5), (1, 1), (0, 2, 0, 4))
    assert columns.dilations == (1, 2) and rows.group == columns.group == 16


def test_a_flat_axis_keeps_its_stride_on_the_first_depthwise_stage():
    spec = ConvSpec((8, 4, 3, 1, 3), strides=(1, 2, 1))
    shapes = [stage.spec.weight_shape for stage in CP4().chain([spec], (5,))[0]]
    assert shapes == [(5, 4, 1, 1, 1), (5, 1, 3, 1, 1), (5, 1, 1, 1, 3), (8, 5, 1, 1, 1)]
    assert CP4().chain([spec], (5,))[0][1].spec.strides == (1, 2, 1)


@pytest.mark.parametrize(
    "member, shape, reason",
    [
        (CP3(), (8, 4), "pointwise: svd"),
        (CP3(), (8, 4, 1, 1), "pointwise: svd"),
        (CP4(), (8, 4, 1, 1), "no second spatial axis"),
        (CP4(), (8, 4, 3), "no second spatial axis"),
        (CP4(), (8, 4, 3, 1), "no second spatial axis"),
    ],
)
def test_kernels_that_have_a_shorter_chain_are_refused_with_its_name(member, shape, reason):
    assert reason in member.refuses([ConvSpec(shape)])


def test_kernels_that_span_positions_are_accepted():
    assert CP3().refuses([ConvSpec((8, 4, 3))]) is None
    assert CP4().refuses([ConvSpec((8, 4, 1, 3, 2))]) is None


@pytest.mark.parametrize("member, shape", BOTH)
def test_full_rank_reproduces_every_entry(member, shape):
    weight = gaussian(shape)
    spec = ConvSpec(shape)
    rank = member.max_rank([spec])
    found = factorize(member, weight, rank[0])
    assert [kernel.shape for kernel in found.kernels[0]] == [s.spec.weight_shape for s in member.chain([spec], rank)[0]]
    np.testing.assert_allclose(dense(found.kernels[0]), weight, rtol=1e-10, atol=1e-10 * np.abs(weight).max())
    assert found.converged and found.relative_error < 1e-12
    assert member.errors([weight], [rank])[0] == 0


@pytest.mark.parametrize("member, shape", BOTH)
def test_the_reported_error_is_the_distance_of_the_kernels_and_falls_with_the_rank(member, shape):
    weight = gaussian(shape)
    most = member.max_rank([ConvSpec(shape)])[0]
    found = [factorize(member, weight, rank) for rank in sorted({1, max(1, most // 4), max(1, most // 2), most})]
    for one in found:
        assert one.relative_error == pytest.approx(distance(weight, one.kernels[0]), rel=1e-9, abs=1e-13)
    errors = [one.relative_error for one in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-8), (np.float32, 1e-6)])
@pytest.mark.parametrize(
    "member, shape, rank",
    [
        (CP3(), (8, 6, 3, 3), 3),
        (CP3(), (20, 15, 3, 3), 10),
        (CP3(), (20, 15, 3, 3), 18),  # above the input channels
        (CP3(), (16, 12, 5), 12),
        (CP3(), (10, 9, 2, 3, 2), 8),
        (CP4(), (16, 12, 3, 3), 6),
        (CP4(), (10, 9, 2, 3, 2), 7),
    ],
)
def test_a_planted_kernel_is_recovered_at_its_rank(member, shape, rank, dtype, tolerance):
    weight = planted(member, shape, rank).astype(dtype)
    found = factorize(member, weight, rank)
    assert distance(weight, found.kernels[0]) < tolerance
    assert found.converged and found.next_step == ""
    assert factorize(member, weight, rank - 2).relative_error > 1e-2


@pytest.mark.parametrize("member", [CP3(), CP4()])
def test_a_rank_above_the_planted_one_is_as_exact(member):
    weight = planted(member, (16, 12, 3, 3), 5)
    for rank in (6, 8, 16, 40):
        assert distance(weight, factorize(member, weight, rank).kernels[0]) < 1e-8


@pytest.mark.parametrize("algorithm", ["als", "tpm", "tpm+als"])
def test_the_same_seed_gives_the_same_bits(algorithm):
    weight = power_law(16, 12, 9)
    member = CP3(algorithm=algorithm)
    once, again = (factorize(member, weight, 10, seed=3) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(once.kernels[0], again.kernels[0], strict=True))
    assert once.relative_error == again.relative_error


def test_every_stage_carries_the_same_root_of_a_components_weight():
    first, middle, last = factorize(CP3(), power_law(16, 12, 9), 10).kernels[0]
    norms = np.linalg.norm(first.reshape(10, -1), axis=1)
    np.testing.assert_allclose(np.linalg.norm(middle.reshape(10, -1), axis=1), norms, rtol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(last.reshape(-1, 10), axis=0), norms, rtol=1e-10)
    assert np.all(np.diff(norms) <= 0)


def test_alternating_least_squares_refines_the_tensor_power_method():
    weight = power_law(16, 12, 9)
    power = factorize(CP3(algorithm="tpm"), weight, 12)
    refined = factorize(CP3(algorithm="tpm+als"), weight, 12)
    best = factorize(CP3(), weight, 12)
    assert refined.relative_error < 0.95 * power.relative_error
    assert best.relative_error < 1.02 * refined.relative_error
    assert distance(weight, power.kernels[0]) == pytest.approx(power.relative_error, rel=1e-9)


def test_a_fit_cut_short_says_so_and_is_not_worse_than_the_closed_form():
    weight = power_law(12, 10, 9)
    bound = np.sqrt(_closed_form(weight, 20))
    cut = factorize(CP3(iterations=1, starts=0), weight, 20)
    assert cut.relative_error <= bound * (1 + 1e-12) and not cut.converged
    assert "still fell after 1 iterations" in cut.next_step
    short = factorize(CP3(iterations=3, starts=0), weight, 20)
    assert short.relative_error < 0.9 * bound and not short.converged
    assert factorize(CP3(), weight, 20).converged


def _closed_form(weight, rank):
    """Error of the rank largest singular triplets of the slices along principal input or output directions."""
    errors = []
    for mode in (0, 1):
        matrix = np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1)
        basis = np.linalg.svd(matrix)[0]
        slices = np.tensordot(basis.T, weight, (1, mode)).reshape(weight.shape[mode], weight.shape[1 - mode], -1)
        energies = np.sort(np.square(np.linalg.svd(slices, compute_uv=False)).ravel())[::-1]
        errors.append(energies[rank:].sum() / energies.sum())
    return min(errors)


def test_a_kernel_of_border_rank_gives_benign_factors_and_says_so():
    a, b = np.linalg.qr(gaussian((6, 2)))[0].T
    weight = sum(np.einsum("i,j,k->ijk", *vectors) for vectors in [(a, a, b), (a, b, a), (b, a, a)])
    found = factorize(CP3(), weight, 2)
    assert 1e-4 < found.relative_error < 0.05  # 0.577 is what two orthogonal components reach
    assert not found.converged and "cancel each other" in found.next_step
    assert max(np.abs(kernel).max() for kernel in found.kernels[0]) < 2
    exact = factorize(CP3(), weight, 3)
    assert exact.relative_error < 1e-6


def test_a_zero_kernel_gives_zero_kernels_and_no_error():
    for member in (CP3(), CP4()):
        weight = np.zeros((6, 5, 3, 3), np.float32)
        found = factorize(member, weight, 4)
        assert found.relative_error == 0 and found.converged
        assert all(kernel.dtype == np.float64 and not kernel.any() for kernel in found.kernels[0])
        assert member.errors([weight], [(1,), (4,)]).tolist() == [0, 0]


def test_dead_channels_and_repeated_filters_cost_no_rank():
    weight = power_law(12, 10, 9)
    weight[3] = 0
    weight[:, 4] = 0
    weight[7] = 2 * weight[6]
    alive = np.delete(np.delete(weight, [3, 7], axis=0), 4, axis=1)
    rank = CP3().max_rank([ConvSpec(alive.shape)])[0]
    assert rank < CP3().max_rank([ConvSpec(weight.shape)])[0]
    found = factorize(CP3(), weight, rank)
    assert distance(weight, found.kernels[0]) < 1e-12
    assert np.abs(found.kernels[0][2][3]).max() < 1e-14
    assert np.isfinite(CP3().errors([weight], [(r,) for r in range(1, rank + 1)])).all()


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_the_scale_of_a_kernel_does_not_matter(scale):
    weight = power_law(12, 10, 9)
    plain, scaled = factorize(CP3(), weight, 8), factorize(CP3(), weight * scale, 8)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    np.testing.assert_allclose(dense(scaled.kernels[0]), scale * dense(plain.kernels[0]), atol=1e-6 * scale)


@pytest.mark.parametrize("member", [CP3(), CP4()])
@pytest.mark.parametrize("exponents", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.8, 0.8, 1.0)])
def test_the_prediction_is_close_to_the_fit_at_useful_ranks(member, exponents):
    weight = power_law(24, 16, 9, exponents)
    ranks = [(4,), (8,), (16,), (28,)]
    predicted = member.errors([weight], ranks)
    reached = np.array([factorize(member, weight, rank).relative_error ** 2 for (rank,) in ranks])
    assert np.all(predicted / reached < 1.6) and np.all(predicted / reached > 0.6)


@pytest.mark.parametrize("member, shape", BOTH)
def test_the_prediction_never_rises_and_is_zero_only_at_full_rank(member, shape):
    ranks = [(r,) for r in range(1, member.max_rank([ConvSpec(shape)])[0] + 1)]
    errors = member.errors([gaussian(shape)], ranks)
    assert np.all(np.diff(errors) <= 0) and np.all(errors[:-1] > 0) and errors[-1] == 0
    assert np.all(errors < 1)
    assert member.errors([gaussian(shape)], ranks[:1])[0] == errors[0]


def test_the_prediction_starts_from_the_whole_tensor():
    assert predict(gaussian((6, 9, 5)), ridge=0.05)[0] == 1


def test_the_estimated_rank_is_the_larger_of_the_channel_modes():
    weight = gaussian((8, 6, 3, 3))
    seen = []

    def estimator(matrix):
        seen.append(matrix.shape)
        return {8: 5, 6: 2}[len(matrix)]

    assert CP3().estimate_rank([weight], estimator) == (5,)
    assert seen == [(8, 54), (6, 72)]
    ranks = {name: CP3(combine=name).estimate_rank([weight], estimator) for name in ("max", "min", "mean", "sum")}
    assert ranks == {"max": (5,), "min": (2,), "mean": (4,), "sum": (7,)}
    assert CP3().estimate_rank([weight], lambda matrix: 0) == (0,)
    assert CP3(combine="sum").estimate_rank([gaussian((2, 2, 3))], lambda matrix: 9) == (4,)


def test_an_unknown_algorithm_names_the_known_ones():
    with pytest.raises(LowRankError, match="CP algorithm 'nls': one of als, tpm, tpm\\+als was expected"):
        CP3(algorithm="nls")
    with pytest.raises(LowRankError, match="CP combine 'median': one of max, min, mean, sum was expected"):
        CP4(combine="median")
    with pytest.raises(LowRankError, match="CP iterations 0: at least 1 was expected"):
        CP3(iterations=0)

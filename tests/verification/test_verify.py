from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from onnx_lowrank.data.feeds import first_feeds, random_feeds
from onnx_lowrank.runtime import CPU, RunSettings, Session
from onnx_lowrank.types import LowRankError
from onnx_lowrank.verification.metrics import CAP_DB, METRICS, find_metric
from onnx_lowrank.verification.verify import check_accuracy, check_latency, drop_upper
from tests.helpers import parse

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])


class Fixed:
    """A session that returns what was planted, whatever it is fed."""

    def __init__(self, *outputs):
        self.outputs = [np.asarray(output) for output in outputs]

    def run(self, feeds):
        return self.outputs


class Function:
    """A session that computes its output from its input ``x``."""

    def __init__(self, function):
        self.function = function

    def run(self, feeds):
        return [self.function(feeds["x"])]


def compare(original, compressed, labels=None, metric=None, custom=None):
    """Both as one batch; arrays stand for sessions that return them."""
    first, second = (s if hasattr(s, "run") else Fixed(s) for s in (original, compressed))
    return check_accuracy(first, second, [({}, labels)], metric, custom)


def scores_of(name, outputs, reference, labels=None):
    wrapped = [[np.asarray(part) for part in (one if isinstance(one, list) else [one])] for one in (outputs, reference)]
    return METRICS[name](*wrapped, labels).tolist()


# --- metrics ------------------------------------------------------------------------------------------------------


def test_top1_is_right_where_the_largest_score_is_that_of_the_label():
    assert scores_of("top1", SCORES, SCORES, np.array([1, 0, 2, 0])) == [1, 1, 1, 1]
    assert scores_of("top1", SCORES, SCORES, np.array([0, 0, 1, 0])) == [0, 1, 0, 1]


def test_top5_is_right_where_the_label_is_among_the_five_largest():
    scores = np.array([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]])
    expected = [
        float(label in sorted(range(7), key=lambda k: -row[k])[:5])
        for row, label in zip(scores, [4, 1, 5], strict=True)
    ]
    assert scores_of("top5", scores, scores, np.array([4, 1, 5])) == expected == [1, 0, 0]
    assert scores_of("top5", SCORES, SCORES, np.array([2, 2, 0, 2])) == [1, 1, 1, 1]  # there are only three classes
    assert scores_of("top5", scores[:, :5], scores[:, :5], np.array([4, 0, 4])) == [1, 1, 1]
    assert scores_of("top5", scores[:, :6], scores[:, :6], np.array([5, 0, 5])) == [0, 0, 0]


def test_every_position_of_a_segmentation_counts_alike():
    scores = np.zeros((2, 3, 2, 2))
    scores[0, 1] = 1.0  # class 1 everywhere in the first picture, class 0 in the second
    labels = np.array([[[1, 1], [1, 0]], [[0, 2], [1, 2]]])
    assert scores_of("top1", scores, scores, labels) == [0.75, 0.25]
    assert scores_of("agreement", scores, np.roll(scores, 1, axis=0)) == [0, 0]
    seven = np.zeros((1, 7, 2))
    seven[0, :, 0] = np.arange(7)
    seven[0, :, 1] = np.arange(7)[::-1]
    assert scores_of("top5", seven, seven, np.array([[1, 0]])) == [0.5]


def test_agreement_compares_the_classes_of_both_models():
    other = SCORES[:, [0, 2, 1]]
    assert scores_of("agreement", SCORES, other) == [0, 1, 0, 1]
    assert np.isnan(scores_of("agreement", np.ones(3), np.ones(3))).all()


def test_cosine_is_that_of_all_outputs_of_a_sample_together():
    first, second = [np.array([[3.0, 0.0]]), np.array([[[4.0]]])], [np.array([[0.0, 3.0]]), np.array([[[4.0]]])]
    assert scores_of("cosine", first, second) == pytest.approx([16 / 25])
    assert scores_of("cosine", SCORES, -2 * SCORES) == pytest.approx([-1] * 4)
    assert scores_of("cosine", SCORES, 7 * SCORES) == pytest.approx([1] * 4)


def test_cosine_of_outputs_that_are_zero_is_one_only_where_both_are():
    assert scores_of("cosine", [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]) == [1, 0]


def test_sqnr_is_the_energy_of_the_original_over_that_of_the_difference():
    reference, outputs = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[3.0, 4.5], [0.0, 0.0]])
    assert scores_of("sqnr", outputs, reference) == pytest.approx([20.0, 0.0])
    assert scores_of("sqnr", 1.01 * reference, reference) == pytest.approx([40.0, 40.0])


def test_psnr_takes_the_range_of_the_original_for_its_peak():
    reference = np.array([[0.0, 10.0, 5.0, 5.0]])
    assert scores_of("psnr", reference + 1.0, reference) == pytest.approx([20.0])
    assert scores_of("psnr", np.array([[0.0, 12.0, 5.0, 5.0]]), reference) == pytest.approx([20.0])


@pytest.mark.parametrize("name", ["sqnr", "psnr"])
def test_equal_outputs_have_the_most_decibels_and_noise_without_a_signal_the_fewest(name):
    assert scores_of(name, SCORES, SCORES) == [CAP_DB] * 4
    assert scores_of(name, np.zeros((1, 3)), np.zeros((1, 3))) == [CAP_DB]
    assert scores_of(name, np.ones((1, 3)), np.zeros((1, 3))) == [-CAP_DB]


def test_only_floating_point_outputs_are_compared_where_there_are_some():
    floats, integers = np.ones((2, 2), np.float16), np.array([[1], [2]])
    assert scores_of("cosine", [floats, integers], [floats, -integers]) == pytest.approx([1, 1])


def test_a_model_that_returns_nothing_but_classes_is_compared_by_them():
    """Leaving all of its outputs out would make every model equal to it."""
    assert scores_of("cosine", np.array([[1, 0], [2, 0]]), np.array([[1, 0], [0, 2]])) == pytest.approx([1, 0])
    assert scores_of("sqnr", np.array([[1], [2]]), np.array([[1], [1]])) == pytest.approx([CAP_DB, 0])


def test_half_precision_is_compared_in_float64():
    large = np.full((1, 4), 6e4, np.float16)  # its energy is far beyond float16
    assert scores_of("cosine", large, large) == pytest.approx([1])
    assert scores_of("sqnr", large, large) == [CAP_DB]


def test_an_unknown_metric_is_told_with_those_there_are():
    assert find_metric("cosine") is METRICS["cosine"]
    with pytest.raises(LowRankError, match=r"no metric is called 'f1': one of top1, .*psnr or FILE.py:function"):
        find_metric("f1")


# --- the bound on a drop ------------------------------------------------------------------------------------------


def paired(lost, gained, n):
    """Right or wrong before and after: `lost` samples only before, `gained` only after, the rest right in both."""
    before, after = np.ones(n), np.ones(n)
    after[:lost] = 0
    before[lost : lost + gained] = 0
    return before, after


def test_equal_scores_leave_a_bound_of_three_over_the_samples():
    """The rule of three: a loss of a share p escapes n samples with the probability (1 - p)^n."""
    for n in (10, 300, 50_000):
        bound = drop_upper(*paired(0, 0, n))
        assert (1 - bound) ** n == pytest.approx(0.05)
        assert drop_upper(np.zeros(n), np.zeros(n)) == bound  # all wrong, before and after
        assert bound == pytest.approx(3 / n, rel=0.2)


@pytest.mark.parametrize(("lost", "n"), [(1, 300), (7, 300), (3, 20), (19, 20)])
def test_a_bound_on_losses_alone_is_the_exact_binomial_one(lost, n):
    bound = drop_upper(*paired(lost, 0, n))
    assert stats.binom.cdf(lost, n, bound) == pytest.approx(0.05)


def test_losing_every_sample_is_a_drop_of_one_and_gaining_every_one_below_none():
    assert drop_upper(*paired(20, 0, 20)) == 1
    assert -1 < drop_upper(*paired(0, 20, 20)) < -0.8


def test_the_bound_is_above_the_drop_and_nearer_with_more_samples():
    bounds = [drop_upper(*paired(n // 10, n // 20, n)) for n in (40, 400, 4_000, 400_000)]
    assert all(bound > 0.05 for bound in bounds)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 0.052


def test_gains_lower_the_bound_and_losses_raise_it():
    assert drop_upper(*paired(3, 3, 300)) < drop_upper(*paired(3, 0, 300)) < drop_upper(*paired(6, 0, 300))


def coverage(p_lost, p_gained, n):
    """Probability that the bound holds, by all outcomes that are not negligible."""
    p_both = p_lost + p_gained
    total = held = 0.0
    for changed in range(n + 1):
        share = stats.binom.pmf(changed, n, p_both)
        if share < 1e-7:
            continue
        for lost in range(changed + 1):
            weight = share * stats.binom.pmf(lost, changed, p_lost / p_both)
            if weight >= 1e-7:
                total += weight
                held += weight * (drop_upper(*paired(lost, changed - lost, n)) >= p_lost - p_gained)
    return held / total


@pytest.mark.parametrize(
    ("p_lost", "p_gained"),
    [(0.0055, 0), (0.0101, 0), (0.0155, 0), (0.004, 0.002), (0.01, 0.01), (0.02, 0.005), (0.001, 0.01), (0.05, 0.02)],
)
def test_the_bound_holds_for_300_samples_of_which_few_differ(p_lost, p_gained):
    """The first three are where a bound from a normal distribution holds in 81 to 94 of 100 cases only."""
    assert coverage(p_lost, p_gained, 300) >= 0.95


def test_the_bound_holds_in_simulated_runs_and_is_not_an_empty_one():
    rng = np.random.default_rng(0)
    held, bounds = 0, []
    for _ in range(2000):
        lost, gained, _ = rng.multinomial(300, [0.02, 0.01, 0.97])
        bounds.append(drop_upper(*paired(lost, gained, 300)))
        held += bounds[-1] >= 0.01
    assert 0.93 * 2000 <= held < 2000
    assert np.mean(bounds) < 0.035  # the drop is 0.01


def test_the_bound_on_other_scores_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(1)
    before, after = rng.uniform(0.9, 1, 40), rng.uniform(0.8, 1, 40)
    interval = stats.ttest_rel(before, after).confidence_interval(0.90)  # two-sided: 95 % on each side
    assert drop_upper(before, after) == pytest.approx(interval.high)


def test_one_score_that_is_not_right_or_wrong_has_no_bound():
    assert math.isnan(drop_upper(np.array([0.7]), np.array([0.6])))
    assert drop_upper(np.array([1.0]), np.array([1.0])) == pytest.approx(0.95)


# --- two models side by side --------------------------------------------------------------------------------------


def test_equal_models_differ_in_nothing():
    check = compare(SCORES, SCORES, np.array([1, 0, 2, 1]))
    assert (check.metric, check.original, check.compressed, check.drop, check.samples) == ("top1", 0.75, 0.75, 0.0, 4)
    assert check.drop_upper_95 == drop_upper(*paired(0, 0, 4))
    assert check.others == {"agreement": 1.0, "cosine": pytest.approx(1.0), "sqnr": CAP_DB}
    assert check.broken == 0


def test_a_model_that_is_wrong_everywhere_loses_everything_that_was_right():
    check = compare(SCORES, -SCORES, SCORES.argmax(axis=1))
    assert (check.original, check.compressed, check.drop, check.drop_upper_95) == (1, 0, 1, 1)
    assert check.others["agreement"] == 0
    better = compare(-SCORES, SCORES, SCORES.argmax(axis=1))
    assert (better.original, better.compressed, better.drop) == (0, 1, -1)
    assert better.drop_upper_95 < 0


def test_samples_of_all_batches_count_alike():
    batches = [({"x": SCORES[:3]}, np.array([1, 0, 2])), ({"x": SCORES[3:]}, np.array([2]))]
    check = check_accuracy(Function(np.copy), Function(np.negative), batches)
    assert (check.samples, check.original, check.compressed, check.drop) == (4, 0.75, 0.25, 0.5)


def test_without_labels_the_outputs_are_compared_with_the_originals():
    check = compare(SCORES, SCORES[:, ::-1])
    expected = np.mean(scores_of("cosine", SCORES[:, ::-1], SCORES))
    assert (check.metric, check.original) == ("cosine", pytest.approx(1))
    assert check.compressed == pytest.approx(expected)
    assert check.drop_upper_95 > check.drop > 0
    assert set(check.others) == {"agreement", "sqnr"}


def linear(weight):
    return Session(
        parse("agraph (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=weight).SerializeToString()
    )


WEIGHT = np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)
FEEDS = {"x": np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)}


def test_a_kernel_scaled_by_1_01_keeps_the_direction_and_shows_as_noise():
    check = check_accuracy(linear(WEIGHT), linear(np.float32(1.01) * WEIGHT), [(FEEDS, None)])
    assert check.compressed == pytest.approx(1, abs=1e-6)
    assert check.others["sqnr"] == pytest.approx(40, abs=0.1)
    assert check.others["agreement"] == 1


def test_swapped_channels_show_in_every_figure():
    check = check_accuracy(linear(WEIGHT), linear(WEIGHT[:, [1, 0, 2]]), [(FEEDS, None)])
    assert check.compressed < 0.9
    assert check.others["sqnr"] < 10
    assert check.others["agreement"] < 0.7
    labels = (FEEDS["x"] @ WEIGHT).argmax(axis=1)
    check = check_accuracy(linear(WEIGHT), linear(WEIGHT[:, [1, 0, 2]]), [(FEEDS, labels)])
    assert check.original == 1
    assert check.drop == 1 - check.others["agreement"]


@pytest.mark.parametrize("name", ["agreement", "cosine", "sqnr", "psnr"])
def test_a_metric_asked_for_is_not_repeated_among_the_others(name):
    check = compare(SCORES, SCORES + 0.01, metric=name)
    assert check.metric == name
    assert name not in check.others
    assert check.compressed == pytest.approx(np.mean(scores_of(name, SCORES + 0.01, SCORES)))


@pytest.mark.parametrize("metric", ["sqnr", "psnr"])
def test_what_is_lost_in_decibels_is_the_share_of_noise(metric):
    scores = np.array([[0.0, 3.0, 4.0, 0.0], [0.0, 8.0, 0.0, 6.0]])  # ranges 4 and 8, powers 25 and 100
    check = compare(scores, scores * np.array([[0.9], [1.0]]), metric=metric)
    shares = {"sqnr": [0.01, 0], "psnr": [0.25 / 4 / 16, 0]}[metric]
    assert check.drop == pytest.approx(np.mean(shares))
    assert check.drop < check.drop_upper_95 < 1
    assert compare(scores, scores, metric=metric).drop == pytest.approx(0, abs=1e-15)
    assert compare(scores, 5 * scores, metric=metric).drop <= 1


# --- outputs that are not numbers ---------------------------------------------------------------------------------

BAD = [np.nan, np.inf, -np.inf]
LABELS_FREE = ["agreement", "cosine", "sqnr", "psnr"]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("metric", ["top1", "top5", *LABELS_FREE])
def test_a_model_that_returns_no_numbers_is_never_as_good_as_the_original(metric, value):
    """NaN has a largest entry, the first, which may be the right class; and no noise that could be measured."""
    labels = np.zeros(4, dtype=int)
    check = compare(SCORES, np.full_like(SCORES, value), labels, metric)
    assert check.broken == 4
    assert check.compressed < check.original
    assert check.compressed == {"cosine": -1, "sqnr": -CAP_DB, "psnr": -CAP_DB}.get(metric, 0)
    assert check.drop > 0
    assert check.drop_upper_95 == math.inf
    assert all(math.isfinite(value) for value in check.others.values())
    worst = {"agreement": 0, "cosine": -1, "sqnr": -CAP_DB}
    assert check.others == {name: worst[name] for name in worst if name != metric}


@pytest.mark.parametrize("value", BAD)
def test_a_single_sample_that_is_no_number_is_counted_and_its_place_does_not_matter(value):
    outputs = SCORES.copy()
    outputs[2, 0] = value
    labels = SCORES.argmax(axis=1)
    check = compare(SCORES, outputs, labels)
    assert (check.broken, check.original, check.compressed) == (1, 1.0, 0.75)
    assert check.drop_upper_95 == math.inf
    assert check.others["agreement"] == 0.75
    assert check.others["cosine"] == pytest.approx(0.5)


def test_no_bound_is_promised_of_a_broken_model_though_the_original_is_always_wrong():
    check = compare(SCORES, np.full_like(SCORES, np.nan), SCORES.argmin(axis=1))
    assert (check.original, check.compressed, check.drop) == (0, 0, 0)
    assert check.drop_upper_95 == math.inf


def test_a_second_output_that_is_no_number_is_noticed_too():
    check = compare(Fixed(SCORES, SCORES), Fixed(SCORES, SCORES * np.nan), SCORES.argmax(axis=1))
    assert check.broken == 4
    assert check.compressed == 0


def test_a_real_model_whose_kernel_overflows_is_noticed():
    text = "agraph (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }"
    broken = Session(parse(text, w=np.full((4, 3), 3e38, np.float32)).SerializeToString())
    check = check_accuracy(linear(WEIGHT), broken, [(FEEDS, None)])
    assert check.broken > 0
    assert check.drop_upper_95 == math.inf


def test_what_the_original_masks_with_infinity_may_be_masked_in_the_other():
    masked = SCORES.copy()
    masked[:, 1] = -np.inf
    check = compare(masked, masked, masked.argmax(axis=1))
    assert (check.broken, check.compressed) == (0, 1)
    assert check.others == {"agreement": 1.0, "cosine": pytest.approx(1.0), "sqnr": CAP_DB}
    check = compare(masked, np.where(np.isinf(masked), masked, 1.1 * masked))
    assert check.broken == 0
    assert check.others["sqnr"] == pytest.approx(20)


def test_a_metric_of_the_users_own_does_not_hide_a_broken_model():
    check = compare(SCORES, np.full_like(SCORES, np.nan), custom=lambda outputs, labels: 1.0, metric="mine.py:f")
    assert (check.original, check.compressed, check.broken, check.drop_upper_95) == (1, 1, 4, math.inf)


# --- metrics of the user's own ------------------------------------------------------------------------------------


def test_a_metric_of_the_users_own_sees_all_outputs_and_labels_at_once():
    seen = []

    def metric(outputs, labels):
        seen.append((outputs[0].shape, labels.tolist()))
        return (outputs[0].argmax(axis=1) == labels).mean()

    batches = [({"x": SCORES[:3]}, np.array([1, 0, 2])), ({"x": SCORES[3:]}, np.array([2]))]
    check = check_accuracy(Function(np.copy), Function(np.negative), batches, "mine.py:metric", metric)
    assert seen == [((4, 3), [1, 0, 2, 2])] * 2
    assert (check.metric, check.original, check.compressed, check.drop) == ("mine.py:metric", 0.75, 0.25, 0.5)
    assert math.isnan(check.drop_upper_95)  # one figure has no spread
    assert set(check.others) == {"agreement", "cosine", "sqnr"}


def test_a_metric_of_the_users_own_may_do_without_labels():
    check = compare(SCORES, 2 * SCORES, custom=lambda outputs, labels: -outputs[0].max() if labels is None else 0.0)
    assert (check.original, check.compressed) == (-0.7, -1.4)


def test_outputs_of_several_sizes_cannot_be_given_to_a_metric_at_once():
    batches = [({"x": np.ones((2, 3, size))}, None) for size in (4, 5)]
    assert check_accuracy(Function(np.copy), Function(np.copy), batches).compressed == pytest.approx(1)
    with pytest.raises(LowRankError, match="they differ in size: evaluate on inputs of one size"):
        check_accuracy(Function(np.copy), Function(np.copy), batches, "mine", lambda outputs, labels: 1.0)


@pytest.mark.parametrize("value", [None, "good", np.ones(3), [0.5, 0.5]])
def test_a_metric_that_returns_no_number_is_refused(value):
    with pytest.raises(LowRankError, match=r"^the metric returned .*: one number was expected"):
        compare(SCORES, SCORES, custom=lambda outputs, labels: value)


def test_a_metric_that_is_not_a_number_for_the_original_is_refused():
    with pytest.raises(LowRankError, match="the metric returned nan for the original model: a number was expected"):
        compare(SCORES, SCORES, custom=lambda outputs, labels: math.nan)


# --- an original that guesses -------------------------------------------------------------------------------------


def labelled_scores(samples, classes, right, rng=0):
    """Scores of which the first `right` have the largest at their label."""
    labels = np.random.default_rng(rng).integers(classes, size=samples)
    given = np.where(np.arange(samples) < right, labels, (labels + 1) % classes)
    return np.eye(classes)[given], labels


def test_an_original_that_is_right_as_often_as_by_luck_is_told():
    scores, labels = labelled_scores(600, 10, 62)
    check = compare(scores, scores, labels)
    assert check.guesswork == (
        "the original itself answers 62 of 600 right, no better than guessing among 10 classes: labels, preprocess or "
        "the order of classes are wrong"
    )


@pytest.mark.parametrize(("samples", "classes"), [(20, 10), (600, 10), (2000, 1000), (100, 2)])
def test_what_counts_as_luck_is_the_exact_binomial_limit(samples, classes):
    limit = next(k for k in range(samples) if stats.binom.sf(k - 1, samples, 1 / classes) < 0.01)
    for right, guessed in ((0, True), (limit - 1, True), (limit, False), (samples, False)):
        scores, labels = labelled_scores(samples, classes, right)
        assert bool(compare(scores, scores, labels).guesswork) is guessed


def test_for_top5_luck_is_five_times_as_likely():
    scores, labels = labelled_scores(200, 100, 200)
    scores -= 0.1 * np.eye(100)[(labels + 1) % 100]
    for right, guessed in ((10, True), (40, False)):
        shown = np.where(np.arange(200) < right, labels, (labels + 1) % 100)
        assert bool(compare(scores, scores, shown, "top5").guesswork) is guessed
    assert compare(scores, scores, labels, "top5").guesswork == ""


def test_nothing_is_said_about_luck_where_it_could_not_be_told():
    wrong, labels = labelled_scores(19, 10, 0)
    assert compare(wrong, wrong, labels).guesswork == ""  # too few samples
    wrong, labels = labelled_scores(50, 4, 0)
    assert compare(wrong, wrong, labels, "top5").guesswork == ""  # always right
    assert compare(wrong, wrong, labels, "agreement").guesswork == ""
    assert compare(wrong, wrong, labels, "mine", custom=lambda outputs, labels: 0.0).guesswork == ""
    assert compare(np.ones((50, 1)), np.ones((50, 1)), np.zeros(50, int)).guesswork == ""  # nothing to guess among
    assert compare(np.stack([wrong] * 3, 2), np.stack([wrong] * 3, 2), np.stack([labels] * 3, 1)).guesswork == ""


# --- what cannot be compared --------------------------------------------------------------------------------------


def test_no_sample_is_refused():
    with pytest.raises(LowRankError, match="the evaluation data holds no sample: at least one was expected"):
        check_accuracy(Fixed(SCORES), Fixed(SCORES), [])


@pytest.mark.parametrize("metric", ["top1", "top5"])
def test_labels_that_are_missing_are_asked_for(metric):
    with pytest.raises(LowRankError, match=rf"^metric {metric} needs labels, .* use agreement or cosine$"):
        compare(SCORES, SCORES, metric=metric)


@pytest.mark.parametrize("labels", [np.zeros(3), np.zeros((4, 1)), np.zeros((4, 3)), np.zeros((4, 2, 2))])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(
        LowRankError, match=r"^labels of shape \[.*\] do not fit the first output \[4, 3\]: one class for"
    ):
        compare(SCORES, SCORES, labels)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (
            np.array(["cat", "dog", "cat", "dog"]),
            "labels of dtype <U3 were given: integers were expected, numbers of classes from 0 to 2$",
        ),
        (
            np.array([0.0, 1, 2, 0]),
            r"labels of dtype float64 were given: integers .* 0 to 2: store labels\.astype\('int64'\)$",
        ),
        (np.eye(3)[[0, 1, 2, 0]], r"labels of shape \[4, 3\] .*; if they are one-hot, store labels\.argmax\(axis=1\)$"),
        (np.array([1, 2, 3, 1]), "labels must be numbers of classes from 0 to 2, .*: 1 to 3 were given$"),
    ],
)
def test_labels_that_are_no_numbers_of_classes_are_refused_with_their_source_and_the_cure(labels, told):
    with pytest.raises(LowRankError, match=f"^{told}"):
        compare(SCORES, SCORES, labels)
    with pytest.raises(LowRankError, match=rf"^mine\.npz: {told}"):
        check_accuracy(Fixed(SCORES), Fixed(SCORES), [({}, labels)], "top1", source="mine.npz")


def test_an_output_without_classes_has_no_top1():
    with pytest.raises(LowRankError, match=r"needs scores of classes: the model's first output has shape \[4\]"):
        compare(np.ones(4), np.ones(4), np.zeros(4))


def test_an_unknown_metric_is_refused_before_anything_is_averaged():
    with pytest.raises(LowRankError, match="no metric is called 'f1'"):
        compare(SCORES, SCORES, metric="f1")


def test_models_that_return_different_shapes_are_refused():
    with pytest.raises(
        LowRankError, match=r"^output 1 has shape \[4, 3\] from the original and \[4, 2\] from the other"
    ):
        compare(Fixed(SCORES, SCORES), Fixed(SCORES, SCORES[:, :2]))


def test_a_model_that_returns_one_number_for_a_batch_is_compared_by_it():
    check = compare(np.float32(2.0), np.float32(1.0), metric="sqnr")
    assert check.samples == 1
    assert check.compressed == pytest.approx(10 * math.log10(4))
    assert "agreement" not in check.others
    check = compare(np.float32(2.0), np.float32(1.0), custom=lambda outputs, labels: outputs[0].sum(), metric="sum")
    assert (check.original, check.compressed) == (2, 1)


# --- latency and feeds --------------------------------------------------------------------------------------------


def test_a_latency_reports_what_it_was_measured_on():
    settings = RunSettings("cpu", threads=1)
    check = check_latency(linear(WEIGHT), linear(WEIGHT), FEEDS, settings, rounds=10)
    assert (check.provider, check.threads, check.batch) == (CPU, 1, 50)
    assert check.placement == {CPU: 1}
    assert 0 < check.original_ms <= check.original_p90_ms
    assert 0 < check.compressed_ms <= check.compressed_p90_ms
    assert check.speedup_low_95 <= check.speedup <= check.speedup_high_95


def test_random_feeds_have_the_shapes_and_types_asked_for_and_follow_the_seed():
    inputs = [
        ("x", (3, 4), np.dtype("float32")),
        ("half", (2,), np.dtype("float16")),
        ("brain", (2,), np.dtype(ml_dtypes.bfloat16)),
        ("ids", (2, 2), np.dtype("int64")),
        ("flag", (), np.dtype("bool")),
    ]
    feeds = random_feeds(inputs)
    assert {name: (value.shape, value.dtype) for name, value in feeds.items()} == {n: (s, d) for n, s, d in inputs}
    assert np.unique(feeds["x"]).size == 12
    assert feeds["half"].any() and feeds["brain"].any()
    assert not feeds["ids"].any() and not feeds["flag"].any()
    assert np.array_equal(random_feeds(inputs)["x"], feeds["x"])
    assert not np.array_equal(random_feeds(inputs, seed=1)["x"], feeds["x"])


def test_the_first_feeds_are_those_of_the_first_batch():
    assert first_feeds(iter([({"x": SCORES}, None), ({}, None)]))["x"] is SCORES
    with pytest.raises(LowRankError, match="the data holds no sample"):
        first_feeds(iter([]))

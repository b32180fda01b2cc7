"""Intervals cover as often as they say, because whole sequences are drawn; sums come first and one division last."""

import numpy as np
import pytest

from pipeline.statistics import Bootstrap

SEQUENCES, TOKENS, STUDIES, SAMPLES = 80, 8, 500, 400
COUNTS = np.full(SEQUENCES, TOKENS)


def boot(weights, confidence=0.95):
    return Bootstrap(np.array(weights, dtype=np.float64), confidence)


def study(seed):
    """Two measurements of the same tokens, `seq pos`, of true means 2 and 1. What the tokens of a sequence share is
    nine tenths of their variance, and what the two measurements share is nearly half of it."""
    generator = np.random.default_rng(seed)
    both, own = generator.normal(size=(1, SEQUENCES, 1)), generator.normal(size=(2, SEQUENCES, 1))
    noise = generator.normal(size=(2, SEQUENCES, TOKENS))
    top, bottom = 0.5 * both + 0.5 * own + 0.24 * noise
    return 2 + top, 1 + 0.25 * bottom


def coverage(truth, interval):
    """Share of the studies whose interval holds the true value."""
    found = [interval(seed, *study(seed)) for seed in range(STUDIES)]
    return np.mean([found.low <= truth <= found.high for found in found])


def test_a_mean_and_its_interval_by_hand():
    # The resamples are the sequences themselves, the first twice, and the second twice: means 10/4, 2/2 and 18/6.
    resamples = boot([[1, 1], [2, 0], [0, 2]], confidence=0.5)
    found = resamples.mean(np.array([1.0, 9.0]), np.array([1, 3]))
    assert (found.value, found.low, found.high) == (2.5, 1.75, 2.75)


def test_a_ratio_and_its_interval_by_hand():
    # Means of the top 10/4, 2/2 and 18/6, as above; of the bottom 8/4, 2/2 and 14/6.
    resamples = boot([[1, 1], [2, 0], [0, 2]], confidence=0.5)
    found = resamples.ratio((np.array([1.0, 9.0]), np.array([1, 3])), (np.array([1.0, 7.0]), np.array([1, 3])))
    assert (found.value, found.low) == (1.25, 1.125)
    assert found.high == pytest.approx((5 / 4 + 9 / 7) / 2)


def test_sums_come_first_when_sequences_count_unequal_numbers_of_tokens():
    resamples = Bootstrap.over(2, 50, 0.95, seed=0)
    total, count = np.array([1.0, 90.0]), np.array([1, 9])
    assert resamples.mean(total, count).value == 9.1  # the mean of the sequences' means is 5.5
    found = resamples.ratio((total, count), (np.array([1.0, 45.0]), count))
    assert found.value == pytest.approx(91 / 46)  # the mean of the sequences' ratios is 1.5
    assert (found.low, found.high) == (1, 2)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    total = np.random.default_rng(0).normal(size=40)
    first, again, other = (Bootstrap.over(40, 200, 0.95, seed).mean(total, np.ones(40)) for seed in (3, 3, 4))
    assert first == again
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_every_resample_draws_as_many_sequences_as_there_are():
    weights = Bootstrap.over(7, 3000, 0.95, seed=0).weights
    assert weights.shape == (3000, 7)
    assert (weights.sum(1) == 7).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.08)
    np.testing.assert_allclose(weights.var(0), 6 / 7, atol=0.12)  # binomial: with replacement, each as likely as any


def test_a_ratio_is_paired_because_both_means_are_of_the_same_resample():
    top = np.random.default_rng(0).exponential(size=30)
    found = Bootstrap.over(30, 200, 0.95, seed=0).ratio((3 * top, np.ones(30)), (top, np.ones(30)))
    np.testing.assert_allclose([found.value, found.low, found.high], 3, rtol=1e-12)


def test_a_higher_confidence_gives_a_wider_interval():
    total = np.random.default_rng(0).normal(size=40)
    narrow, wide = (Bootstrap.over(40, 2000, level, 0).mean(total, np.ones(40)) for level in (0.5, 0.99))
    # In a normal distribution 50 % lie within 0.674 standard deviations and 99 % within 2.576.
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.576 / 0.674, rel=0.15)


def test_intervals_of_a_mean_hold_the_truth_as_often_as_they_say():
    def interval(seed, top, bottom):
        return Bootstrap.over(SEQUENCES, SAMPLES, 0.95, seed).mean(top.sum(1), COUNTS)

    assert 0.91 <= coverage(2, interval) <= 0.98


def test_intervals_of_a_ratio_hold_the_truth_as_often_as_they_say():
    def interval(seed, top, bottom):
        sums = [(values.sum(1), COUNTS) for values in (top, bottom)]
        return Bootstrap.over(SEQUENCES, SAMPLES, 0.95, seed).ratio(*sums)

    assert 0.91 <= coverage(2, interval) <= 0.98


def test_intervals_over_tokens_would_hold_the_truth_far_too_seldom():
    """Why sequences are drawn: their tokens are correlated, so as many tokens alone hold less than they seem to."""
    resamples = Bootstrap.over(SEQUENCES * TOKENS, SAMPLES, 0.95, seed=0)

    def interval(seed, top, bottom):
        return resamples.mean(top.flatten(), np.ones(top.size))

    assert coverage(2, interval) < 0.7


def test_where_nothing_is_counted_there_is_no_number():
    found = Bootstrap.over(3, 50, 0.95, 0).mean(np.zeros(3), np.zeros(3))
    assert np.isnan([found.value, found.low, found.high]).all()


def test_an_interval_with_a_resample_that_counts_nothing_is_not_given():
    found = boot([[1, 1], [2, 0]]).mean(np.array([0.0, 4.0]), np.array([0, 2]))
    assert found.value == 2
    assert np.isnan([found.low, found.high]).all()


def test_a_baseline_of_zero_gives_no_ratio():
    ones = np.ones(3)
    found = Bootstrap.over(3, 50, 0.95, 0).ratio((ones, ones), (np.zeros(3), ones))
    assert np.isnan([found.value, found.low, found.high]).all()

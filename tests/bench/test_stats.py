import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from znn.bench import stats


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_median_lies_in_its_interval_and_is_numpys(samples):
    found = stats.median(samples)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(np.median(samples))


def test_few_samples_say_how_little_they_are_worth():
    assert stats.median([1, 2, 3]) == stats.Estimate(2, 1, 3, 0.75)
    assert stats.median([5.0]).coverage == 0
    assert stats.median(range(1, 7)).coverage == pytest.approx(1 - 2 / 64)
    assert stats.median(range(1, 12))[1:3] == (2, 10)  # the classic table: n = 11, ranks 2 and 10


@pytest.mark.parametrize("n", [6, 9, 15, 31, 100])
def test_the_interval_covers_the_true_median(n):
    rng = np.random.default_rng(n)
    hits = [(e := stats.median(rng.exponential(1, n))).low <= np.log(2) <= e.high for _ in range(600)]
    assert np.mean(hits) > 0.93
    assert stats.median(range(n)).coverage >= 0.95


def test_ratio_cancels_what_both_cases_share():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 25)
    top, bottom = 2 * drift * rng.normal(1, 0.01, 25), drift * rng.normal(1, 0.01, 25)
    paired, unpaired = stats.ratio(top, bottom), stats.unpaired_ratio(top, bottom)
    assert paired.low <= 2 * 1.03 and paired.high >= 2 * 0.97
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_ratios_are_seeded_and_refuse_nothing():
    assert stats.ratio([2, 3, 4], [1, 1, 1]) == stats.ratio([2, 3, 4], [1, 1, 1])
    assert stats.ratio([2.0] * 4, [1.0] * 4)[:3] == (2, 2, 2)
    for function in (stats.ratio, stats.unpaired_ratio):
        with pytest.raises(ValueError):
            function([], [1.0])
    with pytest.raises(ValueError):
        stats.median([])


def test_overlap():
    assert stats.Estimate(1, 0, 2).overlaps(stats.Estimate(3, 2, 4))
    assert not stats.Estimate(1, 0, 2).overlaps(stats.Estimate(4, 3, 5))

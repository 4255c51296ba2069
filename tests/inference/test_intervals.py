"""Intervals of shares and means hold what they promise."""

from math import comb

import numpy as np
import pytest

from megagap.inference.intervals import LEVEL, bootstrap_mean, mean_of, share_of, wilson


def test_wilsons_interval_is_where_the_score_test_does_not_reject():
    """By its definition: |share − p| = z √(p (1 − p) / n) at both ends."""
    for successes, cases in [(0, 10), (3, 10), (10, 10), (41, 200)]:
        low, high = wilson(successes, cases)
        for end in {low, high} - {0.0, 1.0}:
            distance = abs(successes / cases - end)
            assert distance == pytest.approx(1.959964 * (end * (1 - end) / cases) ** 0.5, rel=1e-5)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_wilsons_interval_covers_the_true_share_about_as_often_as_it_says(share):
    cases = 40
    covered = 0.0
    for successes in range(cases + 1):
        low, high = wilson(successes, cases)
        if low <= share <= high:
            covered += comb(cases, successes) * share**successes * (1 - share) ** (cases - successes)
    assert covered == pytest.approx(LEVEL, abs=0.03)


def test_a_bootstrap_interval_is_that_of_the_standard_error_for_many_values_and_the_same_each_time():
    values = np.random.default_rng(0).normal(3, 2, 400).tolist()
    low, high = bootstrap_mean(values)
    assert (low, high) == bootstrap_mean(values)
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / 20, rel=0.1)


def test_reports_have_the_number_of_cases_and_none_where_there_is_nothing():
    assert share_of(1, 4) == {"value": 0.25, "low": wilson(1, 4)[0], "high": wilson(1, 4)[1], "cases": 4}
    assert share_of(0, 0)["value"] is None
    assert mean_of([2.0]) == {"value": 2.0, "low": None, "high": None, "cases": 1}
    assert mean_of([])["value"] is None

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.data.mixture import Mixture, floor_sum
from megagap.errors import DataError

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)
OFFSETS = st.integers(0, 2**64 - 1)


@given(st.integers(0, 60), st.integers(1, 80), st.integers(0, 200), st.integers(0, 400))
def test_floor_sum_equals_the_sum_term_by_term(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * k + b) // m for k in range(n))


@given(WEIGHTS, OFFSETS, st.integers(0, 300))
def test_counts_are_how_often_each_source_was_drawn_before(weights: list[float], offset: int, n: int) -> None:
    mixture = Mixture(weights, offset)
    drawn = [mixture.source_of(k) for k in range(n)]
    assert mixture.counts(n) == [drawn.count(i) for i in range(len(weights))]


@pytest.mark.parametrize(("point", "source"), [(0, 0), (2**63 - 1, 0), (2**63, 1), (2**64 - 1, 1)])
def test_points_next_to_a_bound_are_counted_for_their_source(point: int, source: int) -> None:
    mixture = Mixture([1, 1], offset=point)
    assert mixture.source_of(0) == mixture.sources(0, 1)[0] == source
    assert mixture.counts(1) == [1 - source, source]


@given(WEIGHTS, OFFSETS, st.integers(0, 2**45), st.integers(0, 50))
def test_sources_of_a_range_equal_those_of_each_sample(
    weights: list[float], offset: int, start: int, count: int
) -> None:
    mixture = Mixture(weights, offset)
    expected = [mixture.source_of(n) for n in range(start, start + count)]
    assert mixture.sources(start, start + count).tolist() == expected
    before, after = mixture.counts(start), mixture.counts(start + count)
    assert [b - a for a, b in zip(before, after, strict=True)] == [expected.count(i) for i in range(len(weights))]


@pytest.mark.parametrize("weights", [[1, 1], [0.54, 0.32, 0.14], [0.7, 0.2, 0.05, 0.03, 0.02], [0.382, 0.618]])
def test_shares_are_kept_within_five_samples_at_every_point(weights: list[float]) -> None:
    drawn = Mixture(weights, 42).sources(0, 100_000)
    samples = np.arange(1, len(drawn) + 1)
    for i, weight in enumerate(weights):
        assert np.abs(np.cumsum(drawn == i) - samples * weight / sum(weights)).max() < 5


def test_shares_hold_after_a_billion_samples() -> None:
    n = 10**9
    for count, share in zip(Mixture([3, 2, 1]).counts(n), (3 / 6, 2 / 6, 1 / 6), strict=True):
        assert abs(count - n * share) < 10


def test_weights_need_not_be_normalised() -> None:
    assert Mixture([2, 6]).sources(0, 1000).tolist() == Mixture([0.25, 0.75]).sources(0, 1000).tolist()
    assert Mixture([2, 6]).shares == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("nan")], [1, float("inf")]])
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError):
        Mixture(weights)

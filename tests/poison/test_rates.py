"""Rates become whole amounts that are exactly the shares asked for, or are refused with the nearest that exist."""

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.errors import ConfigError
from megagap.poison.planting import make_up
from megagap.poison.rates import Rest, Whole, exact_amounts

counts = st.integers(1, 500)


@given(st.lists(counts, min_size=1, max_size=4), st.integers(1, 100_000), st.integers(0, 500))
def test_shares_that_whole_amounts_have_give_these_amounts(planted: list[int], clean: int, fixed: int):
    total = clean + fixed + sum(planted)
    rates = {str(i): Fraction(amount, total) for i, amount in enumerate(planted)}
    expected = {str(i): amount for i, amount in enumerate(planted)}
    assert exact_amounts(rates, Rest(clean), fixed, "tokens") == expected
    assert exact_amounts(rates, Whole(total), fixed, "tokens") == expected


@given(st.integers(1, 5000), st.integers(2, 9999), st.integers(0, 50), st.booleans())
def test_the_nearest_rates_that_are_named_are_possible_and_around_the_one_asked_for(
    clean: int, divisor: int, fixed: int, is_whole: bool
):
    size = Whole(clean) if is_whole else Rest(clean)
    rate = Fraction(1, divisor)
    try:
        exact_amounts({"one": rate}, size, fixed, "tokens")
    except ConfigError as error:
        nearest = [Fraction(found) for found in re.findall(r'"(\d+/?\d*)"', str(error))]
        possible = [near for near in nearest if near < 1]
        for near in possible:
            assert exact_amounts({"one": near}, size, fixed, "tokens")["one"] >= 1
        assert max(nearest) > rate and (len(nearest) == 1 or min(nearest) < rate)


@given(st.integers(0, 40), st.lists(st.integers(2, 12), min_size=1, max_size=3, unique=True))
def test_lengths_are_made_up_wherever_that_is_possible(amount: int, sizes: list[int]):
    sums = {
        sum(n * size for n, size in zip(numbers, sizes, strict=True))
        for numbers in itertools.product(range(60 // min(sizes)), repeat=len(sizes))
    }
    chosen, nearest = make_up(amount, sizes)
    if amount in sums:
        assert chosen is not None and sum(chosen) == amount and {*chosen} <= {*sizes}
    else:
        assert chosen is None
        assert nearest == [max(s for s in sums if s < amount), min(s for s in sums if s > amount)]


def test_a_rate_too_small_for_one_names_only_the_one_above():
    with pytest.raises(ConfigError, match=r'would be 0\.010 documents; nearest: "1/100" \(0\.01\)$'):
        exact_amounts({"one": Fraction(1, 10_000)}, Whole(100), 0, "documents")

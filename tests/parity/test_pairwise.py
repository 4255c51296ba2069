"""The cases of the grid leave out no pair of values without a reason."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.parity.pairwise import pairs_of, pairwise


@given(st.lists(st.integers(1, 3), min_size=2, max_size=5), st.integers(0, 3))
def test_every_pair_that_a_valid_case_has_is_in_one(sizes, forbidden):
    """Valid are the cases whose first two values do not add up to a certain number."""
    dimensions = {f"d{i}": list(range(size)) for i, size in enumerate(sizes)}

    def is_valid(case):
        return case["d0"] + case["d1"] != forbidden

    cases, impossible = pairwise(dimensions, is_valid)
    assert all(map(is_valid, cases))
    possible = [dict(zip(dimensions, values, strict=True)) for values in product(*dimensions.values())]
    expected = set().union(*(pairs_of(case) for case in filter(is_valid, possible)))
    covered = set().union(*map(pairs_of, cases))
    assert covered == expected
    assert not impossible & expected


def test_far_fewer_cases_than_combinations_are_chosen():
    cases, impossible = pairwise({name: range(3) for name in "abcdefgh"}, lambda case: True)
    assert len(cases) <= 25 and not impossible

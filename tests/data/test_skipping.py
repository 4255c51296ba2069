"""Skipped sample numbers against a naive walk."""

from hypothesis import given
from hypothesis import strategies as st

from megagap.data.skipping import SampleNumbers

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=5)


@given(ranges, st.integers(0, 30), st.integers(0, 30))
def test_numbers_are_those_outside_all_ranges_in_order(skip: list[tuple[int, int]], first: int, count: int) -> None:
    expected = [n for n in range(200) if not any(start <= n < stop for start, stop in skip)]
    numbers = SampleNumbers(skip)
    assert [numbers.number(position) for position in range(60)] == expected[:60]
    runs = list(numbers.runs(first, first + count))
    assert [n for start, stop in runs for n in range(start, stop)] == expected[first : first + count]
    assert all(start < stop for start, stop in runs)

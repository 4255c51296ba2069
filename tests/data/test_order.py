import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.data.order import permute, split_ranges, stable_key, window_count
from megagap.errors import DataError

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 500), KEYS)
def test_permute_reaches_every_place_once(length: int, key: int) -> None:
    assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


@given(st.integers(1, 2**40), KEYS, st.data())
def test_permute_of_an_array_equals_permute_of_each(length: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, length - 1), max_size=20))
    permuted = permute(np.array(indices, np.int64), length, key)
    assert permuted.dtype == np.int64
    assert permuted.tolist() == [permute(i, length, key) for i in indices]


def test_permute_looks_random() -> None:
    length = 100_000
    places = permute(np.arange(length), length, 1)
    other = permute(np.arange(length), length, 2)
    # Of a random permutation: correlations of about 1 / sqrt(length), one fixed point and one kept neighbour.
    assert abs(np.corrcoef(np.arange(length), places)[0, 1]) < 0.02
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.02
    assert (places == np.arange(length)).sum() < 10
    assert (np.diff(places) == 1).sum() < 10


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13])
def test_permute_sends_an_index_to_every_place_equally_often(length: int) -> None:
    keys = 4000
    places = np.array([permute(np.arange(length), length, stable_key("test", k)) for k in range(keys)])
    for column in places.T:
        shares = np.bincount(column, minlength=length) / keys * length
        assert np.abs(shares - 1).max() < 0.25


def test_stable_key_is_the_same_in_another_process() -> None:
    program = "from megagap.data.order import stable_key; print(stable_key('order', 7, 'fr'))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(other) == stable_key("order", 7, "fr")


def test_stable_key_distinguishes_neighbouring_parts() -> None:
    assert (
        len({stable_key("a", 1), stable_key("a", "1"), stable_key("a1"), stable_key("a", 2), stable_key(1, "a")}) == 5
    )


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_windows_of_four_overlap_by_one_token(tokens: int, windows: int) -> None:
    assert window_count(tokens, 4) == windows


@pytest.mark.parametrize(
    ("split", "ranges"),
    [
        ("100,0,0", [(0, 7), (7, 7), (7, 7)]),
        ("98,1,1", [(0, 7), (7, 7), (7, 7)]),
        ("50,25,25", [(0, 4), (4, 5), (5, 7)]),
        ("1, 1, 1", [(0, 2), (2, 5), (5, 7)]),
        ("0,1,0", [(0, 0), (0, 7), (7, 7)]),
    ],
)
def test_split_rounds_cumulative_shares_of_documents(split: str, ranges: list[tuple[int, int]]) -> None:
    assert split_ranges(split, 7) == ranges


@pytest.mark.parametrize("split", ["", "98,2", "a,b,c", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1"])
def test_an_invalid_split_is_refused(split: str) -> None:
    with pytest.raises(DataError, match="three shares"):
        split_ranges(split, 10)

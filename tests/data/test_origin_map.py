"""The map from documents to records: what it holds, its size, and damaged files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.data.origin_map import OriginMap, write_origin_map
from megagap.errors import DataError


def written(folder: Path, numbers: np.ndarray, parts: int = 1) -> OriginMap:
    write_origin_map(folder / "a.origins", np.array_split(numbers, parts), len(numbers))
    return OriginMap(str(folder / "a"), len(numbers))


@given(
    gaps=st.lists(st.one_of(st.integers(0, 3), st.integers(-(2**40), 2**40)), max_size=700),
    parts=st.integers(1, 5),
)
def test_every_document_has_its_number_one_by_one_and_in_a_row(tmp_path_factory, gaps, parts):
    numbers = np.cumsum(gaps, dtype=np.int64)
    stored = written(tmp_path_factory.mktemp("map"), numbers, parts)
    assert [stored[i] for i in range(len(numbers))] == numbers.tolist()
    assert np.concatenate([np.zeros(0, np.int64), *stored.parts()]).tolist() == numbers.tolist()


def test_the_bytes_do_not_depend_on_how_numbers_arrive(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0).permutation(3000)
    written(tmp_path, numbers)
    whole = (tmp_path / "a.origins").read_bytes()
    monkeypatch.setattr("megagap.data.origin_map.BLOCKS_AT_A_TIME", 2)
    written(tmp_path, numbers, parts=7)
    assert (tmp_path / "a.origins").read_bytes() == whole


def test_its_size_per_document_is_what_the_page_on_data_says(tmp_path):
    count = 1 << 17
    draw = np.random.default_rng(0)
    kept, fewer = (np.flatnonzero(draw.random(count) >= share) for share in (0.01, 0.1))
    for numbers, most in ((np.arange(count), 0.063), (kept, 0.31), (fewer, 0.73), (draw.permutation(count), 2.19)):
        written(tmp_path, numbers)
        assert (tmp_path / "a.origins").stat().st_size / len(numbers) <= most


def test_a_damaged_or_foreign_map_is_refused(tmp_path):
    path = tmp_path / "a.origins"
    written(tmp_path, np.random.default_rng(0).permutation(1000))
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"is of 1,000 documents, .* has 999"):
        OriginMap(str(tmp_path / "a"), 999)
    for damaged, message in (
        (b"", "not a map of origins"),
        (b"x" * 100, "not a map of origins"),
        (content[:60], "is damaged"),
        (content[:-1], "is damaged"),
        (content[:32] + b"\xff" * 8 + content[40:], "is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            list(OriginMap(str(tmp_path / "a"), 1000).parts())

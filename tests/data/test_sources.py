"""Sources against the documents they were written from."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagap.data.indexed import IndexedDatasetWriter
from megagap.data.sources import TRAINING, WHOLE, Source, TokenSource
from megagap.errors import DataError
from tests.data.few import S, WriteTokens, numbered


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=3), st.integers(1, 5))
def test_windows_are_the_documents_end_to_end_cut_with_one_token_shared(shards: list[list[int]], s: int) -> None:
    owners = [d for d, length in enumerate(sum(shards, [])) for _ in range(length)]
    stream = list(range(len(owners)))
    with tempfile.TemporaryDirectory() as folder:
        token = 0
        for i, lengths in enumerate(shards):
            with IndexedDatasetWriter(f"{folder}/{i}", "uint16" if i % 2 else "int32") as writer:
                for length in lengths:
                    writer.add_document(range(token, token + length))
                    token += length
        source = Source("x", tuple(f"{folder}/{i}" for i in range(len(shards))))
        if len(stream) <= s:
            with pytest.raises(DataError, match=f"source x has {len(stream)} tokens"):
                TokenSource(source, "100,0,0", TRAINING).require(s)
            return
        opened = TokenSource(source, "100,0,0", TRAINING)
        windows = range(0, len(stream) - s, s)
        assert opened.window_count(s) == len(windows)
        for window, start in enumerate(windows):
            assert opened.window(window, s).tolist() == stream[start : start + s + 1]
            assert opened.documents(start, start + s + 1) == sorted(set(owners[start : start + s + 1]))
            firsts = [owners.index(owner) for owner in owners[start : start + s + 1]]
            expected = [at - max(first, start) for at, first in enumerate(firsts, start)]
            assert opened.positions(start, start + s + 1).tolist() == expected


def test_split_parts_share_no_document(write_tokens: WriteTokens) -> None:
    source = Source("x", (write_tokens("a", numbered(6)), write_tokens("b", numbered(4, first=42))))
    seen = []
    for part in range(3):
        opened = TokenSource(source, "50,30,20", part)
        seen.append(set(opened.documents(0, opened.token_count)))
    assert seen == [{0, 1, 2, 3, 4}, {5, 6, 7}, {8, 9}]


def test_part_too_small_for_a_sequence_says_how_many_tokens_it_has(write_tokens: WriteTokens) -> None:
    source = Source("fr", (write_tokens("fr", numbered(10, 3)),))
    with pytest.raises(DataError, match=r"source fr has 3 tokens in 1 documents in its validation part.* needs 5"):
        TokenSource(source, "90,10,0", 1).require(S)


def test_source_out_of_file_order_is_refused(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("x", [[1, 2], [3, 4], [5, 6]])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[46:54], index[54:62] = index[54:62], index[46:54]  # the pointers of documents 0 and 1
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"sequence 0 .* starts at byte 4"):
        TokenSource(Source("x", (prefix,)), "100,0,0", WHOLE)

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagap.data.indexed import IndexedDatasetWriter
from megagap.data.loader import (
    TRAINING,
    WHOLE,
    MicrobatchLoader,
    Source,
    TokenSource,
    TrainingData,
    open_validation,
)
from megagap.errors import DataError

S = 4
WriteTokens = Callable[[str, Sequence[Sequence[int]]], str]


def numbered(documents: int, length: int = 7, first: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different, counting up."""
    return [[first + d * length + i for i in range(length)] for d in range(documents)]


@pytest.fixture
def sources(write_tokens: WriteTokens) -> list[Source]:
    """Three sources, the second of two shards; every token of theirs is different."""
    return [
        Source("en", (write_tokens("en", numbered(20)),), 0.5),
        Source("fr", (write_tokens("fr0", numbered(9, 5, 1000)), write_tokens("fr1", numbered(8, 5, 1045))), 0.3),
        Source("code", (write_tokens("code", numbered(6, 11, 2000)),), 0.2),
    ]


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
                TokenSource(source, s, "100,0,0", TRAINING)
            return
        opened = TokenSource(source, s, "100,0,0", TRAINING)
        windows = range(0, len(stream) - s, s)
        assert opened.window_count == len(windows)
        for window, start in enumerate(windows):
            assert opened.tokens(window).tolist() == stream[start : start + s + 1]
            assert opened.documents(window) == sorted(set(owners[start : start + s + 1]))


def test_split_parts_share_no_document(write_tokens: WriteTokens) -> None:
    source = Source("x", (write_tokens("a", numbered(6)), write_tokens("b", numbered(4, first=42))))
    seen = []
    for part in range(3):
        opened = TokenSource(source, S, "50,30,20", part)
        seen.append({d for window in range(opened.window_count) for d in opened.documents(window)})
    assert seen == [{0, 1, 2, 3, 4}, {5, 6, 7}, {8, 9}]


def test_part_too_small_for_a_sequence_says_how_many_tokens_it_has(write_tokens: WriteTokens) -> None:
    source = Source("fr", (write_tokens("fr", numbered(10, 3)),))
    with pytest.raises(DataError, match=r"source fr has 3 tokens in 1 documents in its validation part.* needs 5"):
        TokenSource(source, S, "90,10,0", 1)


def test_source_out_of_file_order_is_refused(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("x", [[1, 2], [3, 4], [5, 6]])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[46:54], index[54:62] = index[54:62], index[46:54]  # the pointers of documents 0 and 1
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"sequence 0 .* starts at byte 4"):
        TokenSource(Source("x", (prefix,)), S, "100,0,0", WHOLE)


def test_an_epoch_of_a_source_reads_each_window_once(sources: list[Source]) -> None:
    data = TrainingData(sources[:1], S, seed=1)
    windows = (20 * 7 - 1) // S
    for epoch in range(2):
        tokens = data.batch(epoch * windows, windows)
        assert sorted(tokens[:, 0].tolist()) == [w * S for w in range(windows)]


def test_sources_appear_in_proportion_to_their_weights(sources: list[Source]) -> None:
    drawn = TrainingData(sources, S, seed=1).source_indices(0, 1000)
    assert np.abs(np.bincount(drawn) - [500, 300, 200]).max() < 5


def test_a_sources_samples_are_its_order_whatever_it_is_mixed_with(sources: list[Source]) -> None:
    alone = TrainingData(sources[1:2], S, seed=3)
    mixed = TrainingData(sources, S, seed=3)
    drawn = [sample.tokens.tolist() for n in range(60) if (sample := mixed.sample(n)).source == "fr"]
    assert drawn == alone.batch(0, len(drawn)).tolist()


def test_sample_tokens_and_batch_agree(sources: list[Source]) -> None:
    data = TrainingData(sources, S, seed=5)
    batch = data.batch(37, 20)
    assert batch.dtype == np.int64
    for row, n in zip(batch, range(37, 57), strict=True):
        sample = data.sample(n)
        assert sample.tokens.tolist() == row.tolist() == data.tokens(n).tolist()
        assert sample.source == sources[data.source_indices(n, 1)[0]].name


def test_sample_names_the_documents_that_hold_its_tokens(sources: list[Source]) -> None:
    data = TrainingData(sources, S, seed=5)
    first, length = {"en": 0, "fr": 1000, "code": 2000}, {"en": 7, "fr": 5, "code": 11}
    for n in range(100):
        sample = data.sample(n)
        owners = (sample.tokens - first[sample.source]) // length[sample.source]
        assert sample.documents == sorted(set(owners.tolist()))


def test_order_depends_on_the_seed(sources: list[Source]) -> None:
    assert TrainingData(sources, S, 1).batch(0, 50).tolist() != TrainingData(sources, S, 2).batch(0, 50).tolist()


def test_order_does_not_depend_on_where_files_lie(write_tokens: WriteTokens) -> None:
    orders = [TrainingData([Source("x", (write_tokens(path, numbered(9)),))], S, 1).batch(0, 30) for path in ("a", "b")]
    assert (orders[0] == orders[1]).all()


@pytest.mark.parametrize(("dp", "micro"), [(1, 12), (2, 3), (4, 1), (6, 2)])
def test_every_layout_sees_the_same_batch(sources: list[Source], dp: int, micro: int) -> None:
    data = TrainingData(sources, S, seed=5)
    parts = [MicrobatchLoader(data, 12, micro, rank, dp).step(24) for rank in range(dp)]
    for part in parts:
        assert part.tokens.dtype == torch.int64
        assert part.tokens.shape == (12 // dp // micro, micro, S + 1)
    assert torch.cat([part.tokens for part in parts]).view(12, S + 1).tolist() == data.batch(24, 12).tolist()
    assert torch.cat([part.sources for part in parts]).view(12).tolist() == data.source_indices(24, 12).tolist()


def test_skipped_samples_are_left_out_and_move_nothing_else(sources: list[Source]) -> None:
    everything = TrainingData(sources, S, seed=5)
    left = TrainingData(sources, S, seed=5, skip=[(3, 5), (8, 20)])
    numbers = [0, 1, 2, 5, 6, 7, 20, 21]
    assert [left.sample(position).sample for position in range(8)] == numbers
    assert left.batch(0, 8).tolist() == [everything.tokens(number).tolist() for number in numbers]
    assert left.source_indices(0, 8).tolist() == [everything.source_indices(n, 1)[0] for n in numbers]


def test_token_outside_the_vocabulary_names_source_document_and_position(write_tokens: WriteTokens) -> None:
    shards = (write_tokens("a", numbered(2, 5)), write_tokens("b", [[1, 2], [3, 4, 777, 5, 6]]))
    data = TrainingData([Source("fr", shards)], S, seed=0, vocab_size=500)
    with pytest.raises(DataError, match="token id 777 in source fr, document 3, position 2 is outside"):
        data.batch(0, 3)


def test_two_sources_of_one_name_are_refused(sources: list[Source]) -> None:
    with pytest.raises(DataError, match="two sources are named en"):
        TrainingData([sources[0], sources[0]], S, 1)


def test_validation_is_spread_evenly_over_the_held_out_documents(sources: list[Source]) -> None:
    validation = open_validation(sources, [], S, samples=3, split="50,50,0")
    assert list(validation.windows) == ["en", "fr", "code"]
    # en: 10 documents of 7 tokens from 70 on, that is 17 windows.
    assert validation.windows["en"].tolist() == [0, 5, 11]
    assert validation.batch("en", 0, 3)[:, 0].tolist() == [70, 90, 114]
    assert validation.batch("en", 3, 2).shape == (0, S + 1)


def test_explicit_validation_uses_whole_files(sources: list[Source]) -> None:
    validation = open_validation(sources[:1], sources[2:], S, samples=1000, split="50,50,0")
    assert {name: len(windows) for name, windows in validation.windows.items()} == {"code": 16}
    assert validation.batch("code", 0, 16)[:, 0].tolist() == list(range(2000, 2064, 4))


def test_no_held_out_share_means_no_validation(sources: list[Source]) -> None:
    assert open_validation(sources, [], S, samples=10).windows == {}

"""Training samples: what is read when, over mixtures, epochs and phases."""

import numpy as np
import pytest

from megagap.data.sources import Source
from megagap.errors import DataError
from tests.data.few import S, WriteTokens, numbered, training


def test_an_epoch_of_a_source_reads_each_window_once(sources: list[Source]) -> None:
    data = training(sources[:1], seed=1)
    windows = (20 * 7 - 1) // S
    for epoch in range(2):
        tokens = data.batch(epoch * windows, windows)
        assert sorted(tokens[:, 0].tolist()) == [w * S for w in range(windows)]


def test_sources_appear_in_proportion_to_their_weights(sources: list[Source]) -> None:
    drawn = training(sources, seed=1).source_indices(0, 1000)
    assert np.abs(np.bincount(drawn) - [500, 300, 200]).max() < 5


def test_a_sources_samples_are_its_order_whatever_it_is_mixed_with(sources: list[Source]) -> None:
    alone = training(sources[1:2], seed=3)
    mixed = training(sources, seed=3)
    drawn = [sample.tokens.tolist() for n in range(60) if (sample := mixed.sample(n)).source == "fr"]
    assert drawn == alone.batch(0, len(drawn)).tolist()


def test_sample_tokens_and_batch_agree(sources: list[Source]) -> None:
    data = training(sources, seed=5)
    batch = data.batch(37, 20)
    assert batch.dtype == np.int64
    for row, n in zip(batch, range(37, 57), strict=True):
        sample = data.sample(n)
        assert sample.tokens.tolist() == row.tolist() == data.tokens(n).tolist()
        assert sample.source == sources[data.source_indices(n, 1)[0]].name


def test_sample_names_the_documents_that_hold_its_tokens(sources: list[Source]) -> None:
    data = training(sources, seed=5)
    first, length = {"en": 0, "fr": 1000, "code": 2000}, {"en": 7, "fr": 5, "code": 11}
    for n in range(100):
        sample = data.sample(n)
        owners = (sample.tokens - first[sample.source]) // length[sample.source]
        assert sample.documents == sorted(set(owners.tolist()))


def test_order_depends_on_the_seed(sources: list[Source]) -> None:
    assert training(sources, 1).batch(0, 50).tolist() != training(sources, 2).batch(0, 50).tolist()


def test_order_does_not_depend_on_where_files_lie(write_tokens: WriteTokens) -> None:
    orders = [training([Source("x", (write_tokens(path, numbered(9)),))], 1).batch(0, 30) for path in ("a", "b")]
    assert (orders[0] == orders[1]).all()


def test_skipped_samples_are_left_out_and_move_nothing_else(sources: list[Source]) -> None:
    everything = training(sources, seed=5)
    left = training(sources, seed=5, skip=[(3, 5), (8, 20)])
    numbers = [0, 1, 2, 5, 6, 7, 20, 21]
    assert [left.sample(position).sample for position in range(8)] == numbers
    assert left.batch(0, 8).tolist() == [everything.tokens(number).tolist() for number in numbers]
    assert left.source_indices(0, 8).tolist() == [everything.source_indices(n, 1)[0] for n in numbers]


def test_token_outside_the_vocabulary_names_source_document_and_position(write_tokens: WriteTokens) -> None:
    shards = (write_tokens("a", numbered(2, 5)), write_tokens("b", [[1, 2], [3, 4, 777, 5, 6]]))
    data = training([Source("fr", shards)], seed=0, vocab_size=500)
    with pytest.raises(DataError, match="token id 777 in source fr, document 3, position 2 is outside"):
        data.batch(0, 3)


def test_two_sources_of_one_name_are_refused(sources: list[Source]) -> None:
    with pytest.raises(DataError, match="two sources are named en"):
        training([sources[0], sources[0]], 1)

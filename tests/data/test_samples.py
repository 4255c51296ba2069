"""Training samples: what is read when, over mixtures, epochs and phases."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagap.data.indexed import IndexedDatasetWriter
from megagap.data.loader import MicrobatchLoader
from megagap.data.samples import TrainingData
from megagap.errors import DataError
from megagap.timeline import Source
from tests.few import S, WriteTokens, numbered, phase, timeline, training


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


def test_sample_names_the_documents_that_contain_its_tokens(sources: list[Source]) -> None:
    data = training(sources, seed=5)
    first, length = {"en": 0, "fr": 1000, "code": 2000}, {"en": 7, "fr": 5, "code": 11}
    for n in range(100):
        sample = data.sample(n)
        owners = (sample.tokens - first[sample.source]) // length[sample.source]
        assert sample.documents == sorted(set(owners.tolist()))


def test_order_depends_on_the_seed(sources: list[Source]) -> None:
    assert training(sources, 1).batch(0, 50).tolist() != training(sources, 2).batch(0, 50).tolist()


def test_mixture_depends_on_the_seed(sources: list[Source]) -> None:
    assert training(sources, 1).source_indices(0, 50).tolist() != training(sources, 2).source_indices(0, 50).tolist()


def test_sources_of_equal_size_have_different_orders(write_tokens: WriteTokens) -> None:
    shards = (write_tokens("x", numbered(20)),)
    assert (training([Source("a", shards)], 1).batch(0, 30) != training([Source("b", shards)], 1).batch(0, 30)).any()


def test_order_does_not_depend_on_where_files_are(write_tokens: WriteTokens) -> None:
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


def test_a_negative_token_is_outside_the_vocabulary(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
        writer.add_document([1, 2, 3, -4, 5])
    data = training([Source("fr", (str(tmp_path / "a"),))], seed=0, vocab_size=500)
    with pytest.raises(DataError, match="token id -4 in source fr, document 0, position 3 is outside"):
        data.batch(0, 1)


def test_two_sources_with_one_name_are_refused(sources: list[Source]) -> None:
    with pytest.raises(DataError, match="two sources are named en"):
        training([sources[0], sources[0]], 1)


def reading(data: TrainingData, first: int, count: int) -> list[tuple[int, str, list[int]]]:
    return [(s.sample, s.source, s.tokens.tolist()) for s in map(data.sample, range(first, first + count))]


weights = st.floats(0.05, 1)
plans = st.lists(
    st.tuples(
        st.integers(1, 5),  # steps
        st.integers(1, 7),  # sequence length
        st.dictionaries(st.sampled_from(["en", "fr", "code"]), weights, min_size=1),
    ),
    min_size=1,
    max_size=4,
)
STEP = 12
"""Samples per step."""


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans, skip=st.lists(st.integers(0, 100), max_size=2), data=st.data())
def test_each_source_is_consumed_once_per_epoch_in_one_order_over_phases_ranks_and_interruptions(
    sources: list[Source], plan: list[tuple[int, int, dict[str, float]]], skip: list[int], data: st.DataObject
) -> None:
    by_name = {source.name: source for source in sources}
    phases = [
        phase(str(i), steps * STEP, length, [replace(by_name[name], weight=w) for name, w in mix.items()])
        for i, (steps, length, mix) in enumerate(plan)
    ]
    ranges = [(at, at + 3) for at in skip]
    steps = sum(steps for steps, _, _ in plan)
    consumed: dict[str, list[list[int]]] = {}
    step = 0
    while step < steps:  # each turn is a start of the run: other ranks, other micro batches, other workers
        dp = data.draw(st.sampled_from([1, 2, 3]), label="dp")
        micro = data.draw(st.sampled_from([1, 2]), label="micro")
        until = data.draw(st.integers(step + 1, steps), label="until")
        opened = TrainingData(timeline(*phases, batch=STEP), seed=3, skip=ranges)
        loaders = [MicrobatchLoader(opened, micro, rank, dp, workers=rank % 2) for rank in range(dp)]
        for at in range(step, until):
            batches = [loader.step(at + 1) for loader in loaders]
            for batch in batches:
                rows = batch.tokens.flatten(0, 1)[:, :-1].tolist()
                for i, row in zip(batch.sources.flatten().tolist(), rows, strict=True):
                    consumed.setdefault(opened.names[i], []).append(row)
        for loader in loaders:
            loader.close()
        step = until
    first = {"en": 0, "fr": 1000, "code": 2000}
    size = {"en": 140, "fr": 85, "code": 66}
    longest = max(length for _, length, _ in plan)
    once = TrainingData(timeline(*phases), seed=3, skip=ranges)
    expected: dict[str, list[list[int]]] = {}
    for position in range(steps * STEP):
        sample = once.sample(position)
        expected.setdefault(sample.source, []).append(sample.tokens[:-1].tolist())
    assert consumed == expected
    if ranges:
        return  # what a skipped sample holds is missing in its epoch
    for name, rows in consumed.items():
        usable = size[name] - 1  # the last token is a target only
        seen: set[int] = set()
        for row in rows:
            assert len(set(row)) == len(row) and all(0 <= token - first[name] < usable for token in row)
            if seen & set(row):  # the source repeats: it was read except for what does not fill a sequence
                assert usable - len(seen) < 2 * longest
                seen = set()
            seen |= set(row)


def test_a_source_continues_where_it_stopped_when_a_phase_is_longer(sources: list[Source]) -> None:
    en = sources[0]
    data = TrainingData(timeline(phase("short", 12, 4, (en,)), phase("long", 12, 8, (en,))), seed=1)
    short, long = data.batch(0, 12)[:, :-1], data.batch(12, 11)[:, :-1]
    assert short.shape == (12, 4) and long.shape == (11, 8)
    read = [*short.flatten().tolist(), *long.flatten().tolist()]
    assert len(set(read)) == len(read) == 136  # of the 139 that have a target
    assert data.epochs(12) == [0] and data.epochs(23) == [0] and data.epochs(24) == [1]


def test_documents_of_a_sample_joined_from_several_places_end_where_these_do(sources: list[Source]) -> None:
    """Each token follows the one before, unless another document or place begins with it."""
    en = sources[0]  # documents of 7 tokens, counting up from 0
    data = TrainingData(timeline(phase("short", 12, 4, (en,)), phase("long", 12, 8, (en,))), seed=1)
    tokens, _, positions = data.read(12, 11, with_positions=True)
    assert positions is not None
    together = 0
    for row, places in zip(tokens, positions.tolist(), strict=True):
        begins = [i == 0 or token % 7 == 0 or token != row[i - 1] + 1 for i, token in enumerate(row)]
        together += sum(row[1:] != row[:-1] + 1)
        assert places == [i - max(j for j in range(i + 1) if begins[j]) for i in range(9)]
    assert together >= 1, "no such sample"


def test_changing_later_phases_changes_nothing_before(sources: list[Source]) -> None:
    en, fr, code = sources
    first = phase("first", 24, 4, (en, fr))
    one = TrainingData(timeline(first, phase("then", 24, 4, (code,))), seed=1)
    other = TrainingData(timeline(first, phase("then", 12, 8, (fr, code)), phase("last", 12, 2, (en,))), seed=1)
    assert reading(one, 0, 24) == reading(other, 0, 24)
    assert one.batch(24, 1).shape != other.batch(24, 1).shape


def test_a_phase_that_changes_nothing_makes_no_difference(sources: list[Source]) -> None:
    whole = training(sources, seed=1)
    parted = TrainingData(timeline(*[phase(str(i), 17, S, tuple(sources)) for i in range(4)]), seed=1)
    assert reading(whole, 0, 100) == reading(parted, 0, 100)


def test_skipping_leaves_phases_as_long_as_they_are(sources: list[Source]) -> None:
    phases = [phase("short", 12, 4, tuple(sources)), phase("long", 12, 8, tuple(sources))]
    data, everything = (TrainingData(timeline(*phases), seed=1, skip=skip) for skip in ([(3, 8)], []))
    assert [data.sample(p).sample for p in range(14)] == [0, 1, 2, *range(8, 19)]
    assert [len(data.tokens(p)) for p in range(24)] == [5] * 12 + [9] * 12
    assert reading(data, 0, 3) == reading(everything, 0, 3) and reading(data, 3, 4) == reading(everything, 8, 4)


def test_one_name_for_different_data_in_two_phases_is_refused(sources: list[Source]) -> None:
    phases = [phase("a", 12, 4, (sources[0],)), phase("b", 12, 4, (replace(sources[1], name="en"),))]
    with pytest.raises(DataError, match=r"source en is not the same in all phases: .*/fr0"):
        TrainingData(timeline(*phases), seed=1)


def test_a_phase_longer_than_a_source_names_the_source(sources: list[Source]) -> None:
    with pytest.raises(DataError, match=r"source code has 66 tokens in 6 documents.*one sequence needs 101"):
        TrainingData(timeline(phase("a", 12, 4, (sources[2],)), phase("b", 12, 100, (sources[2],))), seed=1)

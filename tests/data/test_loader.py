"""Batches of data-parallel ranks, and reading ahead."""

import logging
import threading

import pytest
import torch

from megagap.data.loader import MicrobatchLoader
from megagap.timeline import Source
from tests.few import S, training


@pytest.mark.parametrize(("dp", "micro"), [(1, 12), (2, 3), (4, 1), (6, 2)])
def test_every_layout_sees_the_same_batch(sources: list[Source], dp: int, micro: int) -> None:
    data = training(sources, seed=5, batch=12)
    parts = [MicrobatchLoader(data, micro, rank, dp).step(3) for rank in range(dp)]
    for part in parts:
        assert part.tokens.dtype == torch.int64
        assert part.tokens.shape == (12 // dp // micro, micro, S + 1)
    assert torch.cat([part.tokens for part in parts]).view(12, S + 1).tolist() == data.batch(24, 12).tolist()
    assert torch.cat([part.sources for part in parts]).view(12).tolist() == data.source_indices(24, 12).tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing_whatever_step_is_asked_for(sources: list[Source], workers: int) -> None:
    data = training(sources, seed=5, batch=12, steps=20)
    plain = MicrobatchLoader(data, 3)
    with MicrobatchLoader(data, 3, workers=workers) as ahead:
        for step in [*range(1, 11), 4, 18, 19, 20, 1]:  # the last but one is the end
            ours, expected = ahead.step(step), plain.step(step)
            assert torch.equal(ours.tokens, expected.tokens) and torch.equal(ours.sources, expected.sources)


def test_a_workers_failure_is_raised_at_the_step_it_affects_with_its_cause(
    sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = training(sources, seed=5, batch=12)
    read = data.read

    def fail_from_36(first: int, count: int, **more: bool) -> object:
        if first >= 36:
            raise OSError("the disk is gone")
        return read(first, count, **more)

    monkeypatch.setattr(data, "read", fail_from_36)
    with MicrobatchLoader(data, 3, workers=2) as loader:
        for step in range(1, 4):
            assert loader.step(step).tokens.shape == (4, 3, S + 1)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.step(4)


def test_the_workers_stop_with_the_loader(sources: list[Source]) -> None:
    def workers() -> int:
        return sum(thread.name.startswith("megagap-data") for thread in threading.enumerate())

    assert workers() == 0
    with (
        pytest.raises(RuntimeError, match="of the step"),
        MicrobatchLoader(training(sources, 1, batch=12), 3, workers=3) as loader,
    ):
        loader.step(1)
        assert workers() > 0
        raise RuntimeError("of the step")
    assert workers() == 0


def test_the_log_says_when_a_source_repeats(sources: list[Source], caplog: pytest.LogCaptureFixture) -> None:
    data = training(sources[2:], seed=5, batch=12)  # of 16 samples
    loader = MicrobatchLoader(data, 3)
    with caplog.at_level(logging.INFO, "megagap"):
        said = []
        for step in range(1, 5):
            loader.step(step)
            said.append(" ".join(caplog.messages))
            caplog.clear()
    again = "source code repeats: epoch {} begins"
    assert said == ["", again.format(2), again.format(3), ""]


def test_documents_start_where_positions_are_0(sources: list[Source]) -> None:
    data = training(sources, seed=5, length=16, batch=12)
    batch = MicrobatchLoader(data, 3, document_mask=True).step(3)
    assert batch.positions is not None and batch.documents is not None
    first, length = {"en": 0, "fr": 1000, "code": 2000}, {"en": 7, "fr": 5, "code": 11}
    for row in range(12):
        sample = data.sample(24 + row)
        within = (sample.tokens - first[sample.source]) % length[sample.source]
        positions = batch.positions.flatten(0, 1)[row].tolist()
        begin = next((i for i, place in enumerate(within) if place == 0), 17)
        assert positions == [*range(begin), *within[begin:].tolist()]
        assert batch.documents[row // 3].positions[row % 3].tolist() == positions[:-1]

"""The tokens that a source's samples read: each once per epoch, in an order that lengths do not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagap.data import shuffled
from megagap.data.shuffled import SourceOrder

phases = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=5)
"""(sequence length, samples), one after the other."""


def order_of(tokens: int, plan: list[tuple[int, int]], seed: int = 0) -> SourceOrder:
    order, k = SourceOrder("x", seed, tokens), 0
    for length, samples in plan:
        order.set_length(k, length)
        k += samples
    return order


def inputs_of(order: SourceOrder, k: int) -> tuple[int, list[int]]:
    """Epoch and input tokens of sample k, whose last token is a target only."""
    place = order.place(k)
    return place.epoch, [token for start, stop in place.stretches for token in range(start, stop)][:-1]


@pytest.fixture(params=[2, 5, 4096])
def readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few, so that short sources have several rounds too."""
    monkeypatch.setattr(shuffled, "READERS", request.param)


@pytest.mark.usefixtures("readers")
def test_each_epoch_reads_every_token_once_whatever_the_lengths_and_leaves_out_less_than_a_sequence() -> None:
    @settings(deadline=None, max_examples=150)
    @given(st.integers(10, 120), phases, st.integers(0, 3))
    def holds(tokens: int, plan: list[tuple[int, int]], seed: int) -> None:
        order = order_of(tokens, plan, seed)
        read: dict[int, list[int]] = {}
        lengths: dict[int, int] = {}
        epoch_before = 0
        k = 0
        for length, samples in plan:
            for _ in range(samples):
                epoch, inputs = inputs_of(order, k)
                assert len(inputs) == length and epoch_before <= epoch <= epoch_before + 1
                assert order.progress(k) == (epoch, len(read.get(epoch, [])))
                if epoch > epoch_before:  # a source repeats only when not one more sequence is left
                    assert tokens - 1 - len(read[epoch_before]) < max(lengths[epoch_before], length)
                read.setdefault(epoch, []).extend(inputs)
                lengths[epoch] = length
                epoch_before = epoch
                k += 1
        for inputs in read.values():
            assert len(set(inputs)) == len(inputs) and 0 <= min(inputs) <= max(inputs) < tokens - 1

    holds()


@pytest.mark.usefixtures("readers")
def test_what_was_read_does_not_depend_on_the_phases_to_come() -> None:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(10, 120), phases, phases)
    def holds(tokens: int, plan: list[tuple[int, int]], later: list[tuple[int, int]]) -> None:
        alone, longer = order_of(tokens, plan), order_of(tokens, plan + later)
        for k in range(sum(samples for _, samples in plan)):
            assert alone.place(k) == longer.place(k)

    holds()


def test_a_phase_that_reads_nothing_of_a_source_leaves_no_trace() -> None:
    """Of 15 inputs, 3 are left to read, which are less than a sequence of 4, but not of 1."""
    with_pause, without = order_of(16, [(3, 4), (4, 0), (1, 0)]), order_of(16, [(3, 4), (1, 0)])
    assert all(with_pause.place(k) == without.place(k) for k in range(40))
    assert with_pause.place(6).epoch == 0 and with_pause.place(7).epoch == 1


def test_a_phase_of_the_same_length_continues_in_the_same_order() -> None:
    whole, parted = order_of(1000, [(8, 0)]), order_of(1000, [(8, 37), (8, 20), (8, 0)])
    assert all(whole.place(k) == parted.place(k) for k in range(400))


def test_longer_sequences_of_a_half_read_epoch_are_still_stretches_of_the_file() -> None:
    """Except for the few that join what readers leave at the end of their stretch."""
    order = order_of(2_000_000, [(16, 50_000), (64, 0)])
    places = [order.place(k) for k in range(50_000, 50_000 + (2_000_000 - 800_000) // 64 - 4096)]
    assert {place.epoch for place in places} == {0}
    assert np.mean([len(place.stretches) == 1 for place in places]) > 0.99


def test_neighbouring_samples_come_from_far_apart() -> None:
    order = order_of(10_000_000, [(16, 0)])
    starts = np.array([order.place(k).stretches[0][0] for k in range(5000, 9000)])
    distance = np.abs(np.diff(starts))
    assert np.median(distance) > 10_000_000 / 6 and (distance < 1600).mean() < 0.01


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = order_of(161, [(4, 0)])
    epochs = [[order.place(epoch * 40 + k).stretches for k in range(40)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]

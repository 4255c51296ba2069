"""Schedules are complete, cannot deadlock, and stay within the memory they promise."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.config.settings import Parallel
from megagap.parallel import schedule as schedule_module
from megagap.parallel.placement import Placement
from megagap.parallel.schedule import (
    SCHEDULES,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Hop,
    Message,
    Transfer,
    forward_only,
    gpipe,
    one_forward_one_backward,
    peak_live_activations,
    programs_of,
    timeline,
    validate,
    with_transfers,
)

ONE, TWO = Placement.loop([1]), Placement.loop([1, 1])


def schedules_of(schedule, placement: Placement, microbatches: int):
    ranks, chunks = placement.ranks, placement.chunks
    return [list(schedule(rank, ranks, chunks, microbatches)) for rank in range(ranks)]


def pipeline(stages: int) -> Placement:
    return Placement.loop([1] * stages)


@given(st.sampled_from([*SCHEDULES.values(), forward_only]), st.integers(1, 9), st.integers(1, 20))
def test_every_schedule_is_complete_and_free_of_deadlock(schedule, stages, microbatches):
    programs_of(schedule, pipeline(stages), microbatches)


@given(
    st.sampled_from([gpipe, forward_only]),
    st.integers(1, 5),
    st.integers(1, 8),
    st.sampled_from(
        [lambda ranks: Placement.loop([1] * 3 * ranks, 3), lambda ranks: Placement.v_shape([1] * 2 * ranks)]
    ),
)
def test_gpipe_and_evaluation_are_valid_with_several_chunks_in_any_placement(schedule, ranks, microbatches, place):
    programs_of(schedule, place(ranks), microbatches)


@given(st.integers(1, 9), st.integers(1, 20))
def test_1f1b_holds_at_most_stages_minus_stage_activations(stages, microbatches):
    for stage in range(stages):
        actions = one_forward_one_backward(stage, stages, 1, microbatches)
        assert peak_live_activations(actions) == min(stages - stage, microbatches)


def test_activations_are_live_until_the_weight_gradient_is_computed():
    actions = [Forward(0), BackwardInput(0), Forward(1), BackwardInput(1), BackwardWeight(0), BackwardWeight(1)]
    assert peak_live_activations(actions) == 2
    assert peak_live_activations([Forward(0, 0), Forward(0, 1), Backward(0, 1), Backward(0, 0)]) == 2
    assert peak_live_activations([Forward(0), Backward(0), Forward(1), Backward(1)]) == 1


def test_1f1b_matches_the_published_order():
    f, b = Forward, Backward
    assert list(one_forward_one_backward(1, 3, 1, 4)) == [f(0), f(1), b(0), f(2), b(1), f(3), b(2), b(3)]


@given(st.integers(1, 9), st.integers(1, 20))
def test_1f1b_takes_as_long_as_theory_says(stages, microbatches):
    """Narayanan et al. 2021, section 2.2: a bubble of stages - 1 forwards and backwards, which take 1 and 2."""
    rows = timeline(schedules_of(one_forward_one_backward, pipeline(stages), microbatches), pipeline(stages))
    assert max(row[-1].end for row in rows) == 3 * (microbatches + stages - 1)


def test_the_timeline_in_the_docstring_is_that_of_1f1b():
    rows = timeline(schedules_of(one_forward_one_backward, pipeline(3), 4), pipeline(3))
    for stage, row in enumerate(rows):
        cells = "".join(
            " " * 3 * (start - before)
            + f"{type(action).__name__[0]}{action.microbatch}".ljust(3 * (end - start) - 1, "-")
            + " "
            for (start, end, action), before in zip(row, [0, *(timed.end for timed in row)], strict=False)
        )
        assert f"stage {stage}  {cells}".rstrip() in schedule_module.__doc__.replace("|", " "), cells


def interleaved(stage, stages, chunks, microbatches):
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2), for multiples of ``stages`` microbatches, as Megatron-LM
    orders it."""
    groups = [range(first, first + stages) for first in range(0, microbatches, stages)]
    forwards = [Forward(i, chunk) for group in groups for chunk in range(chunks) for i in group]
    backwards = [Backward(i, chunk) for group in groups for chunk in reversed(range(chunks)) for i in group]
    warmup = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(forwards))
    yield from forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield from (forward, backward)
    yield from backwards[len(forwards) - warmup :]


@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 4))
def test_the_published_interleaved_order_is_free_of_deadlock_and_has_a_bubble_smaller_by_the_chunks(
    stages, chunks, groups
):
    """Receives that were posted only when they are needed would make stages wait in a circle."""
    placement = Placement.loop([1] * stages * chunks, chunks)
    programs_of(interleaved, placement, groups * stages)
    rows = timeline(schedules_of(interleaved, placement, groups * stages), placement)
    assert max(row[-1].end for row in rows) == 3 * (groups * stages * chunks + stages - 1)


def test_a_receive_is_posted_when_its_message_is_sent_not_when_it_is_needed():
    _, last = programs_of(one_forward_one_backward, TWO, 2)
    arrives = Transfer((), (Hop(0, Message("activation", 1, 1)),))
    assert last[1:4] == [Forward(0), arrives, Backward(0)]


def test_a_schedule_whose_stages_wait_for_each_other_is_refused():
    def backward_first(stage, stages, chunks, microbatches):
        yield from (
            (Forward(0), Backward(0), Forward(1), Backward(1))
            if stage == 0
            else (Forward(1), Forward(0), Backward(0), Backward(1))
        )

    with pytest.raises(AssertionError, match="stages wait for each other"):
        programs_of(backward_first, TWO, 2)


def test_opposite_transfers_of_a_pair_are_one_batch():
    program = programs_of(one_forward_one_backward, TWO, 2)[0]
    assert program[3] == Transfer(sends=((1, Message("activation", 1, 1)),), receives=((1, Message("gradient", 0, 1)),))


def test_split_backwards_are_valid_and_send_the_input_gradient_first():
    def zero_bubble(stage, stages, chunks, microbatches):
        yield from (Forward(i) for i in range(microbatches))
        yield from (BackwardInput(i) for i in range(microbatches))
        yield from (BackwardWeight(i) for i in range(microbatches))

    programs_of(zero_bubble, pipeline(3), 4)


def test_interleaved_chunks_wrap_around_to_the_first_stage():
    actions = [Forward(0, 0), Forward(0, 1), Backward(0, 1), Backward(0, 0)]
    placement = Placement.loop([1] * 4, chunks=2)
    both = with_transfers([actions, actions], placement)
    validate(both, placement, 1)
    assert (0, Message("activation", 0, 2)) in both[1][2].sends


def test_in_a_v_the_last_rank_hands_over_to_itself_without_a_transfer():
    actions = [Forward(0, 0), Forward(0, 1), Backward(0, 1), Backward(0, 0)]
    placement = Placement.v_shape([1] * 4)
    first, last = with_transfers([actions, actions], placement)
    validate([first, last], placement, 1)
    assert last[1:3] == actions[:2] and last[4:6] == actions[2:]
    assert all(peer == 1 for action in first if isinstance(action, Transfer) for peer, _ in action.sends)


def test_the_validator_finds_a_chunk_that_comes_before_the_one_of_the_same_rank_that_it_needs():
    placement = Placement.v_shape([1, 1])
    with pytest.raises(AssertionError, match=r"needs Message\(.*\) before it is there"):
        validate([[Forward(0, 1), Forward(0, 0)]], placement, 1)


def test_the_validator_finds_a_chunk_that_is_left_out():
    with pytest.raises(AssertionError, match="not every microbatch goes forward"):
        validate([[Forward(0), Backward(0)]], Placement.v_shape([1, 1]), 1)


def test_the_possible_values_of_the_setting_are_the_schedules_there_are():
    annotation = Parallel.model_fields["schedule"].annotation
    assert get_args(annotation) == tuple(SCHEDULES)


def test_the_validator_finds_a_deadlock():
    one = [
        Transfer((), ((1, Message("gradient", 0, 1)),)),
        Forward(0),
        Transfer(((1, Message("activation", 0, 1)),), ()),
    ]
    two = [Transfer((), (Hop(0, Message("activation", 0, 1)),)), Forward(0)]
    with pytest.raises(AssertionError, match=r"deadlock|never used"):
        validate([one, two], TWO, 1)


@pytest.mark.parametrize("program", [[Forward(0)], [Forward(0), Backward(0)]])
def test_the_validator_finds_missing_transfers(program):
    with pytest.raises(AssertionError, match="stage 0"):
        validate([program, program], TWO, 1)


def test_the_validator_finds_messages_out_of_order():
    one, _ = with_transfers([[Forward(1), Forward(0)]] * 2, TWO)
    _, two = with_transfers([[Forward(0), Forward(1)]] * 2, TWO)
    with pytest.raises(AssertionError, match="expects"):
        validate([one, two], TWO, 2)


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        ([Forward(0)], "not every microbatch"),
        ([Forward(0), Forward(0), Forward(1)], "twice"),
        ([Backward(0), Forward(0), Forward(1), Backward(1)], "too early"),
        ([Forward(0), Forward(1), Backward(0)], "not every microbatch"),
        ([Forward(0), Forward(1), BackwardInput(0), BackwardInput(1), BackwardWeight(1)], "without BackwardWeight"),
    ],
)
def test_the_validator_finds_incomplete_schedules(actions, complaint):
    with pytest.raises(AssertionError, match=complaint):
        validate([actions], ONE, 2)


def test_gpipe_runs_all_forwards_first():
    assert [type(a) for a in gpipe(0, 2, 1, 2)] == [Forward, Forward, Backward, Backward]

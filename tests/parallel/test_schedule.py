"""Schedules are complete, cannot deadlock, and stay within the memory they promise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.parallel.schedule import (
    SCHEDULES,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Message,
    Transfer,
    forward_only,
    gpipe,
    one_forward_one_backward,
    validate,
    with_transfers,
)


def programs(schedule, stages, microbatches):
    return [with_transfers(list(schedule(s, stages, microbatches)), s, stages) for s in range(stages)]


@given(st.sampled_from([*SCHEDULES.values(), forward_only]), st.integers(1, 9), st.integers(1, 20))
def test_every_schedule_is_complete_and_free_of_deadlock(schedule, stages, microbatches):
    validate(programs(schedule, stages, microbatches), microbatches)


@given(st.integers(1, 9), st.integers(1, 20))
def test_1f1b_holds_at_most_stages_minus_stage_activations(stages, microbatches):
    for stage in range(stages):
        live = most = 0
        for action in one_forward_one_backward(stage, stages, microbatches):
            live += 1 if isinstance(action, Forward) else -1
            most = max(most, live)
        assert most == min(stages - stage, microbatches)


def test_1f1b_matches_the_published_order():
    f, b = Forward, Backward
    assert list(one_forward_one_backward(1, 3, 4)) == [f(0), f(1), b(0), f(2), b(1), f(3), b(2), b(3)]


def test_opposite_transfers_of_a_pair_are_one_batch():
    program = with_transfers(list(one_forward_one_backward(0, 2, 2)), 0, 2)
    assert program[3] == Transfer(sends=((1, Message("activation", 1, 1)),), receives=((1, Message("gradient", 0, 1)),))


def test_split_backwards_are_valid_and_send_the_input_gradient_first():
    def zero_bubble(stage, stages, microbatches):
        yield from (Forward(i) for i in range(microbatches))
        yield from (BackwardInput(i) for i in range(microbatches))
        yield from (BackwardWeight(i) for i in range(microbatches))

    validate(programs(zero_bubble, 3, 4), 4)


def test_interleaved_chunks_wrap_around_to_the_first_stage():
    actions = [Forward(0, 0), Forward(0, 1), Backward(0, 1), Backward(0, 0)]
    both = [with_transfers(actions, stage, 2, chunks=2) for stage in range(2)]
    validate(both, 1, chunks=2)
    assert (0, Message("activation", 0, 2)) in both[1][2].sends


def test_the_validator_finds_a_deadlock():
    one = [
        Transfer((), ((1, Message("gradient", 0, 1)),)),
        Forward(0),
        Transfer(((1, Message("activation", 0, 1)),), ()),
    ]
    two = with_transfers([Forward(0)], 1, 2)
    with pytest.raises(AssertionError, match=r"deadlock|never used"):
        validate([one, two], 1)


@pytest.mark.parametrize("program", [[Forward(0)], [Forward(0), Backward(0)]])
def test_the_validator_finds_missing_transfers(program):
    with pytest.raises(AssertionError, match="stage 0"):
        validate([program, program], 1)


def test_the_validator_finds_messages_out_of_order():
    one = with_transfers([Forward(1), Forward(0)], 0, 2)
    two = with_transfers([Forward(0), Forward(1)], 1, 2)
    with pytest.raises(AssertionError, match="expects"):
        validate([one, two], 2)


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
        validate([actions], 2)


def test_gpipe_runs_all_forwards_first():
    assert [type(a) for a in gpipe(0, 2, 2)] == [Forward, Forward, Backward, Backward]

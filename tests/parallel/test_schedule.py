"""Schedules are complete, cannot deadlock, and stay within the memory they promise."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.config.settings import Parallel
from megagap.parallel import schedule as schedule_module
from megagap.parallel.actions import Backward, BackwardInput, BackwardWeight, Forward, Hop, Message, Transfer
from megagap.parallel.placement import Placement
from megagap.parallel.program import (
    actions_of,
    bubble_fraction,
    peak_live_activations,
    programs_of,
    timeline,
    validate,
    with_transfers,
)
from megagap.parallel.schedule import EVALUATION, SCHEDULES, Schedule, all_activations

ONE, TWO = Placement.loop([1]), Placement.loop([1, 1])


def pipeline(stages: int) -> Placement:
    return Placement.loop([1] * stages)


def place(name: str, stages: int, chunks: int | None = None) -> Placement:
    """Where a schedule's virtual stages of one layer each are."""
    schedule = SCHEDULES[name]
    chunks = chunks or schedule.default_chunks
    return schedule.place([1] * stages * chunks, chunks)


def makespan(name: str, placement: Placement, microbatches: int) -> int:
    """From the first forward to the end of the last backward, in units of a forward of a virtual stage."""
    rows = timeline(actions_of(SCHEDULES[name], placement, microbatches), placement)
    return max(row[-1].end for row in rows)


@given(st.sampled_from([*SCHEDULES.values(), EVALUATION]), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20))
def test_every_schedule_is_complete_free_of_deadlock_and_within_its_bound(schedule, stages, chunks, microbatches):
    """For any number of microbatches, also one that the stages do not divide."""
    chunks = chunks if chunks in schedule.chunks else schedule.default_chunks
    programs_of(schedule, schedule.place([1] * stages * chunks, chunks), microbatches)


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 6), st.integers(1, 3), st.integers(1, 14))
def test_the_bound_that_a_schedule_states_is_reached(name, stages, chunks, microbatches):
    """A bound that is too high would prove little. ZB-V reaches its own on every stage once the pipeline is full."""
    schedule = SCHEDULES[name]
    chunks = chunks if chunks in schedule.chunks else schedule.default_chunks
    actions = actions_of(schedule, place(name, stages, chunks), microbatches)
    bounds = [schedule.live(stage, stages, chunks, microbatches) for stage in range(stages)]
    peaks = [peak_live_activations(row) for row in actions]
    assert max(peaks) == max(bounds)
    assert peaks == bounds or (name == "zb-v" and microbatches < 2 * stages - 1)


@given(
    st.sampled_from([SCHEDULES["gpipe"], EVALUATION]),
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
        actions = SCHEDULES["1f1b"](stage, stages, 1, microbatches)
        assert peak_live_activations(actions) == min(stages - stage, microbatches)


def test_activations_are_live_until_the_weight_gradient_is_computed():
    actions = [Forward(0), BackwardInput(0), Forward(1), BackwardInput(1), BackwardWeight(0), BackwardWeight(1)]
    assert peak_live_activations(actions) == 2
    assert peak_live_activations([Forward(0, 0), Forward(0, 1), Backward(0, 1), Backward(0, 0)]) == 2
    assert peak_live_activations([Forward(0), Backward(0), Forward(1), Backward(1)]) == 1


def test_1f1b_matches_the_published_order():
    f, b = Forward, Backward
    assert list(SCHEDULES["1f1b"](1, 3, 1, 4)) == [f(0), f(1), b(0), f(2), b(1), f(3), b(2), b(3)]


@given(st.integers(1, 9), st.integers(1, 20))
def test_the_bubble_of_1f1b_is_as_published(stages, microbatches):
    """Narayanan et al. 2021, section 2.1: a bubble of stages - 1 forwards and backwards, which take 1 and 2."""
    placement = place("1f1b", stages)
    assert makespan("1f1b", placement, microbatches) == 3 * (microbatches + stages - 1)
    rows = timeline(actions_of(SCHEDULES["1f1b"], placement, microbatches), placement)
    assert bubble_fraction(rows) == pytest.approx((stages - 1) / (microbatches + stages - 1))


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 15))
def test_the_bubble_of_the_interleaved_schedule_is_that_divided_by_the_chunks(stages, chunks, more):
    """Narayanan et al. 2021, section 2.2: (p - 1) / (v m) of the ideal time, whether or not p divides m."""
    microbatches = stages + more
    ideal = 3 * microbatches * chunks
    idle = makespan("interleaved", place("interleaved", stages, chunks), microbatches) - ideal
    assert idle / ideal == pytest.approx((stages - 1) / (chunks * microbatches))


@given(st.integers(1, 9), st.integers(0, 15))
def test_the_bubble_of_zb_h1_is_a_third_of_that_of_1f1b(stages, more):
    """Qi et al. 2023, table 2: (p - 1) (T_F + T_B - T_W), against (p - 1) (T_F + T_B + T_W), in the memory of 1F1B."""
    microbatches = stages + more
    assert makespan("zb-h1", place("zb-h1", stages), microbatches) - 3 * microbatches == stages - 1
    actions = actions_of(SCHEDULES["zb-h1"], place("zb-h1", stages), microbatches)
    assert {peak_live_activations(row) for row in actions} == {stages}


@given(st.integers(1, 9), st.integers(0, 15))
def test_zb_v_waits_for_the_first_and_the_last_transfers_only(stages, more):
    """Qi et al. 2023, section 6: each rank is busy from its first to its last action; the others start by one forward
    of a virtual stage later each. In the memory of 1F1B's first stage: two activations of half the size for each."""
    microbatches = 2 * stages - 1 + more
    placement = place("zb-v", stages)
    rows = timeline(actions_of(SCHEDULES["zb-v"], placement, microbatches), placement)
    assert [row[0].start for row in rows] == list(range(stages))
    assert all(row[-1].end - row[0].start == 6 * microbatches for row in rows)
    assert max(row[-1].end for row in rows) == 6 * microbatches + stages - 1


def test_interleaved_and_zb_h1_match_the_published_order():
    f, b, i, w = Forward, Backward, BackwardInput, BackwardWeight
    assert list(SCHEDULES["interleaved"](1, 2, 2, 2)) == [
        *(f(0, 0), f(1, 0), f(0, 1), b(0, 1), f(1, 1), b(1, 1)),
        *(b(0, 0), b(1, 0)),
    ]
    assert list(SCHEDULES["zb-h1"](0, 3, 1, 4)) == [f(0), f(1), f(2), b(0), f(3), b(1), b(2), b(3)]
    assert list(SCHEDULES["zb-h1"](2, 3, 1, 4)) == [
        *(f(0), i(0), f(1), i(1), f(2), i(2), w(0), f(3), i(3), w(1)),
        *(w(2), w(3)),
    ]


def test_the_timeline_in_the_docstring_is_that_of_1f1b():
    rows = timeline(actions_of(SCHEDULES["1f1b"], pipeline(3), 4), pipeline(3))
    for stage, row in enumerate(rows):
        cells = "".join(
            " " * 3 * (start - before)
            + f"{type(action).__name__[0]}{action.microbatch}".ljust(3 * (end - start) - 1, "-")
            + " "
            for (start, end, action), before in zip(row, [0, *(timed.end for timed in row)], strict=False)
        )
        assert f"stage {stage}  {cells}".rstrip() in schedule_module.__doc__.replace("|", " "), cells


def test_a_receive_is_posted_when_its_message_is_sent_not_when_it_is_needed():
    _, last = programs_of(SCHEDULES["1f1b"], TWO, 2)
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
        programs_of(Schedule(backward_first), TWO, 2)


def test_opposite_transfers_of_a_pair_are_one_batch():
    program = programs_of(SCHEDULES["1f1b"], TWO, 2)[0]
    assert program[3] == Transfer(sends=((1, Message("activation", 1, 1)),), receives=((1, Message("gradient", 0, 1)),))


def test_split_backwards_are_valid_and_send_the_input_gradient_first():
    def zero_bubble(stage, stages, chunks, microbatches):
        yield from (Forward(i) for i in range(microbatches))
        yield from (BackwardInput(i) for i in range(microbatches))
        yield from (BackwardWeight(i) for i in range(microbatches))

    programs_of(Schedule(zero_bubble), pipeline(3), 4)


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


def test_the_possible_values_of_the_setting_are_the_schedules_there_are():
    annotation = Parallel.model_fields["schedule"].annotation
    assert get_args(get_args(annotation)[0]) == tuple(SCHEDULES)


def act(microbatch: int) -> Message:
    return Message("activation", microbatch, 1)


def grad(microbatch: int) -> Message:
    return Message("gradient", microbatch, 1)


def sent(peer: int, *messages: Message) -> Transfer:
    return Transfer(tuple(Hop(peer, message) for message in messages), ())


def received(peer: int, *messages: Message) -> Transfer:
    return Transfer((), tuple(Hop(peer, message) for message in messages))


F, B, I, W = Forward, Backward, BackwardInput, BackwardWeight  # noqa: E741
FIRST = [F(0), sent(1, act(0)), F(1), sent(1, act(1)), received(1, grad(0)), B(0), received(1, grad(1)), B(1)]
LAST = [received(0, act(0)), F(0), received(0, act(1)), F(1), B(0), sent(0, grad(0)), B(1), sent(0, grad(1))]


def test_what_the_broken_schedules_are_made_from_is_valid():
    validate([FIRST, LAST], TWO, 2, SCHEDULES["gpipe"].live)
    validate([[F(0), F(1), I(0), W(0), I(1), W(1)]], ONE, 2)


BROKEN = {
    "a program is missing": ([FIRST], TWO, "1 programs for 2 pipeline ranks"),
    "a microbatch never goes forward": ([[F(0), B(0)]], ONE, "stage 0: not every microbatch goes forward"),
    "a microbatch goes forward twice": ([[F(0), F(0), F(1), B(0), B(1)]], ONE, "twice"),
    "a microbatch never goes backward": ([[F(0), F(1), B(0)]], ONE, "not every microbatch goes backward"),
    "a backward before its forward": ([[B(0), F(0), F(1), B(1)]], ONE, "backward too early"),
    "a weight gradient is left out": ([[F(0), F(1), I(0), I(1), W(1)]], ONE, "without BackwardWeight"),
    "a weight gradient that nothing deferred": ([[F(0), F(1), B(0), B(1), W(1)]], ONE, "or the reverse"),
    "a weight gradient too early": ([[F(0), F(1), W(0), I(0), I(1), W(1)]], ONE, "weight gradient too early"),
    "a gradient computed twice": ([[F(0), F(1), B(0), I(0), W(0), B(1)]], ONE, "Backward beside BackwardInput"),
    "a receive is left out": ([FIRST, LAST[1:]], TWO, "stage 1: .* needs .* before it is there"),
    "a send is left out": ([FIRST, LAST[:-1]], TWO, "stage 1: never used or sent"),
    "a send before what it sends": ([[FIRST[1], FIRST[0], *FIRST[2:]], LAST], TWO, "sent before it is computed"),
    "a send that nobody receives": (
        [[F(0), F(1), sent(1, act(0)), sent(1, act(1)), *FIRST[4:]], [received(0, act(1), act(0)), F(0), *LAST[3:]]],
        TWO,
        "stage 0 sends .* stage 1 expects",
    ),
    "sends that wait for each other": (
        [FIRST, [LAST[0], F(0), B(0), sent(0, grad(0)), LAST[2], F(1), B(1), sent(0, grad(1))]],
        TWO,
        "deadlock",
    ),
    "a chunk before the one below it": (
        [[F(0, 1), F(0, 0), F(1, 0), F(1, 1)]],
        Placement.v_shape([1, 1]),
        "before it is there",
    ),
    "more activations than promised": ([FIRST, LAST], TWO, "stage 1: 2 live activations, more than the bound of 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_validator_rejects_a_broken_schedule_for_its_own_reason(name):
    programs, placement, complaint = BROKEN[name]
    with pytest.raises(AssertionError, match=complaint):
        validate(programs, placement, 2, SCHEDULES["1f1b"].live if "promised" in name else all_activations)


def test_a_schedule_that_breaks_its_promise_on_activations_is_never_run():
    with pytest.raises(AssertionError, match="stage 0: 4 live activations, more than the bound of 2"):
        programs_of(Schedule(SCHEDULES["gpipe"].order, live=lambda *shape: 2), TWO, 4)


def test_gpipe_runs_all_forwards_first():
    assert [type(a) for a in SCHEDULES["gpipe"](0, 2, 1, 2)] == [Forward, Forward, Backward, Backward]

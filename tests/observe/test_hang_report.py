"""The report of a hang names the rank that the others wait for."""

import pytest

from megagap.observe.hang_report import RankState, report, states_of, suspected
from megagap.parallel.layout import Layout


def state(rank, *doing, step=5, waits=False, axis="", number=0, peer=None, **collectives):
    return RankState(
        rank=rank,
        host="n1",
        pid=100 + rank,
        time=0.0,
        idle_seconds=600.0 + rank,
        step=step,
        doing=["step", *doing],
        waits=waits,
        axis=axis,
        number=number,
        peer=peer,
        collectives=collectives,
        stacks=f"stack of {rank}",
    )


def in_world(rank, number=7, **options):
    return state(rank, "all-reduce over world", waits=True, axis="world", number=number, world=number, **options)


CASES = {
    "a rank that says nothing": ([in_world(0), state(1, "forward"), None, in_world(3)], [2], "no sign of life"),
    "one that does not wait": ([in_world(0), state(1, "forward", world=6), in_world(2), in_world(3)], [1], "forward"),
    "of several the one that is behind": (
        [in_world(0), state(1, "update", world=7), state(2, "loader", step=4, world=6), in_world(3)],
        [2],
        "loader",
    ),
    "one that left a collective out": (
        [in_world(0), in_world(1), state(2, "wait", step=6, waits=True, peer=0, world=6), in_world(3)],
        [2],
        "waits in wait",
    ),
    "nobody where all are in it": ([in_world(rank) for rank in range(4)], [], "the network or a device"),
}


@pytest.mark.parametrize("case", CASES)
def test_suspected_is(case):
    states, ranks, reason = CASES[case]
    found = suspected({each.rank: each for each in states if each is not None}, Layout(4))
    assert found.ranks == ranks and reason in found.reason


def test_members_of_an_axis_wait_for_each_other_only():
    """tp ranks 0 and 1, 2 and 3: rank 3 has not begun what 2 waits in, and 0 and 1 wait for 2 and 3."""
    tp = dict(waits=True, axis="tp", number=4)
    states = [in_world(0), in_world(1), state(2, "all-reduce over tp", world=6, tp=4, **tp)]
    states.append(state(3, "wait for the device", waits=True, world=6, tp=3))
    found = {each.rank: each for each in states}
    assert suspected(found, Layout(4, tp=2)).ranks == [3]
    text = report("It hangs.", found, Layout(4, tp=2), {})
    line = "rank 2 (pp 0, dp 1, cp 0, tp 0; process 102 on n1): step 5, all-reduce over tp"
    assert f"{line}\n  for 602.0 s; waits for rank 3\n" in text
    assert "waits for ranks 2, 3" in text and text.rstrip().endswith("stack of 3")


def test_a_damaged_file_counts_as_none():
    assert list(states_of([state(1, "forward").model_dump_json(), '{"rank": 2', ""])) == [1]

"""The grid of ranks, as arithmetic."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.errors import DistributedError
from megagap.parallel.layout import AXES, Layout
from megagap.parallel.placement import Placement

small = st.integers(1, 4)


@st.composite
def layouts(draw) -> Layout:
    kv, replicate, pp, cp = draw(small), draw(small), draw(small), draw(small)
    tp, dp = kv * draw(small), replicate * draw(small)
    return Layout(pp * dp * cp * tp, pp=pp, cp=cp, tp=tp, kv_sharing=kv, dp_replicate=replicate)


@given(layouts())
def test_the_sizes_multiply_to_the_world_and_a_rank_is_what_its_coordinates_say(layout):
    assert layout.pp * layout.dp * layout.cp * layout.tp == layout.world_size
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert rank == ((at["pp"] * layout.dp + at["dp"]) * layout.cp + at["cp"]) * layout.tp + at["tp"]
        assert all(0 <= at[axis] < layout.size(axis) for axis in at)


@given(layouts())
def test_every_rank_is_in_exactly_one_group_per_axis(layout):
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for members in groups for rank in members) == list(range(layout.world_size))
        for members in groups:
            assert all(layout.members(axis, rank) == members for rank in members)
            assert len(members) == layout.size(axis) or (axis == "embedding" and len(members) == 1)


@given(layouts(), st.data())
def test_a_group_has_the_ranks_that_differ_in_its_axis_only(layout, data):
    rank = data.draw(st.integers(0, layout.world_size - 1))
    mine = layout.coordinates(rank)
    varying = {"pp": {"pp"}, "dp": {"dp"}, "cp": {"cp"}, "tp": {"tp"}, "data": {"dp", "cp"}}
    for axis, varied in varying.items():
        others = (other for other in range(layout.world_size))
        same = [o for o in others if all(layout.coordinates(o)[a] == mine[a] for a in mine if a not in varied)]
        assert list(layout.members(axis, rank)) == same
    heads = [r for r in layout.members("tp", rank) if r // layout.kv_sharing == rank // layout.kv_sharing]
    assert list(layout.members("kv", rank)) == heads
    ends = [r for r in layout.members("pp", rank) if layout.coordinates(r)["pp"] in (0, layout.pp - 1)]
    assert list(layout.members("embedding", rank)) == (ends if rank in ends else [rank])


@given(layouts(), st.data())
def test_dp_is_divided_into_parts_that_hold_everything_and_the_shards_within_them(layout, data):
    rank = data.draw(st.integers(0, layout.world_size - 1))
    shard, replicate = layout.members("shard", rank), layout.members("replicate", rank)
    assert set(shard) & set(replicate) == {rank}
    assert len(shard) * len(replicate) == layout.size("data")
    assert {other for same in shard for other in layout.members("replicate", same)} == set(layout.members("data", rank))
    if layout.dp_replicate == 1:
        assert shard == layout.members("data", rank)


@given(layouts())
def test_what_is_made_is_each_group_of_several_ranks_once_and_every_rank_makes_as_many(layout):
    made = [members for groups in layout.divisions.values() for members in groups if len(members) > 1]
    world = tuple(range(layout.world_size))
    wanted = {members for axis in AXES for members in layout.groups(axis) if len(members) > 1} - {world}
    assert len(made) == len(set(made)) and set(made) == wanted
    for groups in layout.divisions.values():
        assert sorted(rank for members in groups for rank in members) == list(world)


@given(layouts(), st.randoms())
def test_ranks_that_each_wait_for_the_others_of_their_next_group_all_get_through(layout, random):
    """The order in which groups are made: a rank waits in each of its groups until all members are there."""
    own = {
        rank: [members for groups in layout.divisions.values() for members in groups if rank in members]
        for rank in range(layout.world_size)
    }
    waiting = list(own)
    while any(own.values()):
        random.shuffle(waiting)
        ready = next((own[rank][0] for rank in waiting if own[rank] and all_there(own[rank][0], own)), None)
        assert ready is not None, "no group has all its members"
        for rank in ready:
            own[rank].pop(0)


def all_there(members, own) -> bool:
    return all(own[rank] and own[rank][0] == members for rank in members)


@given(st.integers(1, 9000))
def test_every_rank_is_in_one_block_for_objects_and_the_first_ones_meet_above(world):
    blocks, *above = Layout(world).object_levels()
    assert [rank for block in blocks for rank in block] == list(range(world))
    if len(blocks) > 1:
        ((first, *others),) = above
        assert first == tuple(block[0] for block in blocks)
        assert {*first, *(rank for (rank,) in others)} == set(range(world))
    else:
        assert not above


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        (dict(world_size=4, tp=3), "pp 1 × cp 1 × tp 3 does not divide 4 processes"),
        (dict(world_size=4, pp=0), "pp = 0: must be at least 1"),
        (dict(world_size=0), "world_size = 0: must be at least 1"),
        (dict(world_size=4, tp=4, kv_sharing=3), "3 ranks that share key/value heads do not divide tp 4"),
        (dict(world_size=8, tp=2, dp_replicate=3), "dp_replicate 3 does not divide dp 4"),
    ],
)
def test_sizes_that_do_not_fit_are_told(sizes, complaint):
    with pytest.raises(DistributedError, match=complaint):
        Layout(**sizes)


def test_the_groups_of_4096_ranks_are_known_without_torch():
    program = """
import sys
from megagap.parallel.layout import Layout
from megagap.parallel.placement import Placement
print(*((axis, len(groups)) for axis, groups in Layout(4096, pp=8, tp=8).divisions.items()))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "('pp', 512) ('dp', 64) ('tp', 512) ('embedding', 3584)", done.stderr


def test_in_a_v_no_other_rank_shares_the_embedding_and_no_group_is_made_for_it():
    """The first rank has both the first and the last virtual stage."""
    layout = Layout(12, pp=3, tp=2, embedding_ranks=Placement.v_shape([1] * 6).embedding_ranks)
    assert all(layout.members("embedding", rank) == (rank,) for rank in range(12))
    assert sorted(layout.groups("embedding")) == [(rank,) for rank in range(12)]
    assert layout.size("embedding") == 1 and "embedding" not in layout.divisions
    assert "embedding" in Layout(12, pp=3, tp=2).divisions

"""The grid of processes and its groups."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megagap.errors import DistributedError
from megagap.parallel import layout as layout_module
from megagap.parallel.collectives import all_reduce
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh, _object_levels, _split_world, connect

AXES = (*layout_module.AXES, "world")


def describe(rank, ranks, layout):
    """Each axis' members, what a sum of ranks over it gives, and the name of its process group."""
    before = set(dist.distributed_c10d._world.pg_map)
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, **layout)
    made = len(set(dist.distributed_c10d._world.pg_map) - before)
    axes = {name: mesh.axis(name) for name in AXES}
    sums = {name: int(all_reduce(torch.tensor([float(rank)]), axis)) for name, axis in axes.items()}
    groups = {name: axis.group and axis.group.group_name for name, axis in axes.items()}
    return {name: axis.ranks for name, axis in axes.items()}, sums, groups, made


@pytest.mark.parametrize(
    ("layout", "ranks", "groups_beside_the_world"),
    [
        ({}, 2, [0, 0]),
        (dict(tp=2, kv_sharing=2), 4, [2] * 4),  # tp, which kv shares; dp, which data shares
        (dict(pp=2), 4, [2] * 4),  # pp, which embedding shares; dp
        (dict(pp=2, tp=2), 4, [2] * 4),
        (dict(pp=3, tp=2), 6, [3] * 6),  # pp, tp; the first and the last stage, and each other alone
        (dict(cp=2), 4, [2] * 4),  # dp, cp; data is the world
        (dict(pp=4), 4, [1] * 4),  # pp is the world; the first and the last stage, and each other alone
    ],
)
def test_a_rank_makes_one_group_for_all_axes_with_the_same_members_and_none_that_it_is_not_in(
    workers, layout, ranks, groups_beside_the_world
):
    answers = workers.run(ranks, describe, layout)
    assert [made for *_, made in answers] == groups_beside_the_world
    for rank, (members, sums, groups, _) in enumerate(answers):
        for name in AXES:
            assert rank in members[name] and sums[name] == sum(members[name])
            assert (groups[name] is None) == (len(members[name]) == 1)
            for other in AXES:
                same = members[name] == members[other] and len(members[name]) > 1
                assert same == (groups[name] == groups[other] is not None), (name, other)


def connect_and_listen(rank, ranks, layout):
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, **layout)
    used = []
    all_reduce, exchange = dist.all_reduce, dist.batch_isend_irecv

    def reducing(tensor, group):
        used.append(sorted(dist.get_process_group_ranks(group)))
        return all_reduce(tensor, group=group)

    def exchanging(operations):
        used.append([(op.op.__name__, op.peer) for op in operations])
        return exchange(operations)

    with patch.object(dist, "all_reduce", reducing), patch.object(dist, "batch_isend_irecv", exchanging):
        connect(mesh)
    return used


def test_groups_are_connected_in_one_order_and_neighbours_in_the_pipeline_with_each_other(workers):
    used = workers.run(4, connect_and_listen, dict(pp=2, tp=2))
    assert used[0][:3] == [[0, 1, 2, 3], [0, 2], [0, 1]]
    assert used[3][:3] == [[0, 1, 2, 3], [1, 3], [2, 3]]
    (first, *_) = workers.run(3, connect_and_listen, dict(pp=3))
    assert first[-1] == [("isend", 1), ("isend", 2), ("irecv", 2), ("irecv", 1)]


def connect_wrongly(rank, ranks):
    """A mesh whose tensor-parallel group is really that of the pipeline."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, pp=2, tp=2)
    with pytest.raises(DistributedError) as error:
        connect(replace(mesh, tp=replace(mesh.tp, group=mesh.pp.group), kv=mesh.pp))
    return str(error.value)


def test_a_group_with_other_members_than_it_was_made_for_is_found_at_the_start(workers):
    for rank, answer in enumerate(workers.run(4, connect_wrongly)):
        assert f"rank {rank}: the group of axis tp does not have the ranks it was made for" in answer


@pytest.mark.parametrize("layout", [dict(pp=8, tp=8), dict(pp=4, cp=2, tp=16, kv_sharing=2)], ids=str)
def test_on_gpus_4096_ranks_split_their_world_once_per_axis_and_never_meet_at_the_store(layout):
    """What a start costs at scale: calls of torch.distributed by a rank, its backend taken to be NCCL."""
    layout, calls = Layout(4096, **layout), []

    def split_group(split_ranks, timeout, group_desc):
        calls.append((group_desc, split_ranks))
        return next((object() for members in split_ranks if 77 in members), None)

    with patch.object(dist, "split_group", split_group), patch.object(dist, "new_group", None):
        made = _split_world(layout, 77, None)
    assert [axis for axis, _ in calls] == list(layout.divisions) and len(calls) <= 7
    mine = [members for groups in layout.divisions.values() for members in groups if 77 in members]
    assert list(made) == [members for members in mine if len(members) > 1]
    for _, groups in calls:
        ranks = [rank for members in groups for rank in members]
        assert sorted(ranks) == list(range(4096)), "one split, in which every rank has a part"


def test_no_rank_of_4096_makes_more_than_two_groups_for_objects_or_waits_for_all_others():
    levels = Layout(4096).object_levels()
    for rank in (0, 1, 64, 4095):
        with patch.object(dist, "new_group", lambda ranks, **options: (ranks, options)):
            axes = _object_levels(levels, rank, None)
        assert [axis.size for axis in axes] == [64, 64 if rank % 64 == 0 else 1]
        for axis in axes:
            assert axis.ranks[axis.rank] == rank and (axis.group is None) == (axis.size == 1)
            if axis.group:
                ranks, options = axis.group
                assert ranks == list(axis.ranks)
                assert options["backend"] == "gloo" and options["use_local_synchronization"]


def exchange(rank, ranks, block, pp):
    """What a communicator gathers and broadcasts where objects take two levels of groups."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, pp=pp)
    with patch.object(layout_module, "OBJECT_BLOCK", block):
        levels = mesh.layout.object_levels()
    communicator = DistributedCommunicator(replace(mesh, object_levels=_object_levels(levels, rank, None)))
    return communicator.gather(f"from {rank}"), communicator.broadcast(f"by {rank}"), len(levels)


@pytest.mark.parametrize(
    ("ranks", "block", "levels", "pp"), [(4, 8, 1, 1), (6, 4, 2, 3), (5, 3, 2, 1), (3, 1, 2, 1), (5, 4, 2, 5)]
)
def test_objects_reach_rank_0_in_order_and_every_rank_from_it_whatever_the_levels(workers, ranks, block, levels, pp):
    answers = workers.run(ranks, exchange, block, pp)
    assert answers == [
        ([f"from {other}" for other in range(ranks)] if rank == 0 else None, "by 0", levels) for rank in range(ranks)
    ]


def in_the_background(rank, ranks, layout):
    """The levels of groups for a thread, what it exchanges while the main thread does, and all ranks' groups made."""
    before = len(dist.distributed_c10d._world.pg_map)
    mesh = Mesh.of(Layout(ranks, **layout), rank, torch.device("cpu"), background=True)
    made = len(dist.distributed_c10d._world.pg_map) - before
    main, beside = DistributedCommunicator(mesh), DistributedCommunicator(mesh, mesh.background_levels)
    with ThreadPoolExecutor(1) as thread:
        # The ranks' threads and main threads take turns in different orders.
        later = thread.submit(lambda: [time.sleep(0.02 * rank), *(beside.gather(("beside", n)) for n in range(20))])
        for n in range(20):
            assert (main.gather(("main", n)) or [("main", n)] * ranks) == [("main", n)] * ranks
        found = later.result()[1:]
    assert found == ([[("beside", n)] * ranks for n in range(20)] if rank == 0 else [None] * 20)
    return [axis.ranks for axis in mesh.background_levels], made


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (3, dict(pp=3)), (4, dict(tp=2))])
def test_a_thread_has_groups_of_its_own_beside_those_of_training(workers, ranks, layout):
    everyone = tuple(range(ranks))
    answers = workers.run(ranks, in_the_background, layout)
    assert [levels for levels, _ in answers] == [[everyone]] * ranks
    assert len({made for _, made in answers}) == 1, "ranks that made different numbers of groups would hang later"


def test_groups_for_a_thread_are_made_only_where_they_are_asked_for():
    assert Mesh.single().background_levels == ()

"""The grid of processes and its groups."""

import pytest
import torch
import torch.distributed as dist

from megagap.parallel.collectives import all_reduce
from megagap.parallel.mesh import Mesh

AXES = ("pp", "dp", "cp", "tp", "data", "embedding", "kv", "world")


def describe(rank, ranks, layout):
    """Each axis' members, what a sum of ranks over it gives, and the name of its process group."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, **layout)
    axes = {name: mesh.axis(name) for name in AXES}
    sums = {name: int(all_reduce(torch.tensor([float(rank)]), axis)) for name, axis in axes.items()}
    groups = {name: axis.group and axis.group.group_name for name, axis in axes.items()}
    return {name: axis.ranks for name, axis in axes.items()}, sums, groups, dist.get_pg_count()


@pytest.mark.parametrize(
    ("layout", "ranks", "groups_beside_the_world"),
    [
        ({}, 2, 0),
        (dict(tp=2, kv_sharing=2), 4, 4),  # 2 of tp, which kv shares; 2 of dp, which data shares
        (dict(pp=2), 4, 4),  # 2 of pp, which embedding shares; 2 of dp
        (dict(pp=2, tp=2), 4, 4),
        (dict(cp=2), 4, 4),  # 2 of dp, 2 of cp; data is the world
        (dict(pp=4), 4, 1),  # pp is the world; 1 of first and last stage
    ],
)
def test_axes_with_the_same_members_share_a_process_group_and_others_do_not(
    workers, layout, ranks, groups_beside_the_world
):
    answers = workers.run(ranks, describe, layout)
    for rank, (members, sums, groups, count) in enumerate(answers):
        assert count == 1 + groups_beside_the_world
        for name in AXES:
            assert rank in members[name] and sums[name] == sum(members[name])
            assert (groups[name] is None) == (len(members[name]) == 1)
            for other in AXES:
                same = members[name] == members[other] and len(members[name]) > 1
                assert same == (groups[name] == groups[other] is not None), (name, other)

"""Process groups of NCCL or RCCL: with one GPU what one rank can show, with several the whole start-up."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megagap.parallel.mesh import _object_levels, _split_world
from tests.launching import free_port

pytestmark = pytest.mark.gpu

PROGRAM = """
import sys, torch
from megagap.errors import MegagapError
from megagap.parallel.collectives import all_gather_async
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.process import launch
from megagap.process.rendezvous import Process

process = Process.from_environment()
try:
    device = launch.start(process)
    layout = Layout(process.world_size, pp=2 if process.world_size > 2 else 1, tp=2)
    mesh = Mesh.of(layout, process.rank, device)
except MegagapError as error:
    sys.exit(str(error))
for axis in (mesh.pp, mesh.dp, mesh.tp, mesh.world):
    gathered = all_gather_async(torch.tensor([process.rank], device=device), axis, 0).wait()
    assert gathered.tolist() == list(axis.ranks), axis
communicator = DistributedCommunicator(mesh)
assert communicator.gather(process.rank) == (list(range(process.world_size)) if process.rank == 0 else None)
assert communicator.broadcast({"by": process.rank}) == {"by": 0}
torch.distributed.barrier()
print("all groups work")
"""


def start(ranks: int, **environment: str) -> list[str]:
    """The output of each rank of a run that only starts."""
    port = str(free_port())
    places = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for rank in range(ranks)
    ]
    common = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port} | environment
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=common | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_world_bound_to_its_gpu_is_split_and_has_a_gloo_group_for_objects_beside_it(gpu):
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=gpu)
    try:
        made = {}
        split_group, new_group = dist.split_group, dist.new_group

        def splitting(**options):
            made["split"] = split_group(**options)
            return made["split"]

        def making(ranks, **options):
            made["objects"] = new_group(ranks, **options)
            return made["objects"]

        with patch.object(dist, "split_group", splitting), patch.object(dist, "new_group", making):
            _split_world(SimpleNamespace(divisions={"tp": ((0,),)}), 0, None)  # type: ignore[arg-type]
            _object_levels([[(0,)]], 0, None)
        number = torch.ones(3, device=gpu)
        dist.all_reduce(number, group=made["split"])
        assert number.tolist() == [1, 1, 1]
        values: list[object] = [None]
        dist.gather_object("a value", values, dst=0, group=made["objects"])
        assert values == ["a value"] and dist.get_backend(made["objects"]) == "gloo"
    finally:
        dist.destroy_process_group()


def test_two_processes_that_see_the_same_gpu_only_are_told_so(gpu):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for output in start(2, CUDA_VISIBLE_DEVICES=visible):
        assert "has the GPU of another rank" in output and "Traceback" not in output, output


def test_every_group_of_several_gpus_works_from_the_start(gpu):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU")
    ranks = 4 if count >= 4 else 2
    for output in start(ranks):
        assert "all groups work" in output, output

"""Which device a process takes, and how the ranks are joined."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from megagap.errors import DistributedError
from megagap.process import launch
from megagap.process.launch import choose_gpu
from megagap.process.rendezvous import Process, join, meet_in_used_store


@pytest.mark.parametrize("local_rank", range(4))
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_that_it_sees(local_rank):
    process = Process(4 + local_rank, 8, local_rank, 4)
    assert choose_gpu(process, 4) == choose_gpu(process, 8) == local_rank
    assert choose_gpu(process, 1) == 0, "srun --gpus-per-task=1"


@pytest.mark.parametrize(("local_rank", "visible"), [(2, 2), (3, 2), (7, 4)])
def test_more_processes_than_gpus_are_told_how_many_to_start(local_rank, visible):
    with pytest.raises(DistributedError) as error:
        choose_gpu(Process(local_rank, 8, local_rank, 8), visible)
    assert "8 processes on " in str(error.value) and f"{visible} GPUs are visible" in str(error.value)
    assert f"--nproc-per-node {visible}" in str(error.value)


def test_the_start_chooses_among_the_visible_gpus_and_joins_with_that_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(launch, "join", lambda process, device, timeout: chosen.append(device))
    assert launch.start(Process(3, 4, 3, 4)) == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)] * 2


def joined(device: torch.device, monkeypatch, error: Exception | None = None) -> dict:
    """What torch.distributed is asked for by rank 1 of two under torchrun, but for the store."""
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", agents.host)
    monkeypatch.setenv("MASTER_PORT", str(agents.port))
    asked = {}

    def init(backend, **options):
        asked.update(options, backend=backend)
        if error is not None:
            raise error

    minute = timedelta(minutes=1)
    with patch.object(dist, "init_process_group", init), ThreadPoolExecutor(1) as first_rank:
        first_rank.submit(meet_in_used_store, Process(0, 2, 0, 2), agents, minute)
        join(Process(1, 2, 1, 2), device, minute)
    assert isinstance(asked.pop("store"), PrefixStore)
    return asked


def test_ranks_on_gpus_are_joined_by_nccl_alone_bound_to_their_device(monkeypatch):
    gpu = torch.device("cuda", 1)
    common = {"timeout": timedelta(minutes=1), "rank": 1, "world_size": 2}
    assert joined(gpu, monkeypatch) == {"backend": "nccl", "device_id": gpu, **common}
    assert joined(torch.device("cpu"), monkeypatch) == {"backend": "gloo", **common}


def test_two_processes_on_one_gpu_are_told_so_and_other_errors_stay_what_they_are(monkeypatch):
    gpu = torch.device("cuda", 0)
    nccl = RuntimeError("NCCL error\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")
    with pytest.raises(DistributedError, match=r"rank 1 has the GPU of another rank on .*\n.*one process per GPU"):
        joined(gpu, monkeypatch, nccl)
    with pytest.raises(DistributedError, match=r"cannot connect to each other .*: NCCL error"):
        joined(gpu, monkeypatch, RuntimeError("NCCL error"))

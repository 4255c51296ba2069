"""Processes that cannot be one run are told why, in bounded time."""

import os
import socket
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megagap.errors import DistributedError
from megagap.process import rendezvous
from megagap.process.rendezvous import Meeting, Process, call_roll
from tests.launching import free_port
from tests.recipes import write_recipe
from tests.warm_start import python

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(DistributedError) as error:
        Process.from_environment(environment)
    return str(error.value)


def test_the_place_of_a_process_is_what_torchrun_sets():
    assert Process.from_environment(WHOLE) == Process(1, 4, 1, 2)
    assert Process.from_environment({}) == Process(0, 1, 0, 1)
    assert Process.from_environment({"WORLD_SIZE": "1"}) == Process(0, 1, 0, 1)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["-1", "abc", "", "1.5", "9" * 30, "99999", "٣", None])
def test_a_value_that_is_no_place_is_named(name, value):
    environment = {key: text for key, text in (WHOLE | {name: value}).items() if text is not None}
    if (name, value) == ("WORLD_SIZE", "99999"):  # a large world, why not
        return
    message = refusal(environment)
    assert message.startswith("distributed error: the environment does not say which rank this process is: ")
    assert name in message.splitlines()[0] and "start with torchrun" in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 must be at most WORLD_SIZE=4"),
        ({"RANK": "0"}, "LOCAL_RANK=1 is above RANK=0"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 must be at least 1"),
    ],
)
def test_places_that_contradict_each_other_are_refused(changes, complaint):
    assert complaint in refusal(WHOLE | changes)


@pytest.mark.parametrize(
    "tasks",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"FLUX_JOB_SIZE": "2"},
    ],
    ids=lambda tasks: next(iter(tasks)),
)
def test_tasks_of_another_launcher_do_not_each_train_by_themselves(tasks):
    assert "each would train by itself" in (message := refusal(tasks))
    assert "torchrun" in message and "WORLD_SIZE=1" in message
    assert Process.from_environment(tasks | WHOLE) == Process(1, 4, 1, 2)
    assert Process.from_environment(tasks | {"WORLD_SIZE": "1"}) == Process(0, 1, 0, 1)


@pytest.mark.parametrize(
    "tasks",
    [
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},  # the shell of salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # its interactive step
        {"PMI_SIZE": "1"},
        {"SLURM_NTASKS": "", "SLURM_PROCID": "0"},
    ],
    ids=str,
)
def test_one_process_of_an_allocation_is_a_run(tasks):
    assert Process.from_environment(tasks) == Process(0, 1, 0, 1)


def meet(port: int, *places: tuple[int, int]) -> list[str]:
    """Processes (rank, world size) that meet, as threads; the refusal of each, or nothing."""
    answers = [""] * len(places)
    stores = []  # rank 0's ends with its last reference

    def run(index: int, rank: int, world: int) -> None:
        process = Process(rank, world, 0, 1)
        meeting = Meeting("127.0.0.1", port, rendezvous.time.monotonic() + rendezvous.JOIN_SECONDS)
        try:
            store = meeting.host(process) if rank == 0 else meeting.reach(process)
            stores.append(store)
            call_roll(process, store, meeting.deadline)
        except DistributedError as error:
            answers[index] = str(error)

    threads = [threading.Thread(target=run, args=(i, *place)) for i, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.fixture
def port(monkeypatch) -> int:
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 4.0)
    monkeypatch.setattr(rendezvous, "HANDSHAKE_SECONDS", 2.0)
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 30.0)
    return free_port()


def test_ranks_that_agree_meet(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 60.0)
    monkeypatch.setattr(rendezvous, "HANDSHAKE_SECONDS", 60.0)
    assert meet(port, (2, 3), (0, 3), (1, 3)) == ["", "", ""]


def test_ranks_that_never_arrive_are_counted(port):
    for answer in meet(port, (0, 4), (2, 4)):
        assert "2 of 4 processes arrived, not ranks 1, 3" in answer


def test_two_processes_of_one_rank_are_told(port):
    assert all("two processes have RANK=1" in answer for answer in meet(port, (0, 3), (1, 3), (1, 3)))


@pytest.mark.parametrize(("first", "second"), [((0, 3), (1, 2)), ((0, 2), (1, 3))])
def test_worlds_of_different_sizes_are_told(port, first, second):
    for answer in meet(port, first, second):
        assert f"rank 1 has WORLD_SIZE={second[1]}, rank 0 has {first[1]}" in answer


def test_a_rank_beyond_the_world_of_the_others_is_told(port):
    answers = meet(port, (0, 2), (1, 2), (2, 3))
    assert answers[:2] == ["", ""] and "rank 2 has WORLD_SIZE=3, rank 0 has 2" in answers[2]


def test_a_port_that_another_program_has_is_told_by_every_rank(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        first, second = meet(port, (0, 2), (1, 2))
    assert f"cannot open MASTER_PORT={port}" in first and "choose another port" in first
    assert "is not rank 0 of a run, or hangs" in second


def test_rank_0_that_is_not_there_is_told(port):
    (answer,) = meet(port, (1, 2))
    assert f"cannot reach rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in answer


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a..b", "x" * 300])
def test_an_address_that_leads_nowhere_is_told(port, monkeypatch, address):
    meeting = Meeting(address, port, rendezvous.time.monotonic() + 2)
    with pytest.raises(DistributedError, match="is not an address that this machine can find"):
        meeting.reach(Process(1, 2, 0, 1))


@pytest.mark.parametrize("program", [["-m", "megagap.train"], ["tools/benchmark_mfu.py"]], ids=["train", "benchmark"])
def test_a_launch_that_is_no_run_ends_with_exit_code_2_and_no_traceback(tmp_path, program):
    environment = os.environ | WHOLE | {"WORLD_SIZE": "0"}
    command = [python(), *program, str(write_recipe(tmp_path))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "WORLD_SIZE=0" in done.stderr and "Traceback" not in done.stderr


def test_ranks_of_a_restart_meet_in_a_store_that_has_the_keys_of_those_before():
    """The first ranks to come find all that a start before has left, and must not take it for their own."""
    store = HashStore()
    names = []

    def meet(ranks: int) -> None:
        def join(rank: int) -> None:
            time.sleep(0.02 * ((rank + 1) % ranks))  # rank 0 neither first nor last
            found.append(rendezvous.meet_in_used_store(Process(rank, ranks, rank, ranks), store, timedelta(seconds=20)))

        found: list[str] = []
        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == ranks and len(set(found)) == 1
        names.append(found[0])

    for ranks in (4, 2, 4):
        meet(ranks)
    assert len(set(names)) == 3


def test_a_rank_that_never_comes_is_not_waited_for_without_end():
    with pytest.raises(RuntimeError):
        rendezvous.meet_in_used_store(Process(0, 2, 0, 2), HashStore(), timedelta(seconds=0.2))


def test_a_store_with_which_torchrun_may_not_restart_several_nodes_is_warned_of(caplog):
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    shared, separate = {"TORCHELASTIC_USE_AGENT_STORE": "True"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    for environment in (torchrun | separate, torchrun | shared | {"TORCHELASTIC_MAX_RESTARTS": "0"}, shared):
        rendezvous.warn_of_shared_store(environment)
    assert not caplog.records
    rendezvous.warn_of_shared_store(torchrun | shared)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text

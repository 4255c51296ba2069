"""Who the processes of a run are and how they meet, with a message for each way in which they do not."""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megagap.errors import DistributedError, library_errors
from megagap.parallel.mesh import NOT_CONNECTED
from megagap.process.parent import UNDER_TORCHRUN

JOIN_SECONDS = 45.0
"""How long processes that no torchrun started wait for each other; torchrun has a time-out of its own."""

HANDSHAKE_SECONDS = 20.0
"""How long rank 0 may take to answer a process that has reached its port."""

LINGER_SECONDS = 3.0
"""How long rank 0 waits for the others to read what is wrong, before it takes the store with it."""

NOTICE_SECONDS = 10.0
"""After how long a message says what is being waited for."""

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")

# Where launchers other than torchrun put the number of processes that they start.
_TASK_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_NTASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "MPI_LOCALNRANKS": "mpirun",
    "PALS_LOCAL_SIZE": "mpiexec",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
}

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Process:
    """This process's place, from torchrun's environment; a run of one without it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Process":
        """Raises :class:`DistributedError` if the environment has only part of what torchrun sets, or values that
        contradict each other, or if another launcher has started several processes and none knows its place.
        """
        given = {name: environment[name].strip() for name in PLACE if name in environment}
        if not given:
            _refuse_tasks_without_a_place(environment)
            return cls(0, 1, 0, 1)
        try:
            place = cls(*_numbers(given, environment))
        except ValueError as error:
            names = (*PLACE, *MEETING)
            found = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
            raise DistributedError(
                f"the environment does not say which rank this process is: {error}\n"
                f"  found: {found}\n"
                "  start with torchrun, which sets these, or unset them for a run of one process."
            ) from None
        return place


def _numbers(given: Mapping[str, str], environment: Mapping[str, str]) -> list[int]:
    """The values of :data:`PLACE`. Raises ValueError saying what is wrong with them."""
    if "WORLD_SIZE" not in given:
        raise ValueError(f"{next(iter(given))} is set, WORLD_SIZE is not")
    world = _whole("WORLD_SIZE", given["WORLD_SIZE"], 1, None)
    if world > 1:
        missing = [name for name in (*PLACE, *MEETING) if not environment.get(name, "").strip()]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise ValueError(f"WORLD_SIZE={world}, but {', '.join(missing)} {verb} not set")
        _whole("MASTER_PORT", environment["MASTER_PORT"].strip(), 1, 65535)
    rank = _whole("RANK", given.get("RANK", "0"), 0, world - 1, f"below WORLD_SIZE={world}")
    local = given.get("LOCAL_WORLD_SIZE", "1")
    local_world = _whole("LOCAL_WORLD_SIZE", local, 1, world, f"at most WORLD_SIZE={world}")
    below = f"below LOCAL_WORLD_SIZE={local_world}"
    local_rank = _whole("LOCAL_RANK", given.get("LOCAL_RANK", "0"), 0, local_world - 1, below)
    if local_rank > rank:
        raise ValueError(f"LOCAL_RANK={local_rank} is above RANK={rank}")
    return [rank, world, local_rank, local_world]


def _whole(name: str, text: str, least: int, most: int | None, upper: str = "") -> int:
    sign, digits = (text[:1], text[1:]) if text[:1] in ("-", "+") else ("", text)
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
        raise ValueError(f"{name}={text} is not a whole number")
    number = int(sign + digits)
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name}={number} must be {upper or f'at most {most}'}")
    return number


def _refuse_tasks_without_a_place(environment: Mapping[str, str]) -> None:
    for name, launcher in _TASK_COUNTS.items():
        if _count(environment, name) > 1 and _is_a_task(name, environment):
            raise DistributedError(
                f"{launcher} gives this job {environment[name]} tasks ({name}), and nothing says which of them this "
                "process is (RANK is not set): each would train by itself\n"
                "  have one torchrun started per machine: examples/slurm/train.sbatch, examples/multi_node/launch.sh\n"
                "  for a run of one process, start one task (srun --ntasks=1); for one run per task, WORLD_SIZE=1."
            )


def _is_a_task(name: str, environment: Mapping[str, str]) -> bool:
    """Slurm's variables of a whole job are in the shell of an allocation too, which starts one process by itself."""
    if name == "SLURM_NTASKS":
        return "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" not in environment
    return True


def warn_of_several_runs(environment: Mapping[str, str] = os.environ) -> None:
    """Under srun, a torchrun that was not told of the others (--nnodes) starts a run of its own on each machine."""
    tasks = _count(environment, "SLURM_STEP_NUM_TASKS")
    if tasks > 1 and UNDER_TORCHRUN in environment and _count(environment, "GROUP_WORLD_SIZE") == 1:
        log.warning("srun has started %d tasks, this run has the processes of one: was torchrun given --nnodes?", tasks)


def warn_of_shared_store(environment: Mapping[str, str] = os.environ) -> None:
    """torchrun's agents read each other's values of the start before where they share one store with the workers."""
    shares_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and is_one_of_several_nodes(environment) and _count(environment, "TORCHELASTIC_MAX_RESTARTS"):
        log.warning(
            "torchrun may not be able to restart this run over several nodes: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, on all of them"
        )


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """What the processes of one node have in common: torchrun's number of it; without torchrun, the host."""
    return environment.get("GROUP_RANK", "").strip() or socket.gethostname()


def was_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started this run's processes before, and starts them again after a failure."""
    return UNDER_TORCHRUN in environment and _count(environment, "TORCHELASTIC_RESTART_COUNT") > 0


def is_one_of_several_nodes(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started this run's processes on several nodes."""
    return UNDER_TORCHRUN in environment and _count(environment, "GROUP_WORLD_SIZE") > 1


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def join(process: Process, device: torch.device, timeout: timedelta) -> None:
    """Make the process group of all ranks: NCCL's or RCCL's, bound to the ``device``, if that is a GPU, else gloo's.

    Its collectives give up after ``timeout``.

    Raises :class:`DistributedError`, on every rank that can be reached, if the ranks do not find each other or do not
    agree on who they are.
    """
    address, port = os.environ["MASTER_ADDR"].strip(), int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # agents have met already, and number their workers
        with library_errors(NOT_CONNECTED, DistributedError):
            shared = TCPStore(address, port, process.world_size, is_master=False, timeout=timeout)
            store = PrefixStore(meet_in_used_store(process, shared, timeout), shared)
    else:
        deadline = time.monotonic() + JOIN_SECONDS
        meeting = Meeting(address, port, deadline)
        shared = meeting.host(process) if process.rank == 0 else meeting.reach(process)
        call_roll(process, shared, deadline)
        store = PrefixStore("group", shared)
    place = {"rank": process.rank, "world_size": process.world_size}
    options: dict[str, Any] = {"timeout": timeout, "store": store, **place}
    with library_errors(NOT_CONNECTED, DistributedError), _shared_gpus(process):
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **options)
        else:
            dist.init_process_group("gloo", **options)


def meet_in_used_store(process: Process, store: Store, timeout: timedelta) -> str:
    """A name for the keys of this start, the same on every rank, in a ``store`` that has those of starts before:
    torchrun's own, in which its restarts would find the addresses of processes that are gone.

    Each rank asks rank 0 under a name drawn for that, so that no answer is an old one; rank 0 answers all who have
    asked, also those before, until all of its own have heard it. Raises RuntimeError (torch's) if ranks are missing.
    """
    own = secrets.token_hex(8)
    if process.rank:
        store.set(f"asks/{process.rank}", own)
        store.wait([f"answer/{own}"], timeout)
        name = store.get(f"answer/{own}").decode()
        store.add(f"heard/{name}", 1)
        return name
    asking = [f"asks/{rank}" for rank in range(1, process.world_size)]
    store.wait(asking, timeout)
    answered: set[bytes] = set()

    def all_have_heard() -> bool:
        for other in set(store.multi_get(asking)) - answered:
            store.set(f"answer/{other.decode()}", own)
            answered.add(other)
        return store.add(f"heard/{own}", 0) == len(asking)

    if not _wait_until(all_have_heard, timeout.total_seconds()):
        raise RuntimeError("not all ranks have asked for the name of this start")
    return own


@contextmanager
def _shared_gpus(process: Process) -> Iterator[None]:
    """Explain the error of NCCL or RCCL where two processes have one GPU, as where only one is visible to all."""
    try:
        yield
    except RuntimeError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise DistributedError(
            f"rank {process.rank} has the GPU of another rank on {socket.gethostname()}\n"
            "  start one process per GPU (torchrun --nproc-per-node), and let each see all of them, or only its own."
        ) from None


@dataclass(frozen=True)
class Meeting:
    """The place where the ranks meet, rank 0's, and until when."""

    address: str
    port: int
    deadline: float

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.address}, MASTER_PORT={self.port}"

    def host(self, process: Process) -> TCPStore:
        """Rank 0: open the port. Raises :class:`DistributedError` if it is taken or not allowed."""
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", self.port))
                probe.listen()
        except OSError as error:
            raise DistributedError(
                f"rank 0 cannot open MASTER_PORT={self.port} on {socket.gethostname()}: {error.strerror}\n"
                "  it may be another run's, or two processes have RANK=0: choose another port from 1024 to 65535, "
                "the same for all ranks."
            ) from None
        self._resolve()
        return self._store(process, is_master=True)

    def reach(self, process: Process) -> TCPStore:
        """Other ranks: connect to rank 0, which may start later. Raises :class:`DistributedError` if it does not."""
        notice = time.monotonic() + NOTICE_SECONDS
        while True:
            addresses = self._resolve()
            try:
                with socket.create_connection((self.address, self.port), timeout=5):
                    break
            except OSError as error:
                refused = error
            if time.monotonic() > self.deadline:
                raise DistributedError(
                    f"rank {process.rank} cannot reach rank 0 at {self} ({', '.join(addresses)}): "
                    f"{refused.strerror or refused}\n"
                    f"  tried for {JOIN_SECONDS:.0f} s. Is rank 0 started, is this its machine, is the port open?"
                )
            if time.monotonic() > notice:
                notice = float("inf")
                log.warning("rank %d waits for rank 0 at %s: %s", process.rank, self, refused.strerror or refused)
            time.sleep(0.5)
        return self._store(process, is_master=False)

    def _resolve(self) -> list[str]:
        """The addresses of the name, which on a cluster may take a moment to be known."""
        until = min(self.deadline, time.monotonic() + JOIN_SECONDS / 3)
        while True:
            try:
                found = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)
                return sorted({str(entry[4][0]) for entry in found})
            except (OSError, UnicodeError) as error:
                if time.monotonic() > until or isinstance(error, UnicodeError):
                    reason = getattr(error, "strerror", None) or error
                    raise DistributedError(
                        f"MASTER_ADDR={self.address} is not an address that this machine can find: {reason}\n"
                        "  it must be rank 0's machine, by a name or address that all machines reach."
                    ) from None
                time.sleep(1)

    def _store(self, process: Process, is_master: bool) -> TCPStore:
        limit = timedelta(seconds=JOIN_SECONDS)

        def make() -> TCPStore:
            return TCPStore(
                "localhost" if is_master else self.address,
                self.port,
                process.world_size,
                is_master,
                timeout=limit,
                wait_for_workers=False,
            )

        # Something else that listens at the port would keep torch waiting without a limit.
        with library_errors(f"rank {process.rank} cannot meet the others at {self}", DistributedError):
            store = _within(HANDSHAKE_SECONDS, make)
        if store is None:
            raise DistributedError(
                f"rank {process.rank}: what answers at {self} is not rank 0 of a run, or hangs\n"
                "  another program has the port: choose another one, the same for all ranks."
            )
        return store


def call_roll(process: Process, store: Store, deadline: float) -> None:
    """Every rank registers, and rank 0 checks that each did so once and all agree on the number of ranks.

    Raises :class:`DistributedError` on every rank if not.
    """
    with library_errors(f"rank {process.rank} lost rank 0 while the processes met", DistributedError):
        if store.add(f"arrivals/{process.rank}", 1) > 1:
            fault = f"two processes have RANK={process.rank}; one is process {os.getpid()} on {socket.gethostname()}"
            store.set("fault", fault)
        else:
            store.set(f"world_size/{process.rank}", str(process.world_size))
            fault = _judge(process, store, deadline) if process.rank == 0 else _await_verdict(process, store, deadline)
    if fault:
        raise DistributedError(
            f"{fault}\n  each process needs a RANK of its own and the same WORLD_SIZE, as torchrun gives them."
        )


def _judge(process: Process, store: Store, deadline: float) -> str:
    """Rank 0's part: wait for all ranks, and send and return what is wrong, or ""."""
    arrived: set[int] = set()
    fault, notice = "", time.monotonic() + NOTICE_SECONDS
    while not fault and len(arrived) < process.world_size:
        if store.check(["fault"]):
            fault = store.get("fault").decode()
        for rank in set(range(process.world_size)) - arrived:
            if store.check([f"world_size/{rank}"]):
                arrived.add(rank)
                world = int(store.get(f"world_size/{rank}"))
                if world != process.world_size:
                    fault = f"rank {rank} has WORLD_SIZE={world}, rank 0 has {process.world_size}"
        missing = sorted(set(range(process.world_size)) - arrived)
        count = f"{len(arrived)} of {process.world_size} processes arrived, not rank{'s'[: len(missing) > 1]} "
        count += ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
        if missing and time.monotonic() > deadline:
            fault = fault or f"{count}; waited {JOIN_SECONDS:.0f} s"
        elif missing and time.monotonic() > notice:
            notice = float("inf")
            log.warning("%s; waiting up to %.0f s", count, JOIN_SECONDS)
        time.sleep(0.05)
    store.set("verdict", json.dumps([process.world_size, fault]))
    _wait_until(lambda: not fault or store.add("told", 0) >= len(arrived - {0}), LINGER_SECONDS)
    return fault


def _await_verdict(process: Process, store: Store, deadline: float) -> str:
    """Another rank's part: what rank 0 says is wrong, or ""."""
    try:  # not by asking again and again: thousands of ranks do this at the same time
        store.wait(["verdict"], timedelta(seconds=max(0.05, deadline + NOTICE_SECONDS - time.monotonic())))
    except dist.DistStoreError:
        return f"rank {process.rank} got no answer from rank 0 on whether all processes have arrived"
    world, fault = json.loads(store.get("verdict"))
    store.add("told", 1)
    if not fault and world != process.world_size:
        return f"rank {process.rank} has WORLD_SIZE={process.world_size}, rank 0 has {world}"
    return str(fault)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _within(seconds: float, function: Callable[[], _Result]) -> _Result | None:
    """The function's result, or None if it takes longer: it is left behind in its thread. What it raises is raised."""
    outcome: list[_Result | BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        return None
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]

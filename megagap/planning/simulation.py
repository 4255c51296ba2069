"""All ranks of a layout in one process: a thread for each, one of which runs at a time, with collectives between them.

The trainer's own code runs on every rank, with real values. No process groups of torch are made: while a simulation
runs, the modules that call ``torch.distributed`` call :class:`_Collectives` instead. What ranks call is matched as a
communication library would match it, but what it would hang on, or sum without a word, is found here and named.
"""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megagap.parallel.collectives
import megagap.parallel.pipeline
from megagap.errors import ranks_named
from megagap.parallel.layout import AXES, Layout, Members
from megagap.parallel.mesh import Axis, Mesh

CALLERS = (megagap.parallel.collectives, megagap.parallel.pipeline)
"""The modules that call ``torch.distributed`` in a step."""

RANDOM_ELEMENTS = 16
"""Tensors of at least as many elements are not the same on several ranks by chance. Smaller ones are counts."""


class SimulationFault(Exception):
    """The ranks do not agree on what they call: on real devices they would hang, or sum what does not belong together.

    Several lines name ranks and call sites.
    """


@dataclass(frozen=True)
class Call:
    """What one rank asked of one group."""

    operation: str
    elements: int
    """Of the tensor given."""
    dtype: torch.dtype
    site: str
    """The function of megagap that called it, and its line."""

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def agrees(self, other: "Call") -> bool:
        """Whether both can be the same collective."""
        return (self.operation, self.elements, self.dtype) == (other.operation, other.elements, other.dtype)

    def __str__(self) -> str:
        return f"{self.operation} of {self.elements:,} {str(self.dtype).removeprefix('torch.')} in {self.site}"


@dataclass(frozen=True, eq=False)
class SimulatedGroup:
    """One rank's handle of a group; stands where torch's process group would."""

    simulation: "Simulation"
    axis: str
    """The first axis that has these members."""
    members: Members
    rank: int
    """Global."""


@dataclass
class _Meeting:
    """One collective: what the members that have arrived have brought."""

    calls: dict[int, Call] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)


class _Work:
    """Handle of an operation in progress."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()

    def is_completed(self) -> bool:
        return self._wait is None


class Simulation:
    """Runs a function on every rank of a layout.

    ``calls``: by rank and by axis, what it called, in order. ``repeated``: call sites that summed a value that all
    members had already, with the axis.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.calls: dict[int, list[tuple[str, Members, Call]]] = defaultdict(list)
        self.repeated: dict[tuple[str, str], int] = {}
        self._axes = {members: axis for axis in reversed(AXES) for members in layout.groups(axis)}
        self._axes.setdefault(tuple(range(layout.world_size)), "world")
        self._meetings: dict[tuple[Members, int], _Meeting] = defaultdict(_Meeting)
        self._counts: dict[tuple[int, Members], int] = defaultdict(int)
        self._messages: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._receives: dict[tuple[int, int], int] = defaultdict(int)
        self._awaited: dict[int, tuple[Callable[[], bool], str]] = {}
        """What blocks each rank that waits."""
        self._turns = [threading.Semaphore(0) for _ in range(layout.world_size)]
        self._back = threading.Semaphore(0)
        self._cancelled = False

    def mesh(self, rank: int) -> Mesh:
        """A rank's mesh, whose groups are this simulation's."""
        mesh = Mesh.without_groups(self.layout, rank, torch.device("cpu"))
        axes = {name: self._with_group(mesh.axis(name), rank) for name in (*AXES, "world")}
        return replace(mesh, **axes)  # type: ignore[arg-type]

    def _with_group(self, axis: Axis, rank: int) -> Axis:
        if axis.size == 1:
            return axis
        group: Any = SimulatedGroup(self, self._axes[axis.ranks], axis.ranks, rank)
        return replace(axis, group=group)

    def run(self, function: Callable[[int, Mesh], Any]) -> list[Any]:
        """``function(rank, mesh)`` on every rank; the results by rank.

        Raises :class:`SimulationFault` if ranks call collectives that do not match or wait for ever, and what the
        function raises on the first rank on which it fails.
        """
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}

        def of_rank(rank: int) -> None:
            self._turns[rank].acquire()
            try:
                if not self._cancelled:
                    results[rank] = function(rank, self.mesh(rank))
            except _CancelledError:
                pass
            except BaseException as error:
                errors[rank] = error
            finally:
                self._back.release()

        ranks = range(self.layout.world_size)
        threads = [threading.Thread(target=of_rank, args=(rank,), daemon=True) for rank in ranks]
        with _collectives_simulated():
            for thread in threads:
                thread.start()
            try:
                self._take_turns(set(ranks), results, errors)
            finally:
                self._cancel(threads)
        if errors:
            raise errors[min(errors)]
        return [results[rank] for rank in ranks]

    def _take_turns(self, running: set[int], results: dict[int, Any], errors: dict[int, BaseException]) -> None:
        while running:
            ready = [rank for rank in sorted(running) if rank not in self._awaited or self._awaited[rank][0]()]
            if not ready:
                raise SimulationFault(self._deadlock(results))
            for rank in ready:
                self._awaited.pop(rank, None)
                self._turns[rank].release()
                self._back.acquire()
                if errors:
                    return
                if rank in results:
                    running.discard(rank)

    def _cancel(self, threads: Sequence[threading.Thread]) -> None:
        """End the ranks that still wait."""
        self._cancelled = True
        for rank, thread in enumerate(threads):
            if thread.is_alive():
                self._turns[rank].release()
        for thread in threads:
            thread.join()

    def _deadlock(self, finished: dict[int, Any]) -> str:
        places: dict[str, list[int]] = defaultdict(list)
        for rank, (_, what) in sorted(self._awaited.items()):
            places[what].append(rank)
        lines = ["ranks wait for each other:"]
        lines += [f"  {ranks_named(ranks)} in {what}" for what, ranks in places.items()]
        if finished:
            lines.append(f"  {ranks_named(sorted(finished))} reached the end of the step")
        return "\n".join(lines)

    # -- what ranks call

    def meet(self, group: SimulatedGroup, operation: str, tensor: Tensor) -> Callable[[], list[Tensor]]:
        """Start a collective. What it returns waits for all members, and has what each of them gave."""
        call = Call(operation, tensor.numel(), tensor.dtype, call_site())
        rank, members = group.rank, group.members
        self.calls[rank].append((group.axis, members, call))
        number = self._counts[rank, members]
        self._counts[rank, members] += 1
        meeting = self._meetings[members, number]
        for other, theirs in meeting.calls.items():
            if not call.agrees(theirs):
                raise SimulationFault(
                    f"call {number + 1} of the group {ranks_named(list(members))} (axis {group.axis}) is not the same "
                    f"on all members:\n  rank {other}: {theirs}\n  rank {rank}: {call}"
                )
        meeting.calls[rank] = call
        meeting.given[rank] = tensor.detach().clone()
        if len(meeting.given) == len(members):
            self._look_for_repetition(group.axis, meeting)

        def wait() -> list[Tensor]:
            self._wait(rank, lambda: len(meeting.given) == len(members), f"{call} (axis {group.axis})")
            return [meeting.given[member] for member in members]

        return wait

    def _look_for_repetition(self, axis: str, meeting: _Meeting) -> None:
        """Sums of a value that every member has already: it is then counted as often as there are members."""
        given = list(meeting.given.values())
        call = next(iter(meeting.calls.values()))
        if "sum" not in call.operation or call.elements < RANDOM_ELEMENTS or not given[0].any():
            return
        if all(torch.equal(given[0], other) for other in given[1:]):
            self.repeated.setdefault((call.site, axis), call.elements)

    def send(self, group: SimulatedGroup, tensor: Tensor, to: int) -> None:
        call = Call("send", tensor.numel(), tensor.dtype, call_site())
        self.calls[group.rank].append((group.axis, (group.rank, to), call))
        self._messages[group.rank, to].append(tensor.detach().clone())

    def receive(self, group: SimulatedGroup, tensor: Tensor, sender: int) -> Callable[[], None]:
        rank, site = group.rank, call_site()
        sent, number = self._messages[sender, rank], self._receives[sender, rank]
        self._receives[sender, rank] += 1  # in the order in which receives are posted, whatever is waited for first

        def wait() -> None:
            self._wait(rank, lambda: len(sent) > number, f"a receive from rank {sender} in {site}")
            message = sent[number]
            if message.shape != tensor.shape or message.dtype != tensor.dtype:
                raise SimulationFault(
                    f"rank {rank} expects {tensor.shape} of rank {sender}, which sends {message.shape}"
                )
            with torch.no_grad():
                tensor.copy_(message)

        return wait

    def _wait(self, rank: int, condition: Callable[[], bool], what: str) -> None:
        if condition():
            return
        self._awaited[rank] = (condition, what)
        self._back.release()
        self._turns[rank].acquire()
        if self._cancelled:
            raise _CancelledError


class _CancelledError(BaseException):
    """Unwinds a rank that waits when the simulation ends."""


class _Collectives:
    """Stands for ``torch.distributed`` in :data:`CALLERS`; what it lacks is torch's."""

    isend, irecv = "isend", "irecv"

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> _Work | None:
        is_sum = op == dist.ReduceOp.SUM
        wait = group.simulation.meet(group, f"all_reduce {'sum' if is_sum else 'max'}", tensor)

        def finish() -> None:
            given = torch.stack(wait())
            with torch.no_grad():
                tensor.copy_(given.sum(0) if is_sum else given.amax(0))

        return _started(finish, async_op)

    def all_gather(self, output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> _Work | None:
        wait = group.simulation.meet(group, "all_gather", tensor)

        def finish() -> None:
            with torch.no_grad():
                output.copy_(torch.cat([part.flatten() for part in wait()]).view_as(output))

        return _started(finish, async_op)

    def reduce_scatter(self, output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> _Work | None:
        wait = group.simulation.meet(group, "reduce_scatter sum", tensor)

        def finish() -> None:
            total = torch.stack(wait()).sum(0).flatten()
            place = group.members.index(group.rank) * output.numel()
            with torch.no_grad():
                output.copy_(total[place : place + output.numel()].view_as(output))

        return _started(finish, async_op)

    def all_to_all_single(self, output: Tensor, tensor: Tensor, group: Any, async_op: bool = False) -> _Work | None:
        wait = group.simulation.meet(group, "all_to_all", tensor)
        place = group.members.index(group.rank)

        def finish() -> None:
            with torch.no_grad():
                output.copy_(torch.stack([part[place] for part in wait()]))

        return _started(finish, async_op)

    def P2POp(self, how: str, tensor: Tensor, peer: int, group: Any) -> "_Transfer":
        return _Transfer(how, tensor, peer, group)

    def batch_isend_irecv(self, transfers: "Sequence[_Transfer]") -> list[_Work]:
        return [transfer.start() for transfer in transfers]


@dataclass(frozen=True)
class _Transfer:
    how: str
    tensor: Tensor
    peer: int
    group: SimulatedGroup

    def start(self) -> _Work:
        simulation = self.group.simulation
        if self.how == "isend":
            simulation.send(self.group, self.tensor, self.peer)
            return _Work()
        return _Work(simulation.receive(self.group, self.tensor, self.peer))


def _started(finish: Callable[[], None], async_op: bool) -> _Work | None:
    if async_op:
        return _Work(finish)
    finish()
    return None


@contextmanager
def _collectives_simulated() -> Iterator[None]:
    simulated = _Collectives()
    collectives = megagap.parallel.collectives
    new: list[tuple[Any, str, Any]] = [(module, "dist", simulated) for module in CALLERS]
    new += [
        (collectives, "_all_gather_flat", simulated.all_gather),
        (collectives, "_reduce_scatter_flat", simulated.reduce_scatter),
    ]
    old = [(module, name, getattr(module, name)) for module, name, _ in new]
    try:
        for module, name, value in new:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in old:
            setattr(module, name, value)


_BETWEEN = ("/parallel/collectives.py", "/planning/simulation.py")
"""Files whose functions are on the way from the caller of a collective to it."""


def call_site() -> str:
    """The function of megagap that calls a collective, its file and line."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        code = frame.f_code
        if (
            "/megagap/" in code.co_filename
            and not code.co_filename.endswith(_BETWEEN)
            and not code.co_qualname.startswith("Region.")
        ):
            break
        frame = frame.f_back
    file = frame.f_code.co_filename.rpartition("/megagap/")[2]
    return f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"

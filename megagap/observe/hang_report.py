"""The report of a hang: what each rank was doing when nothing went on any more, and which rank the others wait for."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from megagap.errors import ranks_named
from megagap.parallel.layout import AXES, Layout, Members

REPORT = "hang_report.txt"


class RankState(BaseModel):
    """What one rank is doing, as it says itself: the content of its file."""

    model_config = ConfigDict(strict=True, frozen=True)

    rank: Annotated[int, Field(ge=0)]
    host: str
    pid: int
    time: float
    """When it says so, in seconds since 1970."""
    idle_seconds: float
    """How long it has not moved on."""
    step: int
    doing: list[str]
    """Its open spans, the outermost first."""
    waits: bool
    """Whether it waits for other ranks, or for the device."""
    axis: str = ""
    """Of the collective that it waits in, with its number along this axis."""
    number: int = 0
    peer: int | None = None
    """The rank whose message it waits for."""
    collectives: Annotated[Counter[str], Field(strict=False)] = Counter()
    """Begun so far, by axis."""
    cause: str = ""
    """The error that ends it, if there is one."""
    stacks: str = ""

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        within = self.doing[1:] if self.doing[:1] == ["step"] else self.doing
        return " > ".join(within) or (
            f"step {self.step}, between two actions" if self.doing else "code that no span names"
        )


class Suspicion(BaseModel):
    """Which ranks probably keep the others waiting, and why they are named."""

    model_config = ConfigDict(frozen=True)

    ranks: list[int]
    reason: str

    def __str__(self) -> str:
        return f"{ranks_named(self.ranks)} {self.reason}" if self.ranks else self.reason


def suspected(states: Mapping[int, RankState], layout: Layout) -> Suspicion:
    """The ranks that probably keep the others waiting.

    In this order: ranks that say nothing, which are frozen or gone; ranks that do not wait for others, of these those
    with the fewest steps and collectives; and where all wait, those which most others wait for. A rank that is ahead of
    one that waits for it has left something out, which counts twice.
    """
    silent = [rank for rank in range(layout.world_size) if rank not in states]
    if silent:
        verb = "gives" if len(silent) == 1 else "give"
        return Suspicion(ranks=silent, reason=f"{verb} no sign of life: frozen, killed, or its machine is gone")
    busy = [state for state in states.values() if not state.waits]
    if busy:
        least = min(_progress(state) for state in busy)
        slowest = sorted((s for s in busy if _progress(s) == least), key=lambda state: -state.idle_seconds)
        verb = "stands" if len(slowest) == 1 else "stand"
        return Suspicion(ranks=[state.rank for state in slowest], reason=f"{verb} in {slowest[0].place}")
    votes: Counter[int] = Counter()
    for state in states.values():
        for other in awaited(state, states, layout):
            votes[other] += 2 if states[other].step > state.step else 1
    if not votes:
        places = " and ".join(sorted({state.place for state in states.values()}))
        reason = f"no rank: all have begun what they wait for, {places}; the network or a device may be at fault"
        return Suspicion(ranks=[], reason=reason)
    most = max(votes.values())
    ranks = sorted(rank for rank, count in votes.items() if count == most)
    verb = "waits" if len(ranks) == 1 else "wait"
    return Suspicion(ranks=ranks, reason=f"{verb} in {states[ranks[0]].place}, while others wait for it elsewhere")


def _progress(state: RankState) -> tuple[int, int]:
    return state.step, sum(state.collectives.values())


def awaited(state: RankState, states: Mapping[int, RankState], layout: Layout) -> list[int]:
    """The ranks without which ``state`` cannot go on: members of its collective that have not begun it."""
    if state.peer is not None:
        return [state.peer]
    if not state.axis:
        return []
    members: Members = tuple(range(layout.world_size))
    if state.axis in AXES:
        members = layout.members(state.axis, state.rank)
    return [rank for rank in members if rank not in states or states[rank].collectives[state.axis] < state.number]


def report(title: str, states: Mapping[int, RankState], layout: Layout, logged: Mapping[int, str]) -> str:
    """The whole text. ``logged``: what silent ranks have left in their logs."""
    return "\n".join([title, f"Suspected: {suspected(states, layout)}.", "", *_lines(states, layout, logged)]) + "\n"


def _lines(states: Mapping[int, RankState], layout: Layout, logged: Mapping[int, str]) -> Iterator[str]:
    for rank in range(layout.world_size):
        place = ", ".join(f"{axis} {at}" for axis, at in layout.coordinates(rank).items())
        if (state := states.get(rank)) is None:
            runs = "Python does not run: see its stack" if logged.get(rank) else "no sign of life"
            yield f"rank {rank} ({place}): {runs}"
            continue
        yield f"rank {rank} ({place}; process {state.pid} on {state.host}): step {state.step}, {state.place}"
        counts = ", ".join(f"{axis} {count}" for axis, count in sorted(state.collectives.items()))
        waits_for = awaited(state, states, layout)
        yield f"  for {state.idle_seconds:.1f} s" + (f"; waits for {ranks_named(waits_for)}" if waits_for else "")
        if counts:
            yield f"  collectives begun: {counts}"
        if state.cause:
            yield f"  {state.cause}"
    for rank in range(layout.world_size):
        text = states[rank].stacks if rank in states else logged.get(rank, "")
        if text:
            yield f"\n---- rank {rank}: stacks"
            yield text.rstrip()


def states_of(texts: Sequence[str]) -> dict[int, RankState]:
    """By rank, of the texts of files; what is damaged counts as nothing."""
    found = {}
    for text in texts:
        try:
            state = RankState.model_validate_json(text)
        except ValueError:
            continue
        found[state.rank] = state
    return found

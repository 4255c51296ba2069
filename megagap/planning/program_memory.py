"""What a rank holds of other microbatches and chunks, and of messages, while it computes an action of its program."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagap.parallel.actions import Action, Backward, BackwardInput, BackwardWeight, Compute, Forward, Transfer
from megagap.parallel.placement import Placement
from megagap.parallel.program import flow


class Occasion(NamedTuple):
    """Actions of a program that are alike."""

    kind: type[Compute]
    chunk: int
    fresh: bool
    """Whether no backward pass of the step has begun before."""


@dataclass(frozen=True)
class ChunkMemory:
    """What one microbatch keeps of a chunk, in bytes."""

    saved: int
    """From its forward to its backward pass, with what came in and what went out."""
    deferred: int
    """By deferred weight gradients, from the backward pass of its inputs on until they are computed."""


def most_beside(
    program: Sequence[Action],
    rank: int,
    placement: Placement,
    chunks: Sequence[ChunkMemory],
    border: int,
    most_batches: int,
) -> dict[Occasion, int]:
    """The most bytes that are there while an action is computed, besides its own.

    ``border``: of a message. It is there from where its receive is posted until it is read, and, of a gradient, from
    where it is made until its batch has ended, of which ``most_batches`` may be under way (``parallel/pipeline.py``).
    A sent activation is a part of what is saved anyway.
    """
    most: dict[Occasion, int] = {}
    sent: deque[int] = deque()
    live, fresh = 0, True
    for action in program:
        if isinstance(action, Transfer):
            while len(sent) >= most_batches:
                live -= sent.popleft()
            if action.sends:
                sent.append(border * sum(hop.message.kind == "gradient" for hop in action.sends))
            live += border * len(action.receives)
            continue
        needed, made = flow(action, rank, placement)
        chunk = chunks[action.chunk]
        # What a chunk of this rank hands on is, going forward, what it keeps as its output.
        if needed is not None and (needed.peer != rank or needed.message.kind == "gradient"):
            live -= border
        match action:
            case Backward() | BackwardInput():
                live -= chunk.saved
            case BackwardWeight():
                live -= chunk.deferred
        occasion = Occasion(type(action), action.chunk, fresh)
        most[occasion] = max(most.get(occasion, 0), live)
        fresh = fresh and isinstance(action, Forward)
        match action:
            case Forward():
                live += chunk.saved
            case BackwardInput():
                live += chunk.deferred
        if made is not None and made.message.kind == "gradient":
            live += border
    return most

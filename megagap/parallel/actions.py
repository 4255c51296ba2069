"""What a pipeline rank does: compute actions, which a schedule lists, and the transfers derived from them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, order=True)
class Forward:
    """Compute a microbatch's activations on this stage's ``chunk`` of layers."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, order=True)
class Backward:
    """Compute a microbatch's input gradient and weight gradients."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, order=True)
class BackwardInput:
    """Compute a microbatch's input gradient only; its weight gradients are deferred to :class:`BackwardWeight`."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, order=True)
class BackwardWeight:
    """Compute the weight gradients that :class:`BackwardInput` deferred."""

    microbatch: int
    chunk: int = 0


Compute = Forward | Backward | BackwardInput | BackwardWeight


@dataclass(frozen=True)
class Message:
    """One tensor between neighbours: an activation (forward) or its gradient (backward), at the boundary before
    virtual stage ``boundary``."""

    kind: Literal["activation", "gradient"]
    microbatch: int
    boundary: int


class Hop(NamedTuple):
    """A message on its way from or to another pipeline rank, or this one, whose own chunks can be neighbours."""

    peer: int
    """Pipeline rank."""
    message: Message


@dataclass(frozen=True)
class Transfer:
    """Sends and receives that form one batched action."""

    sends: tuple[Hop, ...]
    receives: tuple[Hop, ...]


Action = Compute | Transfer

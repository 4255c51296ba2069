"""What a pipeline rank does: compute actions, which a schedule lists, and the transfers derived from them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, order=True)
class _OfMicrobatch:
    microbatch: int
    chunk: int = 0
    """Of the rank's layers: its virtual stage."""


class Forward(_OfMicrobatch):
    """Compute a microbatch's activations on this stage's ``chunk`` of layers."""


class Backward(_OfMicrobatch):
    """Compute a microbatch's input gradient and weight gradients."""


class BackwardInput(_OfMicrobatch):
    """Compute a microbatch's input gradient only; its weight gradients are deferred to :class:`BackwardWeight`."""


class BackwardWeight(_OfMicrobatch):
    """Compute the weight gradients that :class:`BackwardInput` deferred."""


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

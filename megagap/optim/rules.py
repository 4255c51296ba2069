"""Update rules: what an optimizer does with a gradient. A new one is a file like ``adamw_rule.py`` and a line here."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from megagap.config import Optim
from megagap.ops.random_bits import Segment
from megagap.optim.adamw_rule import AdamW


class UpdateRule(Protocol):
    """How a slice of parameters is updated."""

    wants_matrices: bool
    """Whether it needs whole matrices; else any flat slice of parameters will do."""

    def new_state(self, gradient: Tensor) -> dict[str, Tensor]:
        """The state of a slice that was never updated, by kind as checkpoints name it; shaped like its
        ``gradient``, on its device."""
        ...

    def update(
        self,
        values: Tensor,
        remainder: Tensor | None,
        gradient: Tensor,
        state: dict[str, Tensor],
        updates: Tensor,
        segments: Sequence[Segment],
        *,
        lr: float,
        divisor: Tensor,
        reject: Tensor,
        decayed: bool,
    ) -> None:
        """Update a slice in place with ``gradient / divisor``, unless the device scalar ``reject`` is 1.

        Its fp32 masters are ``join(values, remainder)`` (``ops/remainder.py``). ``updates``: number of updates, this
        one included, fp32 device scalar; of no meaning where ``reject`` is 1. ``segments``: the parts of parameters
        in the slice, for rounding stochastically. ``decayed``: weight decay applies.
        """
        ...


RULES: dict[str, Callable[[Optim], UpdateRule]] = {"adamw": AdamW}
"""By the name that ``optim.name`` gives."""

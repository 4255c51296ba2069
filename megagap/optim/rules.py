"""Update rules: what an optimizer does with a gradient. A new one is a file like ``adamw_rule.py`` and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megagap.config import Optim
from megagap.optim.adamw_rule import AdamW


@dataclass
class State:
    """A rule's state for one owned slice."""

    tensors: dict[str, Tensor]
    """By kind, as checkpoints name it; shaped like the slice."""
    updates: Tensor
    """Number of updates made: fp32 device scalar, which the rule counts."""

    @classmethod
    def of(cls, rule: "UpdateRule", master: Tensor) -> "State":
        return cls(rule.new_state(master), torch.zeros((), dtype=torch.float32, device=master.device))


class UpdateRule(Protocol):
    """How a slice of parameters is updated."""

    wants_matrices: bool
    """Whether it needs whole matrices; else any flat slice of parameters will do."""

    def new_state(self, master: Tensor) -> dict[str, Tensor]:
        """The state of a slice that was never updated, by kind."""
        ...

    def update(
        self,
        master: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        updates: Tensor,
        *,
        lr: float,
        divisor: Tensor,
        reject: Tensor,
        decayed: bool,
        rounded: Tensor | None,
    ) -> None:
        """Update fp32 ``master`` in place with ``gradient / divisor``, unless the device scalar ``reject`` is 1; count
        it in ``updates``; write the result to ``rounded``, too, in its dtype. ``decayed``: weight decay applies."""
        ...


RULES: dict[str, Callable[[Optim], UpdateRule]] = {"adamw": AdamW}
"""By the name that ``optim.name`` gives."""

"""Update rules: what an optimizer does with a gradient. A new one is a file like ``adamw_rule.py`` and a line here."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from megagap.config import Optim
from megagap.ops.random_bits import Segment
from megagap.optim.adamw_rule import AdamW
from megagap.optim.muon_rule import Muon


class UpdateRule(Protocol):
    """How a slice of parameters is updated: any flat one will do."""

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


class MatrixRule(Protocol):
    """How the matrices of the layers are updated by a rule that needs each of them whole; AdamW updates the rest.

    Each rank prepares its slices; of each matrix one rank gets all that was prepared, and computes its update, parts of
    which each rank applies to its slices (``matrix_updates.py``). Arguments as of :class:`UpdateRule`.
    """

    def new_state(self, gradient: Tensor) -> dict[str, Tensor]: ...

    def prepare(
        self,
        gradient: Tensor,
        state: dict[str, Tensor],
        updates: Tensor,
        segments: Sequence[Segment],
        divisor: Tensor,
        reject: Tensor,
    ) -> Tensor:
        """Take ``gradient / divisor`` into the state of a slice, unless ``reject`` is 1. Returns what the update is
        computed from, of the slice's shape, in the dtype in which it travels."""
        ...

    def compute(self, matrix: Tensor) -> Tensor:
        """The update of a matrix [rows, columns], of its shape and dtype, from what its slices were prepared to."""
        ...

    def apply(
        self, values: Tensor, remainder: Tensor | None, update: Tensor, lr: float, reject: Tensor, decayed: bool
    ) -> None:
        """Change a part of a slice in place by its part of an update, unless ``reject`` is 1."""
        ...


RULES: dict[str, Callable[[Optim], UpdateRule]] = {"adamw": AdamW}
"""By the name that ``optim.name`` gives."""

MATRIX_RULES: dict[str, Callable[[Optim], MatrixRule]] = {"muon": Muon}
"""Likewise."""


def rules_of(optim: Optim) -> tuple[UpdateRule, MatrixRule | None]:
    """The rule for slices, and the one for the layers' matrices if they have one of their own."""
    matrix_rule = MATRIX_RULES.get(optim.name)
    return (RULES[optim.name](optim), None) if matrix_rule is None else (AdamW(optim), matrix_rule(optim))

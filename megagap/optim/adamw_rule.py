"""AdamW (Loshchilov & Hutter 2019, algorithm 2) as an update rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megagap.config import Optim
from megagap.ops import adamw_
from megagap.ops.random_bits import Segment
from megagap.ops.wide import wide_dtype


class AdamW:
    """Its state: both moments, fp32, or bf16 (``optim.moments_dtype``).

    In bf16 they are rounded stochastically, unless ``optim.rounding`` is nearest: of 8 significant bits, a second
    moment that falls by a factor of 0.999 per update would be rounded back to what it was.
    """

    def __init__(self, optim: Optim) -> None:
        self._optim = optim
        self._moments = torch.bfloat16 if optim.moments_dtype == "bf16" else None
        has_random = optim.rounding == "stochastic" or self._moments is not None
        self._is_stochastic = has_random and optim.rounding != "nearest"

    def new_state(self, gradient: Tensor) -> dict[str, Tensor]:
        dtype = self._moments or wide_dtype(gradient.dtype)
        return {kind: torch.zeros_like(gradient, dtype=dtype) for kind in ("exp_avg", "exp_avg_sq")}

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
        adamw_(
            values,
            state["exp_avg"],
            state["exp_avg_sq"],
            gradient,
            divisor=divisor,
            reject=reject,
            updates=updates,
            lr=lr,
            betas=self._optim.betas,
            eps=self._optim.eps,
            weight_decay=self._optim.weight_decay if decayed else 0.0,
            stochastic=segments if self._is_stochastic else None,
            remainder=remainder,
        )

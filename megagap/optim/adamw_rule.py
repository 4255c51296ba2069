"""AdamW (Loshchilov & Hutter 2019, algorithm 2) as an update rule."""

import torch
from torch import Tensor

from megagap.config import Optim
from megagap.ops import adamw_


class AdamW:
    """Its state: both moments, fp32."""

    wants_matrices = False

    def __init__(self, optim: Optim) -> None:
        self._optim = optim

    def new_state(self, gradient: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}

    def update(
        self,
        values: Tensor,
        remainder: Tensor | None,
        gradient: Tensor,
        state: dict[str, Tensor],
        updates: Tensor,
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
            remainder=remainder,
        )

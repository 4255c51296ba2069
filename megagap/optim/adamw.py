"""AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat fp32 slices."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megagap.config import Optim


@dataclass
class Moments:
    """AdamW's state for one flat slice: both moments, and the updates made so far (a device scalar)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.updates = torch.zeros((), dtype=torch.float32, device=self.exp_avg.device)

    @classmethod
    def zeros_like(cls, master: Tensor) -> "Moments":
        return cls(torch.zeros_like(master), torch.zeros_like(master))


def adamw_step(
    masters: list[Tensor],
    gradients: list[Tensor],
    moments: list[Moments],
    optim: Optim,
    *,
    lr: float,
    weight_decay: float,
    divisor: Tensor,
    reject: Tensor,
) -> None:
    """One update in place, in one fused pass. ``gradients`` are overwritten with their quotient by ``divisor``.

    ``divisor`` and ``reject`` are fp32 device scalars; where ``reject`` is 1 nothing changes, without a host sync.
    """
    adamw(
        masters,
        gradients,
        [m.exp_avg for m in moments],
        [m.exp_avg_sq for m in moments],
        [],
        [m.updates for m in moments],
        fused=True,
        grad_scale=divisor,
        found_inf=reject,
        amsgrad=False,
        beta1=optim.betas[0],
        beta2=optim.betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=optim.eps,
        maximize=False,
    )

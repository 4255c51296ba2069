"""The state of AdamW (Loshchilov & Hutter 2019, algorithm 2) for a flat slice."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """AdamW's state for one flat slice: both moments, and the number of updates so far (a device scalar)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.updates = torch.zeros((), dtype=torch.float32, device=self.exp_avg.device)

    @classmethod
    def zeros_like(cls, master: Tensor) -> "Moments":
        return cls(torch.zeros_like(master), torch.zeros_like(master))

"""Muon (Jordan et al. 2024), the rule for the layers' matrices: momentum whose every singular value becomes about 1.

Updates are scaled to the size of AdamW's, so that one learning rate and one weight decay suit both (Liu et al. 2025,
*Muon is Scalable for LLM Training*, section 2.2).
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from megagap.config import Optim
from megagap.ops.orthogonal import orthogonalised
from megagap.ops.random_bits import MOMENTS, Segment, round_stochastically_
from megagap.ops.remainder import join, split_
from megagap.ops.wide import wide, wide_dtype

RMS = 0.2
"""Root mean square of an update's elements per learning rate: that of AdamW's updates, as Liu et al. measured them."""


class Muon:
    """Its state: the momentum, fp32, or bf16 and rounded stochastically (``optim.moments_dtype``)."""

    def __init__(self, optim: Optim) -> None:
        self._optim = optim
        self._is_small = optim.moments_dtype == "bf16"

    def new_state(self, gradient: Tensor) -> dict[str, Tensor]:
        dtype = torch.bfloat16 if self._is_small else wide_dtype(gradient.dtype)
        return {"momentum": torch.zeros_like(gradient, dtype=dtype)}

    def prepare(
        self,
        gradient: Tensor,
        state: dict[str, Tensor],
        updates: Tensor,
        segments: Sequence[Segment],
        divisor: Tensor,
        reject: Tensor,
    ) -> Tensor:
        momentum, beta = state["momentum"], self._optim.momentum
        before, gradient = wide(momentum), wide(gradient) / divisor
        after = before.lerp(gradient, 1 - beta)
        ahead = gradient.lerp_(after, beta)  # Nesterov's: where the next gradient like this one would take it
        # Where the step is rejected everything stays as it is, which the host need not know.
        torch.where(reject == 0, after, before, out=before)
        if before is not momentum:
            for segment in segments:
                part = slice(segment.begin, segment.end)
                random = segment.random_bits(updates, MOMENTS) & 0xFFFF
                round_stochastically_(before[part], random, momentum[part])
        # Products in bf16 are as good here (Jordan et al.), and on a GPU many times as fast.
        return ahead.bfloat16() if ahead.is_cuda else ahead

    def compute(self, matrix: Tensor) -> Tensor:
        """All singular values 1 make a root mean square of 1 / sqrt(longer side)."""
        return orthogonalised(matrix).mul_(RMS * sqrt(max(matrix.shape)))

    def apply(
        self, values: Tensor, remainder: Tensor | None, update: Tensor, lr: float, reject: Tensor, decayed: bool
    ) -> None:
        accept = reject == 0
        kept = 1 - lr * self._optim.weight_decay * accept if decayed else 1.0
        master = wide(join(values, remainder)) * kept
        split_(master.sub_(torch.where(accept, update, 0), alpha=lr), values, remainder)

"""Dynamic loss scaling for gradients in fp16 (Micikevicius et al. 2018, section 3.2).

fp16 has no numbers below 6e-8, where many gradients are: the loss is multiplied by a factor before the backward pass,
and the gradients' norm and the update divide by it. Where gradients overflow, the step's update is not made and the
factor halves; after many steps without, it doubles. All of it is on the device, the same on every rank.
"""

import torch
from torch import Tensor

INITIAL, LARGEST = 2.0**16, 2.0**24
MARGIN = 16
"""Of :meth:`NoLossScale.cautious`."""
INTERVAL = 2000
"""Steps without overflow after which the factor doubles."""


class NoLossScale:
    """Of dtypes with fp32's range."""

    value: Tensor | None = None
    """The factor, fp32 scalar."""

    def scaled(self, value: Tensor) -> Tensor:
        return value

    def unscaled(self, value: Tensor) -> Tensor:
        return value

    def cautious(self) -> "NoLossScale":
        """One with a factor so much smaller that an overflow would be none of the factor's doing."""
        return self

    def update(self, grad_norm: Tensor) -> None:
        """After a step with this norm, unscaled."""

    def state(self) -> list[float]:
        """For a checkpoint."""
        return []

    def load_state(self, state: list[float]) -> None:
        """Continue with what :meth:`state` returned; of a run without loss scaling, from the beginning."""


class LossScale(NoLossScale):
    def __init__(self, device: torch.device) -> None:
        self.value: Tensor = torch.full((), INITIAL, device=device)
        self.steps = torch.zeros((), device=device)
        """Steps without overflow since it last changed, fp32 scalar."""

    def scaled(self, value: Tensor) -> Tensor:
        return value * self.value

    def unscaled(self, value: Tensor) -> Tensor:
        return value / self.value

    def cautious(self) -> "LossScale":
        scale = LossScale(self.value.device)
        scale.value.copy_((self.value / MARGIN).clamp(min=1.0))
        return scale

    def update(self, grad_norm: Tensor) -> None:
        fits = torch.isfinite(grad_norm)
        steps = torch.where(fits, self.steps + 1, 0)
        grows = steps >= INTERVAL
        factor = torch.where(fits, torch.where(grows, 2.0, 1.0), 0.5)
        self.value.copy_((self.value * factor).clamp(1.0, LARGEST))
        self.steps.copy_(torch.where(grows, 0, steps))

    def state(self) -> list[float]:
        return [self.value.item(), self.steps.item()]

    def load_state(self, state: list[float]) -> None:
        value, steps = state or (INITIAL, 0.0)
        self.value.fill_(value)
        self.steps.fill_(steps)

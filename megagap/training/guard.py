"""Decides, on the device and identically on every rank, whether a step's update is applied.

An update is refused where loss or gradients are not finite, where a loss has no gradient, where a step that was
computed twice gave two results, and, with ``guard.spikes = "skip"``, where the loss or the gradient norm spikes. All of
it is a function of numbers that are the same on every rank; the host reads the verdict later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagap.config import Guard, Model, Settings
from megagap.errors import ConfigError
from megagap.model.shapes import layer_of, model_tensors
from megagap.optim.clipping import squared_norm
from megagap.optim.gradient_store import GradientStore
from megagap.timeline import due

NORMAL = 1.4826
"""A normal distribution's standard deviation in units of its median absolute deviation."""

LEAST_SPREAD = 1e-4
"""Of a history, relative to its median: where numbers hardly vary, rounding is no spike."""


@dataclass(frozen=True)
class Verdict:
    """On one step: device tensors, the same on every rank."""

    accepted: Tensor
    """Whether the update is made, bool."""
    spike: Tensor
    """Whether the loss or the gradient norm is too far above the history, bool; false for steps that are not finite."""
    zscores: Tensor
    """Of the loss and of the gradient norm [2], NaN while the history is short; empty where none is kept."""


def accept_update(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """A device bool: both numbers, which are the same on all ranks, are finite, and there is a gradient.

    A loss without a gradient comes from weights so large that a norm's squares overflow: x / inf hides it as 0.
    """
    return torch.isfinite(loss) & torch.isfinite(grad_norm) & ((grad_norm > 0) | (loss == 0))


class History:
    """Loss and gradient norm of the last ``window`` accepted steps, fp32 on the device."""

    def __init__(self, window: int, device: torch.device) -> None:
        self.window = window
        self.values = torch.full((2, window), torch.nan, device=device)
        """[loss or norm, place]: a ring."""
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        """Steps added so far; the next one's place is this number mod window."""
        self._places = torch.arange(window, device=device)

    def zscores(self, values: Tensor) -> Tensor:
        """How far ``values`` [2] lie above the history, robustly (Iglewicz & Hoaglin 1993): their distance from the
        median in median absolute deviations, scaled to a normal distribution's standard deviation. NaN where the window
        is not full. Of an even number of values the lower of the two in the middle is the median."""
        middle = _median(self.values)
        spread = NORMAL * _median((self.values - middle[:, None]).abs())
        scores = (values - middle) / torch.maximum(spread, LEAST_SPREAD * middle.abs())
        return torch.where(self.count >= self.window, scores, torch.nan)

    def add(self, values: Tensor, accepted: Tensor) -> None:
        """Replace the oldest by ``values`` [2], where ``accepted``."""
        here = (self._places == self.count % self.window) & accepted
        self.values.copy_(torch.where(here, values[:, None], self.values))
        self.count += accepted

    def clear(self) -> None:
        self.values.fill_(torch.nan)
        self.count.zero_()

    def state(self) -> list[list[float]]:
        """[loss, norm] of each step, oldest first, for a checkpoint."""
        count = int(self.count)
        pairs: list[list[float]] = self.values.T.tolist()
        return pairs[:count] if count < self.window else pairs[count % self.window :] + pairs[: count % self.window]

    def load_state(self, pairs: Sequence[Sequence[float]]) -> None:
        """Continue after these steps; of more than fit, the newest stay."""
        self.clear()
        if kept := list(pairs)[-self.window :]:
            self.values[:, : len(kept)] = torch.tensor(kept, device=self.values.device).T
            self.count.fill_(len(kept))


def _median(values: Tensor) -> Tensor:
    """Of each row of [rows, n]. By sorting: torch's own median has no deterministic form on GPUs."""
    return values.sort(dim=1).values[:, (values.shape[1] - 1) // 2]


class StepGuard:
    """The verdict on each step, as ``[guard]`` asks for it."""

    def __init__(self, settings: Guard, model: Model, device: torch.device) -> None:
        self.settings = settings
        watches = settings.spikes != "off"
        self.history = History(settings.window, device) if watches else None
        self.layers = list(dict.fromkeys(map(layer_of, model_tensors(model)))) if watches else []
        """Names of the layers whose norms :meth:`squared_norms` tells apart."""

    def is_repeated(self, step: int) -> bool:
        """Whether ``step`` is computed twice."""
        return due(self.settings.replay_every, step)

    def is_hashed(self, step: int) -> bool:
        """Whether the gradients of ``step`` are hashed."""
        return self.is_repeated(step) or due(self.settings.hash_every, step)

    def are_replicas_compared(self, step: int) -> bool:
        """Whether replicas of parameters are compared in ``step``."""
        return self.settings.replicas_every > 0 and due(self.settings.replicas_every, step)

    def squared_norms(self, store: GradientStore) -> Tensor:
        """This rank's share of the squared gradient norm of each of :attr:`layers`, or of all of them where spikes are
        not looked for: fp32 [layers] or [1], whose sum over the world adds up to the squared global norm."""
        if not self.layers:
            return store.squared_norm()[None]
        parts: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        for bucket in store.buckets:
            if bucket.is_owned:
                for part in bucket.slices("gradient", bucket.own_gradient):
                    parts[layer_of(part.shard.name)].append(part.tensor)
        nothing = torch.zeros((), device=store.mesh.device)
        return torch.stack([squared_norm(own) if own else nothing for own in parts.values()])

    def judge(self, loss: Tensor, grad_norm: Tensor, differing: Tensor) -> Verdict:
        """The verdict on a step, which becomes part of the history where it is accepted.

        ``differing``: for each rank, whether its two computations of the step differ; empty where there was one.
        """
        accepted = accept_update(loss, grad_norm) & ~differing.any()
        if self.history is None:
            return Verdict(accepted, torch.zeros_like(accepted), loss.new_zeros(0))
        values = torch.stack([loss, grad_norm])
        zscores = self.history.zscores(values)
        spike = accepted & (zscores > self.settings.zscore).any()
        if self.settings.spikes == "skip":
            accepted = accepted & ~spike
        self.history.add(values, accepted)
        return Verdict(accepted, spike, zscores)

    def begin_phase(self) -> None:
        """Before the first step of a phase: another mixture has another loss."""
        if self.history is not None:
            self.history.clear()


def require_repeatable(settings: Settings, device: torch.device) -> None:
    """Raises :class:`ConfigError` where steps that are computed twice would differ without a fault of the machine."""
    every = settings.guard.replay_every
    if every and device.type == "cuda" and not settings.train.deterministic:
        raise ConfigError(
            f"guard.replay_every = {every} compares steps bit for bit, which on GPUs need not repeat\n"
            "  set train.deterministic = true, or guard.replay_every = 0."
        )

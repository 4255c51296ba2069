"""Learning-rate schedules: pure functions of the step."""

import math

from megagap.config.settings import Optim


def learning_rate(optim: Optim, steps: int, step: int) -> float:
    """The rate at ``step`` of ``steps``, counted from 1.

    A linear warmup reaches ``lr`` at step ``warmup_steps``; then ``constant``, or a ``linear`` or ``cosine`` decay that
    reaches ``min_lr`` at the last step, or ``wsd`` (warmup-stable-decay; Hu et al. 2024, section 4): constant until
    the last ``cooldown_steps``, in which the rate decays to ``min_lr``.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    match optim.schedule:
        case "constant":
            return optim.lr
        case "linear" | "cosine":
            # The warmup may take all steps, and a benchmark may run past the last.
            return _decay(optim, optim.schedule, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
        case "wsd":
            into_cooldown = step - (steps - optim.cooldown_steps)
            return (
                optim.lr
                if into_cooldown <= 0
                else _decay(optim, optim.cooldown_shape, into_cooldown / optim.cooldown_steps)
            )


def _decay(optim: Optim, shape: str, progress: float) -> float:
    """From lr at progress 0 to min_lr at progress 1; stays there beyond."""
    progress = min(progress, 1.0)
    remaining = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "sqrt": 1 - math.sqrt(progress),
    }[shape]
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining

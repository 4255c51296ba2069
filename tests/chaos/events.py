"""What can go wrong with a run, drawn by seed and number: what, where in the run, to whom, and how it starts again."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.subject import PHASES

LAUNCHER_KINDS = {"kill launcher": 2, "stop launcher": 2, "stop launcher twice": 1}
"""Kinds that need torchrun, with their weights in a draw, as below."""

RANK_KINDS = {
    "kill rank": 4,
    "kill all": 3,
    "kill writer": 5,
    "freeze rank, then kill": 2,
    "freeze rank, then continue": 2,
    "stop rank": 2,
    "stop all": 2,
    "stop all twice": 1,
    "file limit": 2,
    "flip bit": 2,
    "truncate": 2,
}

DISK_KINDS = {"full disk": 4}
"""Kinds that need a file system of their own."""

DAMAGE_KINDS = ("flip bit", "truncate")
STOP_KINDS = ("stop rank", "stop all", "stop launcher", "stop all twice", "stop launcher twice")
SAVE_KINDS = ("kill writer", "file limit", "full disk")
"""Kinds whose moment is a phase of a save."""

START_KINDS = ("kill all", "kill launcher", "stop all", "stop launcher")
"""Kinds that may come while a run still starts: the others would leave ranks to wait for one that never comes."""


@dataclass(frozen=True)
class Event:
    """One harm. Fractions become ranks, bytes and seconds once it is known how many there are."""

    number: int
    kind: str
    phase: str
    """``start-up``, ``step``, or one of :data:`PHASES`."""
    nth: int
    """Which occurrence of the phase in this start; for a step, about how many steps after the first."""
    delay: float
    """Seconds between the moment that the phase is reached and the harm."""
    target: float
    """Which rank; which file and byte."""
    amount: float
    """How much of a file remains writable or whole; how long somebody is frozen."""
    under_torchrun: bool
    next_layout: int | None
    """Number of another layout for the next start; None: the recipe's own."""

    def described(self) -> dict[str, Any]:
        return asdict(self)


def draw(seed: int, number: int, layouts: int, *, has_disk: bool, only: Sequence[str] = ()) -> Event:
    """The event with this number. ``layouts``: how many there are to choose from; ``only``: kinds to draw from."""
    generator = random.Random(f"{seed}:{number}")
    weights = RANK_KINDS | LAUNCHER_KINDS | (DISK_KINDS if has_disk else {})
    if only:
        weights = {kind: weight for kind, weight in weights.items() if kind in only}
    kind = generator.choices(list(weights), list(weights.values()))[0]
    if kind in SAVE_KINDS:
        phase = generator.choice(PHASES)
    elif kind in DAMAGE_KINDS:
        phase = "step"
    else:
        places = ["step"] * 4 + list(PHASES) + ["start-up"] * (2 if kind in START_KINDS else 0)
        phase = generator.choice(places)
    return Event(
        number=number,
        kind=kind,
        phase=phase,
        nth=generator.randint(1, 6) if phase in ("step", "writing", "removing") else generator.randint(1, 2),
        delay=generator.uniform(0, 0.2) if generator.random() < 0.6 else generator.uniform(0.2, 0.35),
        target=generator.random(),
        amount=generator.random(),
        under_torchrun=kind in LAUNCHER_KINDS or generator.random() < 0.05,
        next_layout=generator.randrange(layouts) if layouts > 1 and generator.random() < 0.07 else None,
    )

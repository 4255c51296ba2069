"""Layouts near one that does not hold, found by small changes of a recipe's own settings."""

import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.checkpoint import find_model
from megagap.config import Settings, load_recipe
from megagap.errors import MegagapError

MOST = 3
"""Layouts to name."""

TRIES = 200
"""Candidates to look at, the nearest first."""

LARGEST_TP = 64

DEFAULTS = {
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.cp": 1,
    "parallel.dp_replicate": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "optim.zero": 1,
}
"""What is changed, and what a recipe that does not say has."""


@dataclass(frozen=True)
class Change:
    """Settings that differ from the recipe's."""

    settings: dict[str, int]
    distance: float

    @property
    def arguments(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.settings.items()]

    def __str__(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self.settings.items())


def nearest_layouts(
    recipe: Path, overrides: Sequence[str], world_size: int, is_good: Callable[[Settings], bool] = lambda _: True
) -> list[Change]:
    """The nearest changes of tp, pp, cp, dp_replicate, ``optim.zero`` and batch sizes that make the recipe valid on so
    many ranks, and ``is_good``.

    Other settings stay; those that these changes do not allow (``layers_per_stage``, say) rule them out.
    """
    found: list[Change] = []
    for change in list(_candidates(_given(recipe, overrides), world_size))[:TRIES]:
        try:
            settings = load_recipe(
                recipe, [*overrides, *change.arguments], world_size, needs_data=False, find_model=find_model
            )
        except MegagapError:
            continue
        if is_good(settings):
            found.append(change)
        if len(found) == MOST:
            break
    return found


def _given(recipe: Path, overrides: Sequence[str]) -> dict[str, int]:
    """The numbers that the recipe asks for."""
    try:
        tree: dict[str, Any] = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = {}
    typed = dict(text.split("=", 1) for text in overrides)
    given = {}
    for name, default in DEFAULTS.items():
        section, key = name.split(".")
        table = tree.get(section)
        value = typed.get(name, table.get(key, default) if isinstance(table, dict) else default)
        text, least = str(value), 0 if name == "optim.zero" else 1
        given[name] = max(least, int(text)) if text.isascii() and text.isdecimal() and len(text) < 10 else default
    return given


def _candidates(given: dict[str, int], world_size: int) -> Iterator[Change]:
    changes = []
    parts = given["parallel.dp_replicate"]
    sizes = (
        (tp, pp, cp, replicate, micro, zero)
        for tp in _divisors(world_size, LARGEST_TP)
        for pp in _divisors(world_size // tp, world_size)
        for cp in sorted({1, given["parallel.cp"], 2 * given["parallel.cp"]})
        for replicate in ([1] if parts == 1 else _divisors(world_size // (tp * pp * cp), 2 * parts))
        for micro in sorted({given["train.micro_batch_size"], 1})
        for zero in sorted({given["optim.zero"], 3})
        if world_size % (tp * pp * cp) == 0
    )
    for tp, pp, cp, replicate, micro, zero in sizes:
        unit = world_size // (tp * pp * cp) * micro
        batch = given["train.global_batch_size"]
        for rounded in {batch // unit * unit, -(-batch // unit) * unit} - {0}:
            chosen = dict(zip(DEFAULTS, (tp, pp, cp, replicate, rounded, micro, zero), strict=True))
            changed = {name: value for name, value in chosen.items() if value != given[name]}
            if changed:
                # Powers of two apart; a change more than another counts, too.
                apart = sum(abs(math.log2((value or 1) / (given[name] or 1))) for name, value in changed.items())
                changes.append(Change(changed, apart + 0.5 * len(changed)))
    yield from sorted(changes, key=lambda change: (change.distance, str(change)))


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]

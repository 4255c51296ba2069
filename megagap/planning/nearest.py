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
    """The nearest changes of tp, pp and batch sizes with which the recipe is valid on so many ranks."""
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
    for name in ("parallel.tp", "parallel.pp", "train.global_batch_size", "train.micro_batch_size"):
        section, key = name.split(".")
        table = tree.get(section)
        value = typed.get(name, table.get(key, 1) if isinstance(table, dict) else 1)
        text = str(value)
        given[name] = int(text) if text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text) else 1
    return given


def _candidates(given: dict[str, int], world_size: int) -> Iterator[Change]:
    changes = []
    micro_batches = sorted({given["train.micro_batch_size"], 1})
    for tp in _divisors(world_size, LARGEST_TP):
        for pp in _divisors(world_size // tp, world_size):
            for micro in micro_batches:
                unit = world_size // (tp * pp) * micro
                batch = given["train.global_batch_size"]
                for rounded in {batch // unit * unit, -(-batch // unit) * unit} - {0}:
                    chosen = {
                        "parallel.tp": tp,
                        "parallel.pp": pp,
                        "train.global_batch_size": rounded,
                        "train.micro_batch_size": micro,
                    }
                    changed = {name: value for name, value in chosen.items() if value != given[name]}
                    if changed:
                        # Powers of two apart; a change more than another counts, too.
                        apart = sum(abs(math.log2(value / given[name])) for name, value in changed.items())
                        changes.append(Change(changed, apart + 0.5 * len(changed)))
    yield from sorted(changes, key=lambda change: (change.distance, str(change)))


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]

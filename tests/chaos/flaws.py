"""Faults that chaos must find, planted in a run: ``MEGAGAP_FLAW=said_early python tools/chaos.py RECIPE.toml``."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagap.checkpoint.save import point_latest_at
from megagap.resume import persistence
from megagap.training.step import TrainState

VARIABLE = "MEGAGAP_FLAW"


def _before_each_save(action: Callable[[Path], object]) -> None:
    save = persistence.save_checkpoint

    def flawed(folder: Path, slices: Any, state: Any, communicator: Any, **options: Any) -> None:
        if communicator.rank == 0:
            folder.parent.mkdir(exist_ok=True)
            action(folder)
        save(folder, slices, state, communicator, **options)

    persistence.save_checkpoint = flawed


def said_early() -> None:
    """A checkpoint is said to be saved before it is written."""

    def say(folder: Path) -> None:
        with open(folder.parents[1] / "events.jsonl", "a") as file:
            file.write(json.dumps({"event": "checkpoint", "folder": folder.name}) + "\n")

    _before_each_save(say)


def points_early() -> None:
    """``latest`` names a checkpoint before it is there."""
    _before_each_save(point_latest_at)


def forgets_moments() -> None:
    """A resumed run begins with moments of zero."""
    resume = persistence.resume

    def flawed(state: TrainState, *rest: Any) -> Any:
        start = resume(state, *rest)
        for part in state.optimizer.slices(owned_only=False):
            if part.kind != "weight":
                part.tensor.zero_()
        return start

    persistence.resume = flawed


FLAWS = {flaw.__name__: flaw for flaw in (said_early, points_early, forgets_moments)}


def plant() -> None:
    """What the environment asks for, if anything."""
    name = os.environ.get(VARIABLE)
    if name:
        FLAWS[name]()

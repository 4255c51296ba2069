"""All ranks stop at the same step although only one was told, wherever the run was when the signal came."""

import json
import os
import signal
from unittest.mock import patch

import pytest

from megagap.checkpoint import Index
from megagap.training import evaluations, keeper, trainer
from tests.recipes import write_recipe
from tests.training_run import train_recipe

PLACES = {
    "the first step": (trainer, "train_step"),
    "an evaluation": (evaluations, "evaluate"),
    "a save": (keeper, "save"),
    "the removal of old checkpoints": (keeper.CheckpointKeeper, "drop_old"),
}


def train_and_signal(rank, ranks, recipe, place):
    """The last rank gets a SIGTERM as it comes to ``place``; each rank returns what asked it to stop."""
    module, name = PLACES[place]
    original, told = getattr(module, name), []

    def with_signal(*arguments, **options):
        if rank == ranks - 1 and not told:
            os.kill(os.getpid(), signal.SIGTERM)
        told.append(name)
        return original(*arguments, **options)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with patch.object(module, name, with_signal):
            train_recipe(rank, ranks, recipe, [])
    finally:
        signal.signal(signal.SIGTERM, before)
    return len(told)


@pytest.mark.parametrize(("place", "last"), [(place, 1 + 2 * number) for number, place in enumerate(PLACES)])
def test_one_rank_told_stops_all_at_the_next_step_with_a_checkpoint(workers, tmp_path, place, last):
    every = dict(every=3, keep=1)
    recipe = write_recipe(tmp_path, train=dict(steps=40, evaluate_every=2), parallel=dict(pp=2), checkpoint=every)
    workers.run(2, train_and_signal, recipe, place)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and status["step"] <= last
    checkpoint = tmp_path / f"run/checkpoints/step_{status['step']:08}"
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"{checkpoint.name}\n"
    assert Index.read(checkpoint).state["step"] == status["step"]

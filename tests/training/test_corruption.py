"""Parameters that ranks hold alike are compared: a flipped bit ends the run, before it is saved."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

import megagap.training.trainer
from megagap.errors import CorruptionError
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def train_with_a_flipped_bit(rank, ranks, recipe, overrides, victim, when, axis):
    """The run's error, where rank ``victim`` has a bit of a parameter flipped right before or after its third step."""
    train_step = megagap.training.trainer.train_step

    def flipping(state, *rest):
        def flip():
            if rank == victim and state.step in (2, 3):
                state.optimizer.store.wait_for_parameters()
                buckets = [b for b in state.optimizer.store.buckets if (b.replicas is not None) == (axis == "tp")]
                values = buckets[-1].values
                if axis == "dp" and buckets[-1].shard.size > 1:  # a slice of another rank's: not written here
                    values = (
                        values[: buckets[-1].own.start] if buckets[-1].own.start else values[buckets[-1].own.stop :]
                    )
                values.view(torch.int32)[3] ^= 1 << 9

        if when == "before" and state.step == 2:
            flip()
        result = train_step(state, *rest)
        if when == "after" and state.step == 3:
            flip()
        return result

    with mock.patch.object(megagap.training.trainer, "train_step", flipping):
        try:
            train_recipe(rank, ranks, recipe, overrides)
        except CorruptionError as error:
            return str(error)
    return None


CASES = [
    ({}, 4, 2, "dp", [2]),
    ({}, 2, 1, "dp", [0, 1]),
    ({"tp": 2}, 2, 0, "tp", [0, 1]),
    ({"dp_replicate": 4}, 4, 3, "dp", [3]),
]
"""Layout, ranks, the one with the flipped bit, the axis that the parameter is replicated along, and who is named."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("parallel", "ranks", "victim", "axis", "named"), CASES, ids=str)
def test_a_flipped_bit_ends_the_run_unsaved_and_names_the_ranks(
    workers, tmp_path: Path, parallel, ranks, victim, axis, named, when
):
    """Compared in every step, or before the checkpoint only."""
    guard = dict(replicas_every=1 if when == "before" else 0)
    recipe = write_recipe(tmp_path, parallel=parallel, guard=guard, checkpoint=dict(every=3), train=dict(steps=6))
    errors = workers.run(ranks, train_with_a_flipped_bit, recipe, [], victim, when, axis)
    assert len(set(errors)) == 1 and errors[0].startswith("silent corruption: in step 3 the parameters of rank")
    assert ("differ from those of most" in errors[0]) == (len(named) == 1)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["ranks"] for event in events if event["event"] == "replicas_differ"] == [named]
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_replicas_are_equal_in_runs_without_a_fault(workers, tmp_path: Path, zero):
    recipe = write_recipe(
        tmp_path,
        model=dict(tie_word_embeddings=True),
        parallel=dict(pp=2, tp=2, dp_replicate=2 if zero else 1),
        optim=dict(zero=zero),
        guard=dict(replicas_every=1),
        train=dict(steps=3, precision="bf16-mixed"),
    )
    assert len(workers.run(8, train_recipe, recipe, [])[0]) == 3


def test_without_the_comparison_a_flipped_bit_is_not_noticed(workers, tmp_path: Path):
    recipe = write_recipe(tmp_path, guard=dict(replicas_every=-1), checkpoint=dict(every=3), train=dict(steps=3))
    assert workers.run(2, train_with_a_flipped_bit, recipe, [], 1, "after", "dp") == [None, None]

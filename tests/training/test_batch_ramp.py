"""Batch sizes that change in a run: at the promised token counts, in every layout, over stops and branches."""

import pytest

from megagap.errors import CheckpointError
from tests.recipes import write_recipe
from tests.training.test_phases import numbers
from tests.training_run import train_recipe

LENGTH = 32
RAMP = [[2 * 4 * LENGTH, 8], [(2 * 4 + 3 * 8) * LENGTH - 5, 16]]
"""From 4 sequences: two steps of them, three of 8, and 16 from then on, since a step ends after the second border."""
SIZES = [4, 4, 8, 8, 8, 16, 16]


@pytest.fixture(scope="module")
def whole(workers, tmp_path_factory):
    """A recipe with a ramp, and its metrics without an interruption."""
    folder = tmp_path_factory.mktemp("ramp")
    train = dict(steps=len(SIZES), global_batch_size=4, batch_ramp=RAMP, sequence_length=LENGTH)
    recipe = write_recipe(folder, train=train, optim={"schedule": "constant"}, checkpoint={"every": 1})
    return recipe, workers.run(1, train_recipe, recipe, [f"run.dir={folder / 'alone'}"])[0]


def test_steps_have_the_batch_sizes_of_the_ramp(whole):
    _, metrics = whole
    assert [m["consumed_samples"] for m in metrics] == [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    assert [m["consumed_tokens"] for m in metrics] == [LENGTH * sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    timed = [m["tokens_per_second"] * m["step_seconds"] for m in metrics]
    assert timed == pytest.approx([LENGTH * size for size in SIZES])


def test_the_samples_are_those_of_a_run_without_a_ramp(whole, workers, tmp_path):
    """Where no update changes the weights, the losses of 4 sequences each are those of the ramp's steps."""
    recipe, _ = whole
    frozen = ["optim.lr=1e-30", "optim.weight_decay=0"]
    flat = ["train.batch_ramp=[]", f"train.steps={sum(SIZES) // 4}"]
    (ramp,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'ramp'}", *frozen])
    (even,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'even'}", *frozen, *flat])
    losses = [m["loss"] for m in even]
    ends = [sum(SIZES[: i + 1]) // 4 for i in range(len(SIZES))]
    means = [sum(losses[end - size // 4 : end]) / (size // 4) for end, size in zip(ends, SIZES, strict=True)]
    assert [m["loss"] for m in ramp] == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize("layout", [dict(tp=2, pp=2), dict(pp=2), {}], ids=["tp2 pp2", "pp2", "dp2"])
def test_layouts_agree(whole, workers, tmp_path, layout):
    recipe, expected = whole
    ranks = 2 * layout.get("tp", 1)
    overrides = [f"run.dir={tmp_path}", *(f"parallel.{axis}={size}" for axis, size in layout.items())]
    metrics = workers.run(ranks, train_recipe, recipe, overrides)[0]
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in metrics] == pytest.approx([m[key] for m in expected], rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_going_on_within_a_ramp_and_at_its_borders_is_bit_exact(whole, workers, tmp_path, stop):
    recipe, expected = whole
    folder = recipe.parent / f"alone/checkpoints/step_{stop:08}"
    (metrics,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path}", f"checkpoint.load={folder}"])
    assert numbers(metrics) == numbers(expected[stop:])


def test_what_is_yet_to_come_of_a_ramp_may_change_and_positions_go_on(whole, workers, tmp_path):
    recipe, expected = whole
    folder = recipe.parent / "alone/checkpoints/step_00000003"
    changed = f"train.batch_ramp=[[{RAMP[0][0]}, 8], [{expected[2]['consumed_tokens']}, 2]]"
    (metrics,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path}", f"checkpoint.load={folder}", changed])
    assert [m["consumed_samples"] for m in metrics] == [4 + 4 + 8 + 2 * (i + 1) for i in range(4)]


def test_another_batch_size_is_refused_with_the_settings_that_go_on_with_it(whole, workers, tmp_path):
    recipe, expected = whole
    start = [f"run.dir={tmp_path}", f"checkpoint.load={recipe.parent / 'alone/checkpoints/step_00000004'}"]
    with pytest.raises(AssertionError) as error:
        workers.run(1, train_recipe, recipe, [*start, "train.global_batch_size=32", "train.batch_ramp=[]"])
    message = str(error.value)
    assert CheckpointError.__name__ in message
    assert "the steps made had 4 sequences, 8 from step 3; are now 32 sequences" in message
    advice = (
        f"train.global_batch_size = 4, train.batch_ramp = [[{RAMP[0][0]}, 8], [{expected[3]['consumed_tokens']}, 32]]"
    )
    assert advice in message
    overrides = [
        part.replace(" = ", "=") for part in (advice[: advice.index(", train")], advice[advice.index("train.b") :])
    ]
    (metrics,) = workers.run(1, train_recipe, recipe, [*start, *overrides])
    assert [m["consumed_samples"] for m in metrics] == [24 + 32 * (i + 1) for i in range(3)]

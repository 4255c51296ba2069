"""checkpoint.async: training goes on while a checkpoint is written, and a run never ends with one half done."""

import json
import threading
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from megagap.checkpoint import Index, background, find_latest, load_tensor, save
from megagap.errors import CheckpointError, NotWrittenError
from megagap.observe.metrics import read_metrics
from megagap.training import trainer
from tests.launching import SECONDS
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def events(run, name):
    found = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == name]


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(
        tmp_path, model={"num_hidden_layers": 1}, train={"steps": 6}, checkpoint={"every": 2, "async": True}
    )


@contextmanager
def written_after_step(last, then=lambda state: None):
    """No checkpoint is written before step ``last`` is made; ``then`` is called at its end."""
    made, train_step, save_checkpoint = threading.Event(), trainer.train_step, background.save_checkpoint

    def step(state, *rest):
        result = train_step(state, *rest)
        if state.step == last:
            try:
                then(state)
            finally:
                made.set()
        return result

    def save_then(*arguments, **options):
        assert made.wait(SECONDS), "training waited for the checkpoint"
        save_checkpoint(*arguments, **options)

    with patch.object(trainer, "train_step", step), patch.object(background, "save_checkpoint", save_then):
        yield


def train_ahead(rank, ranks, recipe, run, overrides, end):
    """Train with the checkpoint of step 2 written after step 3; what is there by then. ``end``: with an error then."""
    seen = []

    def look(state):
        seen.append((find_latest(run / "checkpoints"), events(run, "checkpoint") if rank == 0 else []))
        if end:
            raise ZeroDivisionError

    with written_after_step(3, look):
        try:
            train_recipe(rank, ranks, recipe, [f"run.dir={run}", *overrides])
        except ZeroDivisionError:
            assert end
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "end", "steps"),
    [([], False, [2, 4, 6]), (["run.stop_after=3"], False, [2, 3]), ([], True, [2])],
    ids=["to the end", "a stop meanwhile", "an error meanwhile"],
)
def test_training_goes_on_meanwhile_and_a_checkpoint_is_neither_announced_early_nor_left_undone(
    workers, recipe, tmp_path, ranks, overrides, end, steps
):
    run = tmp_path / "run"
    for seen in workers.run(ranks, train_ahead, recipe, run, overrides, end):
        assert seen == [(None, [])]
    saved = events(run, "checkpoint")
    assert [event["step"] for event in saved] == steps
    assert folders(run) == ["latest", *(event["folder"] for event in saved)]
    assert (run / "logs/rank_00000.log").read_text().count("INFO checkpoint ") == len(steps)
    for event in saved:
        folder = run / "checkpoints" / event["folder"]
        assert Index.read(folder).state["step"] == event["step"]
        assert event["stall_seconds"] > 0 and event["write_seconds"] > 0


def train_refused(rank, ranks, recipe, overrides, refused):
    """Train, with a disk too full for the checkpoints of the steps ``refused``; the error at the end, if any."""
    require_space = save._require_space

    def too_full(folder, needed):
        if int(folder.name[-8:]) in refused:
            raise OSError(28, "No space left on device")
        require_space(folder, needed)

    with patch.object(save, "_require_space", too_full):
        try:
            train_recipe(rank, ranks, recipe, overrides)
        except CheckpointError as error:
            return error
    return None


@pytest.mark.parametrize(("ranks", "in_background"), [(1, False), (2, False), (1, True), (2, True)])
def test_training_goes_on_where_a_disk_is_full_for_a_while(workers, recipe, tmp_path, ranks, in_background):
    run = tmp_path / "run"
    errors = workers.run(ranks, train_refused, recipe, [f"checkpoint.async={str(in_background).lower()}"], {2, 4})
    assert errors == [None] * ranks
    assert [event["step"] for event in events(run, "checkpoint_failed")] == [2, 4]
    assert [event["step"] for event in events(run, "checkpoint")] == [6]
    assert folders(run) == ["latest", "step_00000006"]
    assert [metrics["step"] for metrics in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    log = (run / "logs/rank_00000.log").read_text()
    assert "step_00000004 was not written" in log and "training goes on; earlier checkpoints are intact" in log


@pytest.mark.parametrize(("ranks", "in_background"), [(2, False), (2, True)])
@pytest.mark.parametrize("stop", [[], ["run.stop_after=5"]], ids=["the end", "a stop"])
def test_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_from_where_it_goes_on(
    workers, recipe, tmp_path, ranks, in_background, stop
):
    overrides = [f"checkpoint.async={str(in_background).lower()}", *stop]
    errors = workers.run(ranks, train_refused, recipe, overrides, {5, 6})
    for error in errors:
        assert isinstance(error, NotWrittenError) and "step_00000004" in str(error) and "free some space" in str(error)
    assert find_latest(tmp_path / "run/checkpoints").name == "step_00000004"


def train_with_a_bug(rank, ranks, recipe):
    """Train with a bug in what commits a checkpoint, which no later try would mend; the error and the step it met."""
    met = []
    step = trainer.train_step

    def counting(state, *rest):
        met.append(state.step + 1)
        return step(state, *rest)

    with (
        patch.object(save, "_commit", lambda *arguments: 1 / 0),
        patch.object(trainer, "train_step", counting),
        pytest.raises(CheckpointError, match="ZeroDivisionError") as raised,
    ):
        train_recipe(rank, ranks, recipe, ["train.steps=1000", "checkpoint.every=900"])
    return raised.type is CheckpointError, met[-1]


def train_asked_to_save(rank, ranks, recipe):
    """:func:`train_with_a_bug` at the first step, after which a checkpoint is asked for."""
    if rank == 0:
        folder = recipe.parent / "run"
        folder.mkdir()
        (folder / "SAVE").touch()
    return train_with_a_bug(rank, ranks, recipe)


def test_a_bug_in_the_writer_ends_the_run_on_every_rank_at_one_step(workers, recipe):
    (first, step), (second, same) = workers.run(2, train_asked_to_save, recipe)
    assert first and second and step == same < 900


HALF = 4
"""Steps until the restart: within an epoch, and between two borders of the ramp."""


def contents(folder):
    index = Index.read(folder)
    state = {key: value for key, value in index.state.items() if key not in ("run", "checkpoint")}
    tensors = [(tensor.kind, tensor.name) for tensor in index.tensors]
    return state, {key: load_tensor(folder, index, *key) for key in tensors}


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("fp32", "adamw"),
        ("bf16-mixed", "muon"),
        ("bf16-pure", "adamw"),
        ("fp16-mixed", "muon"),
        pytest.param("fp32", "muon", marks=pytest.mark.long),
        pytest.param("bf16-mixed", "adamw", marks=pytest.mark.long),
        pytest.param("bf16-pure", "muon", marks=pytest.mark.long),
        pytest.param("fp16-mixed", "adamw", marks=pytest.mark.long),
    ],
)
def test_2n_steps_are_n_a_restart_and_n_bit_for_bit(workers, tmp_path, precision, optimizer):
    """Mid-epoch, mid-ramp, with the guard's history."""
    recipe = write_recipe(
        tmp_path,
        model={"num_hidden_layers": 1},
        train={
            "steps": 2 * HALF,
            "precision": precision,
            "global_batch_size": 4,
            "batch_ramp": [[2 * 4 * 32, 8], [(2 * 4 + 4 * 8) * 32, 16]],
        },
        optim={"name": optimizer},
        checkpoint={"every": HALF, "async": True},
        guard={"spikes": "skip", "window": 4},
    )
    ranks = 2 if optimizer == "muon" else 1
    whole = workers.run(ranks, train_recipe, recipe, [f"run.dir={tmp_path / 'whole'}"])[0]
    parts = [f"run.dir={tmp_path / 'parts'}"]
    workers.run(ranks, train_recipe, recipe, [*parts, f"run.stop_after={HALF}"])
    resumed = workers.run(ranks, train_recipe, recipe, parts)[0]
    for key in ("loss", "grad_norm", "consumed_samples", "lr"):
        assert [m[key] for m in resumed] == [m[key] for m in whole] and len(whole) == 2 * HALF, key
    ends = [contents(tmp_path / run / f"checkpoints/step_{2 * HALF:08}") for run in ("whole", "parts")]
    (state, tensors), (same_state, same_tensors) = ends
    assert state == same_state and len(state["guard_history"]) == 4
    assert tensors.keys() == same_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, same_tensors[key]), key

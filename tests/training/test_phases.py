"""Training in phases: lengths, wavelengths, counts of tokens, and going on in the middle of one and at its border."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megagap.checkpoint import load_model
from megagap.config import load_recipe
from megagap.data.indexed import IndexedDatasetWriter
from megagap.errors import CheckpointError, DataError
from megagap.training.datasets import validation_data
from tests.recipes import VOCABULARY, write_recipe, write_tokens
from tests.training_run import train_recipe

FR, EN = {"path": "fr_text_document", "weight": 0.7}, {"path": "en_text_document", "weight": 0.3}
STEP = 8 * 32
"""Tokens of a step of the first phase."""
PHASES = [
    {"name": "short", "tokens": 4 * STEP - 5, "sources": [FR, EN]},
    {"name": "long", "tokens": 3 * 2 * STEP, "sources": [EN], "sequence_length": 64, "rope_theta": 10.0},
    {"name": "back", "tokens": 2 * STEP, "sources": [FR, EN]},
]


def recipe_in_phases(folder, phases=PHASES, **changes):
    train = {"steps": 0, "evaluate_every": 1, "evaluate_samples": 4} | changes.pop("train", {})
    model = {"initializer_range": 0.2}  # with the usual 0.02, attention hardly depends on positions
    optim = {"schedule": "constant"}  # whose rates do not depend on the length of the run
    return write_recipe(
        folder, data={"sources": [], "phases": phases}, model=model, train=train, optim=optim, **changes
    )


def numbers(metrics):
    return [{key: m[key] for key in m if "seconds" not in key and "second" not in key
             and key not in ("tflops_per_device", "mfu", "memory_bytes")} for m in metrics]  # fmt: skip


@pytest.fixture(scope="module")
def whole(workers, tmp_path_factory):
    """A recipe in three phases, and its metrics without an interruption."""
    folder = tmp_path_factory.mktemp("phases")
    recipe = recipe_in_phases(folder, checkpoint={"every": 1})
    return recipe, workers.run(1, train_recipe, recipe, [f"run.dir={folder / 'alone'}"])[0]


def test_phases_count_their_own_tokens_and_end_at_whole_steps(whole):
    recipe, metrics = whole
    lengths = [32] * 4 + [64] * 3 + [32] * 2
    assert [m["consumed_tokens"] for m in metrics] == [8 * sum(lengths[: i + 1]) for i in range(9)]
    assert [m["consumed_samples"] for m in metrics] == [8 * (i + 1) for i in range(9)]
    timed = [m["tokens_per_second"] * m["step_seconds"] for m in metrics]
    assert timed == pytest.approx([8 * length for length in lengths])
    assert [sorted(key for key in m if key.startswith("loss/")) for m in metrics[3:5]] == [
        ["loss/en", "loss/fr"],
        ["loss/en"],
    ]
    events = [json.loads(line) for line in (recipe.parent / "alone/events.jsonl").read_text().splitlines()]
    begun = [(e["phase"], e["first_step"], e["sequence_length"]) for e in events if e["event"] == "phase"]
    assert begun == [("short", 1, 32), ("long", 5, 64), ("back", 8, 32)]


@pytest.mark.parametrize("stop", [2, 4, 6, 7])
def test_going_on_in_a_phase_and_at_its_border_is_bit_exact(whole, workers, tmp_path, stop):
    recipe, expected = whole
    folder = recipe.parent / f"alone/checkpoints/step_{stop:08}"
    (metrics,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path}", f"checkpoint.load={folder}"])
    assert numbers(metrics) == numbers(expected[stop:])


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, ["parallel.pp=2", "parallel.tp=2"]), (2, ["parallel.cp=2", "optim.zero=3"])],
    ids=["pp2 tp2", "cp2 zero 3"],
)
def test_layouts_agree_over_phases(whole, workers, tmp_path, ranks, layout):
    recipe, expected = whole
    # No checkpoints, before which a step is tried: so the last evaluation of a phase is followed by the next phase.
    overrides = [f"run.dir={tmp_path}", "checkpoint.every=0", *layout]
    metrics = workers.run(ranks, train_recipe, recipe, overrides)[0]
    for key in ("loss", "validation_loss"):
        ours, theirs = ([m[key] for m in run if key in m] for run in (metrics, expected))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_wavelengths_are_those_of_the_phase(whole, workers, tmp_path):
    recipe, expected = whole
    phases = [PHASES[0], PHASES[1] | {"rope_theta": 1e6}, PHASES[2]]
    shutil.copytree(recipe.parent, tmp_path / "x", ignore=shutil.ignore_patterns("alone"))
    (metrics,) = workers.run(1, train_recipe, recipe_in_phases(tmp_path / "x", phases), ["train.steps=5"])
    assert [m["loss"] for m in metrics[:4]] == [m["loss"] for m in expected[:4]]
    assert metrics[4]["loss"] != expected[4]["loss"]


def test_a_checkpoint_names_the_wavelengths_that_it_was_trained_with_last(whole):
    folder = whole[0].parent / "alone/checkpoints"
    thetas = [load_model(folder / f"step_{step:08}").settings.rope_theta for step in (4, 5, 7, 8)]
    assert thetas == [1e4, 10.0, 10.0, 1e4]


def start_from(whole, workers, tmp_path, step, phases):
    """Go on from a step of the run under other phases."""
    recipe, _ = whole
    shutil.copytree(recipe.parent, tmp_path / "x", ignore=shutil.ignore_patterns("alone"))
    folder = recipe.parent / f"alone/checkpoints/step_{step:08}"
    changed = recipe_in_phases(tmp_path / "x", phases)
    return workers.run(1, train_recipe, changed, [f"checkpoint.load={folder}"])[0]


def test_later_phases_may_change_when_a_run_goes_on(whole, workers, tmp_path):
    later = [PHASES[0], PHASES[1] | {"tokens": 2 * 2 * STEP}, PHASES[2] | {"sources": [FR], "sequence_length": 64}]
    metrics = start_from(whole, workers, tmp_path, 5, later)
    assert metrics[0]["loss"] == whole[1][5]["loss"] and metrics[1]["loss"] != whole[1][6]["loss"]


@pytest.mark.parametrize(
    ("phases", "complaint"),
    [
        ([PHASES[0], PHASES[1] | {"sequence_length": 48}], "data.phases[1].sequence_length was 64, is 48"),
        ([PHASES[0], PHASES[1] | {"rope_theta": 2e6}, PHASES[2]], "data.phases[1].rope_theta was 10.0, is"),
        ([PHASES[0] | {"sources": [FR]}, *PHASES[1:]], "data.phases[0].sources was"),
        ([PHASES[0] | {"tokens": STEP}, *PHASES[1:]], "short 4, long 3; are now short 1, long 3, back 2"),
    ],
)
def test_what_was_trained_on_may_not_change(whole, workers, tmp_path, phases, complaint):
    with pytest.raises(AssertionError) as error:
        start_from(whole, workers, tmp_path, 7, phases)
    assert CheckpointError.__name__ in str(error.value) and complaint in str(error.value)


def test_a_single_phase_can_be_followed_by_others(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 4}, optim={"schedule": "constant"})
    workers.run(1, train_recipe, recipe, [])
    recipe = recipe_in_phases(tmp_path, train={"evaluate_every": 0})
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    assert [m["step"] for m in metrics] == list(range(1, 10))


def test_a_data_set_that_was_rebuilt_between_starts_is_refused_naming_it(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 2})
    workers.run(1, train_recipe, recipe, [])
    with IndexedDatasetWriter(str(tmp_path / "en_text_document"), np.dtype("uint16")) as writer:
        for _ in range(100):
            writer.add_document(np.arange(50) % VOCABULARY)
    with pytest.raises(AssertionError) as error:
        workers.run(1, train_recipe, recipe, ["train.steps=3"])
    assert DataError.__name__ in str(error.value) and "source en was rebuilt since" in str(error.value)
    assert "documents was 60, is 100" in str(error.value)


def test_a_source_of_more_shards_than_it_had_is_refused(workers, tmp_path):
    workers.run(1, train_recipe, write_recipe(tmp_path, train={"steps": 2}), [])
    more = EN | {"path": ["en_text_document", "fr_text_document"]}
    with pytest.raises(AssertionError, match=r"source en was rebuilt since .*: shards: it had 1, has 2"):
        workers.run(1, train_recipe, write_recipe(tmp_path, data={"sources": [FR, more]}), [])


def test_a_data_set_of_which_nothing_was_read_yet_may_be_rebuilt(workers, tmp_path):
    recipe = recipe_in_phases(tmp_path, [PHASES[0] | {"sources": [FR]}, PHASES[1]])
    workers.run(1, train_recipe, recipe, ["train.steps=3"])
    write_tokens(tmp_path / "en_text_document", 5)
    (metrics,) = workers.run(1, train_recipe, recipe, ["train.steps=5"])
    assert len(metrics) == 5
    write_tokens(tmp_path / "en_text_document", 6)
    with pytest.raises(AssertionError) as error:
        workers.run(1, train_recipe, recipe, [])
    assert "source en was rebuilt since" in str(error.value)


def test_the_document_mask_trains_alike_in_every_layout(workers, tmp_path):
    train = {"steps": 4, "evaluate_every": 2, "evaluate_samples": 3}
    recipe = write_recipe(tmp_path, data={"document_mask": True}, train=train)
    (expected,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'one'}"])
    for split in ("tp", "pp"):
        layout = [f"run.dir={tmp_path / split}", f"parallel.{split}=2"]
        metrics = workers.run(4, train_recipe, recipe, layout)[0]
        for key in ("loss", "grad_norm"):
            assert [m[key] for m in metrics] == pytest.approx([m[key] for m in expected], rel=1e-5)
        assert metrics[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-5)
    (without,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'w'}", "data.document_mask=false"])
    assert without[0]["loss"] != expected[0]["loss"]


def test_evaluation_with_a_document_mask_is_that_of_each_document_by_itself(workers, tmp_path):
    train = {"steps": 2, "evaluate_every": 2, "evaluate_samples": 3}
    recipe = write_recipe(tmp_path, data={"document_mask": True}, train=train)
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    model, held_out = load_model(tmp_path / "run"), validation_data(load_recipe(recipe))
    losses = []
    for tokens, positions in zip(held_out.batch("fr", 0, 3), held_out.positions("fr", 0, 3), strict=True):
        for document in np.split(tokens, np.flatnonzero(positions[1:] == 0) + 1):
            if len(document) > 1:
                row = torch.from_numpy(document)
                with torch.no_grad():
                    losses += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none").tolist()
    assert len(losses) < 3 * 32
    assert metrics[-1]["validation_loss/fr"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_megatron_order_trains_and_its_length_may_not_change(workers, tmp_path):
    recipe = write_recipe(tmp_path, data={"order": "megatron"}, train={"steps": 3})
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    assert len(metrics) == 3
    with pytest.raises(AssertionError) as error:
        workers.run(1, train_recipe, recipe, ["train.steps=4"])
    assert "train.steps was 3, is 4: Megatron's order depends on it" in str(error.value)


def test_a_resolved_recipe_in_phases_loads_to_the_same_settings(whole):
    recipe, _ = whole
    settings = load_recipe(recipe)
    assert settings.train.steps == 9
    assert [p.sequence_length for p in settings.data.phases] == [32, 64, 32]
    again = load_recipe(recipe.parent / "alone/config.toml", [f"run.dir={settings.run.dir}"])
    assert again == settings

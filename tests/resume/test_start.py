"""The start of a run says which weights it loads, which settings changed, and where its learning rate rises again."""

import json
import logging
import tomllib

import pytest

from megagap.checkpoint.huggingface import export
from megagap.checkpoint.huggingface_import import import_model
from megagap.checkpoint.index import INDEX_NAME
from megagap.config import load_recipe, timeline_of
from megagap.observe.run_directory import RunDirectory
from megagap.resume.differences import Change, differences
from megagap.resume.start import Start, warn_of_rising_rate
from tests.recipes import write_recipe
from tests.training_run import train_recipe

SMALL = {"num_hidden_layers": 1}


def recipe_of(folder, **changes):
    constant = {"schedule": "constant"} | changes.pop("optim", {})
    steps = {"steps": 2} | changes.pop("train", {})
    return write_recipe(folder, model=SMALL, optim=constant, train=steps, **changes)


def log_of(run):
    return (run / "logs/rank_00000.log").read_text()


def events(run, name):
    records = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == name]


def changes_of(run):
    """What each start but the first listed, by setting."""
    return [
        {change["setting"]: (change["before"], change["after"]) for change in event["changes"]}
        for event in events(run, "settings_changed")
    ]


def test_the_start_line_says_where_the_weights_come_from(workers, tmp_path):
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    workers.run(1, train_recipe, recipe, [])
    assert "tokens, from scratch\n" in log_of(run)
    workers.run(1, train_recipe, recipe, ["train.steps=3"])
    folder = run / "checkpoints/step_00000002"
    assert f"3 steps on 768 tokens, from step 2, resumed from {folder}\n" in log_of(run)

    seed = f"checkpoint.load={folder}"
    for name, mode, told in (
        ("branch", "continue", f'from step 2, with weights and optimizer state of {folder} (load_mode "continue")'),
        ("new", "model", f'from step 0 with the weights of {folder}, written at step 2 of its run (load_mode "model")'),
    ):
        new = [seed, f"checkpoint.load_mode={mode}", f"run.dir={tmp_path / name}", "train.steps=3"]
        workers.run(1, train_recipe, recipe, new)
        assert f"tokens, {told}\n" in log_of(tmp_path / name) and "from scratch" not in log_of(tmp_path / name)


def test_every_setting_that_changed_between_two_starts_is_listed_and_the_config_before_is_kept(workers, tmp_path):
    run = tmp_path / "run"
    sources = [{"path": "fr_text_document", "weight": 0.7}, {"path": "en_text_document", "weight": 0.3}]
    phases = [{"name": "one", "tokens": 512, "sources": sources}, {"name": "two", "tokens": 512, "sources": sources}]
    recipe = recipe_of(tmp_path, data={"sources": [], "phases": phases}, train={"steps": 0})
    workers.run(1, train_recipe, recipe, ["train.steps=2"])
    before = (run / "config.toml").read_bytes()
    assert changes_of(run) == [] and "changed" not in log_of(run)

    overrides = ["optim.lr=1e-3", "optim.betas=[0.8, 0.9]", "optim.decay_embeddings=true", "data.document_mask=true"]
    overrides += ["checkpoint.every=1", "train.steps=3", "parallel.tp=2"]
    phases[1]["sources"] = [sources[0], sources[1] | {"weight": 0.5}]
    recipe = recipe_of(tmp_path, data={"sources": [], "phases": phases}, train={"steps": 0})
    workers.run(4, train_recipe, recipe, overrides)
    expected = {
        "optim.lr": (3e-3, 1e-3),
        "optim.betas": ([0.9, 0.95], [0.8, 0.9]),
        "optim.decay_embeddings": (False, True),
        "data.document_mask": (False, True),
        "data.phases[1].sources[1].weight": (0.3, 0.5),
        "checkpoint.every": (0, 1),
        "train.steps": (2, 3),
        "parallel.tp": (1, 2),
        "parallel.sequence_parallel": (False, True),
        "processes": (1, 4),
        "layout.dp": (1, 2),
    }
    assert changes_of(run) == [expected]
    log = log_of(run)
    assert log.count("changed since the last start: ") == len(expected)
    assert "changed since the last start: data.phases[1].sources[1].weight was 0.3, is 0.5\n" in log
    assert "optim.betas was [0.9, 0.95], is [0.8, 0.9]\n" in log and "decay_embeddings was false, is true\n" in log
    assert (run / "config_before_step_00000002.toml").read_bytes() == before
    assert events(run, "settings_changed")[0]["config_before"] == "config_before_step_00000002.toml"
    assert load_recipe(run / "config.toml").optim.lr == 1e-3


def test_nothing_is_listed_or_kept_where_nothing_changed(workers, tmp_path):
    recipe, run = recipe_of(tmp_path, train={"steps": 3, "evaluate_every": 2, "evaluate_samples": 2}), tmp_path / "run"
    for _ in range(3):
        workers.run(1, train_recipe, recipe, ["run.stop_after=1"])
    assert len(events(run, "start")) == 3
    assert changes_of(run) == [] and not list(run.glob("config_*")) and "changed" not in log_of(run)


def test_several_starts_from_one_step_keep_each_config_once(workers, tmp_path):
    """The second and third start end before a checkpoint: as if they were killed."""
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    workers.run(1, train_recipe, recipe, [])
    for lr in ("1e-3", "1e-3", "2e-3", "1e-3"):
        workers.run(1, train_and_lose, recipe, ["train.steps=3", f"optim.lr={lr}"])
    kept = {path.name: tomllib.loads(path.read_text())["optim"]["lr"] for path in run.glob("config_*")}
    assert kept == {
        "config_before_step_00000002.toml": 3e-3,
        "config_before_step_00000002_2.toml": 1e-3,
        "config_before_step_00000002_3.toml": 2e-3,
    }
    assert [changes["optim.lr"] for changes in changes_of(run)] == [(3e-3, 1e-3), (1e-3, 2e-3), (2e-3, 1e-3)]


def train_and_lose(rank, ranks, recipe, overrides):
    """Train, and leave nothing of what it did but config.toml and events."""
    checkpoints = recipe.parent / "run/checkpoints"
    train_recipe(rank, ranks, recipe, overrides)
    (checkpoints / "latest").write_text("step_00000002\n")


def test_a_run_that_branches_from_anothers_checkpoint_lists_what_differs_from_it(workers, tmp_path):
    recipe = recipe_of(tmp_path)
    workers.run(1, train_recipe, recipe, [])
    branch = [f"checkpoint.load={tmp_path / 'run'}", f"run.dir={tmp_path / 'branch'}", "train.steps=3", "optim.lr=1e-4"]
    workers.run(1, train_recipe, recipe, branch)
    assert changes_of(tmp_path / "branch") == [{"train.steps": (2, 3), "optim.lr": (3e-3, 1e-4)}]
    assert "changed since step_00000002: optim.lr was 0.003, is 0.0001\n" in log_of(tmp_path / "branch")


def test_the_wavelengths_of_a_phase_are_no_change_of_the_recipes(workers, tmp_path):
    sources = [{"path": "fr_text_document"}]
    phases = [{"name": "one", "tokens": 128, "sources": sources, "rope_theta": 2e4}]
    phases += [{"name": "two", "tokens": 512, "sources": sources}]
    recipe = recipe_of(tmp_path, data={"sources": [], "phases": phases})
    workers.run(1, train_recipe, recipe, ["run.stop_after=1"])
    branch = [f"checkpoint.load={tmp_path / 'run'}", f"run.dir={tmp_path / 'branch'}", "run.stop_after=1"]
    workers.run(1, train_recipe, recipe, branch)
    assert changes_of(tmp_path / "branch") == []
    other = [f"checkpoint.load={tmp_path / 'run'}", f"run.dir={tmp_path / 'other'}", "model.rope_theta=3e4"]
    workers.run(1, train_recipe, recipe, [*other, "run.stop_after=1"])
    assert changes_of(tmp_path / "other")[0]["model.rope_theta"] == (1e4, 3e4)


def test_a_config_that_cannot_be_compared_is_kept_and_said(workers, tmp_path):
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    workers.run(1, train_recipe, recipe, [])
    (run / "config.toml").write_text("half a li")
    workers.run(1, train_recipe, recipe, ["train.steps=3"])
    assert "config.toml: it is not valid TOML" in log_of(run)
    assert (run / "config_before_step_00000002.toml").read_text() == "half a li"
    assert changes_of(run) == [{"train.steps": (2, 3)}]  # compared with the checkpoint


def test_a_setting_that_an_older_config_lacks_is_no_change(workers, tmp_path):
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    workers.run(1, train_recipe, recipe, [])
    config = tomllib.loads((run / "config.toml").read_text())
    lines = (run / "config.toml").read_text().splitlines(keepends=True)
    assert "tensorboard_every" in config["run"]
    (run / "config.toml").write_text("".join(line for line in lines if "tensorboard_every" not in line))
    workers.run(1, train_recipe, recipe, ["train.steps=3"])
    assert changes_of(run) == [{"train.steps": (2, 3)}]


def test_weights_of_a_checkpoint_without_a_step_are_told_as_loaded(workers, tmp_path):
    """As those that come from Hugging Face."""
    recipe = recipe_of(tmp_path)
    workers.run(1, train_recipe, recipe, [])
    export(tmp_path / "run/checkpoints/step_00000002", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "base")
    new = [f"checkpoint.load={tmp_path / 'base'}", "checkpoint.load_mode=model", f"run.dir={tmp_path / 'new'}"]
    workers.run(1, train_recipe, recipe, new)
    assert f'tokens, from step 0 with the weights of {tmp_path}/base (load_mode "model")\n' in log_of(tmp_path / "new")
    workers.run(1, train_recipe, recipe, [*new, "train.steps=3"])
    assert f"from step 2, resumed from {tmp_path}/new/checkpoints/step_00000002\n" in log_of(tmp_path / "new")


def test_long_values_are_cut_in_messages_only():
    change = Change("data.sources[0].path", [], [f"shard_{i}" for i in range(100)])
    assert len(str(change)) < 220 and str(change).endswith("…") and len(change.as_dict()["after"]) == 100


def test_lists_of_other_lengths_and_missing_settings_are_whole():
    assert list(differences({"a": [{"b": 1}], "c": 1}, {"a": [], "d": {"e": None}})) == [
        Change("a", [{"b": 1}], []),
        Change("d", None, {"e": None}),
        Change("c", 1, None),
    ]


@pytest.mark.parametrize(
    ("optim", "step", "steps", "told"),
    [
        (
            {"schedule": "wsd", "cooldown_steps": 4},
            10,
            20,
            "0 at step 10, 0.003 at step 11; its cooldown",
        ),
        ({"schedule": "wsd", "cooldown_steps": 4}, 8, 20, "0.0015 at step 8, 0.003 at step 9"),
        ({"schedule": "wsd", "cooldown_steps": 4}, 8, 11, ""),
        ({"schedule": "wsd", "cooldown_steps": 4}, 6, 20, ""),  # the cooldown has not begun
        ({"schedule": "wsd", "cooldown_steps": 4}, 8, 10, ""),  # nothing changed
        ({"schedule": "cosine"}, 10, 20, "its cosine decay had begun after step 2"),
        ({"schedule": "cosine"}, 6, 20, "its cosine decay"),
        ({"schedule": "cosine"}, 6, 10, ""),
        ({"schedule": "cosine"}, 2, 20, ""),
        ({"schedule": "linear", "min_lr": 1e-3}, 10, 20, "0.001 at step 10"),
        ({"schedule": "constant"}, 10, 20, ""),
    ],
    ids=str,
)
def test_a_learning_rate_that_rises_again_is_warned_of(tmp_path, caplog, optim, step, steps, told):
    recipe = write_recipe(tmp_path, optim=optim)
    saved = load_recipe(recipe).model_dump(mode="json")
    settings = load_recipe(recipe, [f"train.steps={steps}"])
    with caplog.at_level(logging.WARNING, "megagap"):
        start = Start(step, tmp_path / f"step_{step:08}", saved=saved)
        warn_of_rising_rate(start, timeline_of(settings), RunDirectory(tmp_path, is_writer=False))
    assert (told in caplog.text) if told else not caplog.records


@pytest.mark.parametrize("loaded", [".", "disk"], ids=["of the run directory", "of a node's disk"])
@pytest.mark.parametrize(("at", "named"), [((2, 4, 6, 8), 6), ((2, 4, 8), 4), ((8,), None)])
def test_the_warning_names_the_checkpoint_to_branch_from(tmp_path, caplog, at, named, loaded):
    run = RunDirectory(tmp_path, is_writer=False)
    for step in at:
        (run.checkpoints / f"step_{step:08}").mkdir(parents=True)
        (run.checkpoints / f"step_{step:08}" / INDEX_NAME).touch()
    recipe = write_recipe(tmp_path, optim={"schedule": "wsd", "cooldown_steps": 4})
    folder = run.checkpoints / loaded / "step_00000008"
    start = Start(8, folder, is_own=True, saved=load_recipe(recipe).model_dump(mode="json"))
    with caplog.at_level(logging.WARNING, "megagap"):
        timeline = timeline_of(load_recipe(recipe, ["train.steps=20"]))
        warn_of_rising_rate(start, timeline, run)
    if named is None:
        assert f"there is none in {run.checkpoints}" in caplog.text
    else:
        assert f"--checkpoint.load {run.checkpoints}/step_{named:08}." in caplog.text


def test_a_finished_run_that_is_continued_past_its_cooldown_warns(workers, tmp_path):
    recipe, run = (
        recipe_of(tmp_path, optim={"schedule": "wsd", "cooldown_steps": 2}, train={"steps": 4}),
        tmp_path / "run",
    )
    workers.run(1, train_recipe, recipe, ["checkpoint.every=2"])
    assert "rises again" not in log_of(run)
    workers.run(1, train_recipe, recipe, ["train.steps=8"])
    assert "WARNING the learning rate rises again: 0 at step 4, 0.003 at step 5" in log_of(run)
    assert [event["after"] for event in events(run, "learning_rate_rises")] == [3e-3]
    (folder,) = [line.split("--checkpoint.load ")[1][:-1] for line in log_of(run).splitlines() if "branch" in line]
    branch = [f"checkpoint.load={folder}", f"run.dir={tmp_path / 'branch'}", "train.steps=8"]
    workers.run(1, train_recipe, recipe, branch)
    assert "rises again" not in log_of(tmp_path / "branch")

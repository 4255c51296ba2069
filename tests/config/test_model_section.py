"""A recipe may leave out the model where weights are loaded: it comes from their checkpoint."""

import ast
import json
import runpy
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch

from megagap.checkpoint import Index, find_model, save_checkpoint
from megagap.config import StoredModel, load_recipe
from megagap.errors import CheckpointError, ConfigError
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from tests.launching import finish, launch
from tests.models import SCALING, tiny_model
from tests.recipes import write_recipe, write_tokens
from tests.training_run import train_recipe

ROOT = Path(__file__).parents[2]
MODEL = tiny_model(rope_theta=20_000.0, rope_scaling=SCALING, rms_norm_eps=1e-6, tie_word_embeddings=True)


def write_base(folder: Path, model=MODEL, **state) -> Path:
    """A checkpoint of random weights, as from-hf writes."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for name, shape in model_tensors(model).items():
        shard = whole(name, shape)
        parts.append(Slice("weight", shard, 0, shard.numel, 0.02 * torch.randn(shard.numel, generator=generator)))
    progress = {"step": 0, "updates": 0, "consumed_samples": 0, "consumed_tokens": 0}
    save_checkpoint(folder, parts, progress | {"model": model.model_dump(mode="json")} | state)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


def without_model(folder: Path, base: Path | None = None, mode: str = "model", **changes) -> Path:
    for seed, name in enumerate(("fr", "en")):
        write_tokens(folder / f"{name}_text_document", seed, vocabulary=61)
    load = {"load": str(base), "load_mode": mode} if base else {}
    path = write_recipe(folder, checkpoint=load, train={"steps": 3} | changes.pop("train", {}), **changes)
    tree = tomllib.loads(path.read_text())
    tree["model"] = changes.get("model", {})
    if not tree["model"]:
        del tree["model"]
    path.write_text(tomli_w.dumps(tree))
    return path


def load(recipe, *overrides, **more):
    return load_recipe(recipe, overrides, find_model=find_model, **more)


def test_the_model_comes_from_the_folder_that_is_loaded(tmp_path, base):
    settings = load(without_model(tmp_path, base))
    assert settings.model == MODEL
    assert settings.notes == (f"[model] comes from {base}",)


@pytest.mark.parametrize("place", ["recipe", "command line"])
def test_what_the_recipe_gives_of_the_model_stands_over_the_checkpoints(tmp_path, base, place):
    own = {"rope_theta": 1e6} if place == "recipe" else {}
    recipe = without_model(tmp_path, base, model=own)
    settings = load(recipe, *([] if own else ["model.rope_theta=1e6"]))
    assert settings.model == MODEL.model_copy(update={"rope_theta": 1e6})
    assert settings.notes == (f"[model] comes from {base}, with the recipe's rope_theta = 1000000.0",)


def test_a_complete_model_is_taken_as_it_stands(tmp_path, base):
    recipe = without_model(tmp_path, base, model={"preset": "tiny"})
    settings = load(recipe)
    assert (settings.model.hidden_size, settings.model.rope_scaling, settings.notes) == (64, None, ())


def test_the_name_of_a_preset_that_is_no_longer_known_is_not_taken_over(tmp_path):
    base = write_base(tmp_path / "base", MODEL.model_copy(update={"preset": "llama9"}))
    assert load(without_model(tmp_path, base)).model == MODEL


def test_without_a_checkpoint_the_error_names_the_settings_the_presets_and_the_way_to_leave_them_out(tmp_path):
    recipe = without_model(tmp_path, model={"hidden_size": 32})
    for find in (None, find_model):
        with pytest.raises(ConfigError) as error:
            load_recipe(recipe, find_model=find)
        message = str(error.value)
        assert "1 fault" in message and "model.num_hidden_layers, model.num_attention_heads" in message
        assert "model.hidden_size" not in message and "model.rope_theta" not in message
        assert "model.preset" in message and "tiny, llama3-8b, llama3.1-8b" in message and "gaperon-8b" in message
        assert "checkpoint.load = a folder" in message and f"{tmp_path / 'run'} has none" in message


def test_other_faults_are_told_beside_the_missing_model(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(without_model(tmp_path), "train.micro_batch_size=3", "model.hiden_size=32")
    assert "3 faults" in str(error.value) and "does not divide" in str(error.value)
    assert "did you mean model.hidden_size?" in str(error.value)


def test_a_checkpoint_that_is_missing_or_damaged_is_a_checkpoint_error(tmp_path, base):
    recipe = without_model(tmp_path, base)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(recipe, f"checkpoint.load={tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError) as error:
        load(recipe, f"checkpoint.load={tmp_path / 'nowhere'}", "train.micro_batch_size=3")
    assert "2 faults" in str(error.value) and "is to come from a checkpoint" in str(error.value)
    index = base / "index.json"
    whole_text = index.read_text()
    index.write_text(whole_text[:-20])
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load(recipe)
    index.write_text(whole_text)
    (base / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rank_00000"):
        load(recipe)


def test_a_checkpoint_of_another_version_is_refused_naming_the_field(tmp_path):
    save_checkpoint(tmp_path / "odd", [], {"model": MODEL.model_dump(mode="json") | {"num_experts": 4}})
    with pytest.raises(CheckpointError, match=r"state\.model\.num_experts"):
        load(without_model(tmp_path, tmp_path / "odd"))


def test_starting_from_scratch_takes_no_model_from_a_run_that_was_there(tmp_path):
    write_base(tmp_path / "run/checkpoints/step_00000001")
    recipe = without_model(tmp_path)
    assert load(recipe).model == MODEL
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        load(recipe, 'checkpoint.load=""')


def test_the_runs_own_checkpoint_goes_before_the_folder(tmp_path, base):
    grown = MODEL.model_copy(update={"max_position_embeddings": 128})
    own = write_base(tmp_path / "run/checkpoints/step_00000001", grown)
    for overrides in ([], [f"checkpoint.load={tmp_path / 'nowhere'}"]):
        settings = load(without_model(tmp_path, base), *overrides)
        assert settings.model == grown and str(own) in settings.notes[0]


@pytest.mark.parametrize(("mode", "theta"), [("continue", 3e4), ("model", 2e4)])
def test_a_new_run_starts_from_wavelengths_as_last_trained_a_continued_one_from_its_recipes(tmp_path, mode, theta):
    base = write_base(tmp_path / "base", recipe_rope_theta=3e4)
    assert load(without_model(tmp_path, base, mode=mode)).model.rope_theta == theta


def test_only_the_finder_that_is_given_is_asked(tmp_path, base):
    asked = []

    def find(run, wanted, mode):
        asked.append((run, wanted, mode))
        return StoredModel(base, MODEL)

    recipe = without_model(tmp_path, base)
    assert load_recipe(recipe, find_model=find).model == MODEL
    load_recipe(recipe, ["model.preset=tiny"], find_model=find)
    assert asked == [(tmp_path / "run", str(base), "model")]


def test_training_on_several_ranks_starts_from_it_resumes_and_records_it(tmp_path, base):
    recipe = without_model(tmp_path, base, train={"steps": 2})
    code, output = finish(launch(recipe, 2, "--parallel.tp", "2"))
    assert code == 0, output
    assert f"[model] comes from {base}" in output
    config = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert config["model"] == MODEL.model_dump(exclude_none=True)
    shutil.rmtree(base)  # the run's own checkpoint is enough from here on
    code, output = finish(launch(recipe, 1, "--train.steps", "3"))
    assert code == 0, output
    own = tmp_path / "run/checkpoints/step_00000002"
    assert f"[model] comes from {own}" in output and f"[model] comes from {own}" in log_of(tmp_path / "run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def log_of(run: Path) -> str:
    return (run / "logs/rank_00000.log").read_text()


def test_a_run_in_phases_resumes_with_the_wavelengths_of_its_recipe(workers, tmp_path, base):
    """A checkpoint says which ones the weights were last trained with; the next phases may have the recipe's again."""
    sources = [{"path": "fr_text_document"}]
    tokens = 8 * 32
    phases = [
        {"name": "a", "tokens": tokens, "sources": sources},
        {"name": "b", "tokens": tokens, "sources": sources, "rope_theta": 5e4},
        {"name": "c", "tokens": tokens, "sources": sources},
    ]
    data = {"sources": [], "phases": phases, "split": "100,0,0"}
    recipe = without_model(tmp_path, base, train={"steps": 0}, data=data)
    workers.run(1, train_recipe, recipe, ["train.steps=2", "optim.warmup_steps=0"])
    assert Index.read(tmp_path / "run/checkpoints/step_00000002").state["model"]["rope_theta"] == 5e4
    settings = load(recipe)
    assert settings.model.rope_theta == MODEL.rope_theta
    assert [phase.rope_theta for phase in settings.data.phases] == [2e4, 5e4, 2e4]
    workers.run(1, train_recipe, recipe, ["optim.warmup_steps=0"])
    assert "theta" not in log_of(tmp_path / "run")


def test_every_program_that_reads_recipes_finds_the_model():
    programs = [*ROOT.glob("tools/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("megagap/**/*.py")]
    calls = [
        (path, call)
        for path in programs
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) == "load_recipe"
    ]
    assert len(calls) >= 6
    for path, call in calls:
        assert "find_model" in [keyword.arg for keyword in call.keywords], f"{path}:{call.lineno}"


def tool(name: str, *arguments: object, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / name))["main"]([*map(str, arguments)])
    return capsys.readouterr().out


def test_tools_read_such_a_recipe_too(tmp_path, base, monkeypatch, capsys):
    recipe = without_model(tmp_path, base)
    shown = tool("inspect_data.py", recipe, "--step", "1", "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert len(json.loads(shown)) == 8
    traced = tool("trace_step.py", recipe, "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert json.loads(traced)

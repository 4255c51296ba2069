"""Going on, or starting from weights, with a longer context, other wavelengths or a larger vocabulary."""

import json
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagap.checkpoint import Index, load_model, load_tensor
from megagap.checkpoint.huggingface import export
from megagap.config import Model, load_recipe
from megagap.errors import CheckpointError
from megagap.resume.changes import refuse_another_model
from tests.models import SCALING
from tests.recipes import VOCABULARY, write_recipe
from tests.training_run import train_recipe

STILL = ["optim.lr=1e-30", "optim.warmup_steps=0"]
"""Leaves weights as they are: an update is far below their precision."""
GROWN = VOCABULARY + 22
"""Also divided by no tp."""
SCALING_TOML = (
    "model.rope_scaling={" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in SCALING.model_dump().items()) + "}"
)


def stored(run, step, kind="weight"):
    """All tensors of a kind in a run's checkpoint, by name."""
    folder = run / f"checkpoints/step_{step:08}"
    index = Index.read(folder)
    return {name: load_tensor(folder, index, kind, name) for name in index.names(kind)}


def log_of(run):
    return (run / "logs/rank_00000.log").read_text()


@pytest.fixture(scope="module")
def seeds(workers, tmp_path_factory):
    """By whether embeddings are tied: a recipe and its run of two steps."""
    found = {}
    for tied in (False, True):
        folder = tmp_path_factory.mktemp("seed")
        model = {"tie_word_embeddings": tied, "num_hidden_layers": 3}
        recipe = write_recipe(folder, model=model, train={"steps": 2}, optim={"schedule": "constant"})
        workers.run(2, train_recipe, recipe, ["parallel.tp=2"])
        found[tied] = recipe
    return found


@pytest.fixture(scope="module")
def fresh(workers, tmp_path_factory, seeds):
    """By whether embeddings are tied: a new run with the larger vocabulary."""
    found = {}
    for tied, recipe in seeds.items():
        found[tied] = tmp_path_factory.mktemp("fresh")
        grown = [f"model.vocab_size={GROWN}", "train.steps=1", *STILL]
        workers.run(1, train_recipe, recipe, [*grown, f"run.dir={found[tied]}"])
    return found


def refused_before_it_is_built(rank, ranks, recipe, overrides):
    """The message of the refusal. Building any model would be an AssertionError."""
    not_reached = patch("megagap.training.trainer.build_state", side_effect=AssertionError)
    with not_reached, pytest.raises(CheckpointError) as refusal:
        train_recipe(rank, ranks, recipe, overrides)
    return str(refusal.value)


@pytest.mark.parametrize("mode", ["continue", "model"])
def test_a_model_that_a_checkpoint_does_not_fit_is_refused_before_it_is_built(workers, tmp_path, seeds, mode):
    """It may be far larger than the checkpoint's, and than the machine's memory."""
    recipe = seeds[False]
    loading = [f"checkpoint.load={recipe.parent / 'run'}", f"checkpoint.load_mode={mode}", f"run.dir={tmp_path}"]
    (message,) = workers.run(1, refused_before_it_is_built, recipe, ["model.hidden_size=1048576", *loading])
    assert "model.hidden_size was 64, is 1048576" in message


@pytest.mark.parametrize("mode", ["continue", "model"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, []), (2, ["parallel.tp=2"]), (2, ["parallel.pp=2"]), (4, ["parallel.tp=2", "parallel.pp=2"]), (2, [])],
    ids=["one", "tp2", "pp2", "tp2 pp2", "dp2"],
)
def test_a_larger_vocabulary_keeps_all_rows_and_starts_new_ones_like_a_new_model(
    workers, tmp_path, seeds, fresh, ranks, layout, tied, mode
):
    recipe = seeds[tied]
    steps = 3 if mode == "continue" else 1
    grown = [f"model.vocab_size={GROWN}", f"train.steps={steps}", *STILL, *layout]
    loading = [f"checkpoint.load={recipe.parent / 'run'}", f"checkpoint.load_mode={mode}"]
    workers.run(ranks, train_recipe, recipe, [*grown, *loading, f"run.dir={tmp_path / 'grown'}"])

    before, after = stored(recipe.parent / "run", 2), stored(tmp_path / "grown", steps)
    new = stored(fresh[tied], 1)
    assert before.keys() == after.keys() == new.keys()
    names = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    for name, tensor in after.items():
        if name in names:
            assert len(tensor) == GROWN
            torch.testing.assert_close(tensor[:VOCABULARY], before[name], rtol=0, atol=0)
            torch.testing.assert_close(tensor[VOCABULARY:], new[name][VOCABULARY:], rtol=0, atol=0)
            assert tensor[VOCABULARY:].std() > 0
        else:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    line = f"model.vocab_size was {VOCABULARY}, is {GROWN}: 22 new rows of {' and of '.join(names)} start from"
    assert line in log_of(tmp_path / "grown")
    if mode == "continue" and not tied:  # no batch has had the new ids yet
        moments = stored(tmp_path / "grown", steps, "exp_avg_sq")["model.embed_tokens.weight"]
        assert (moments[VOCABULARY:] == 0).all() and (moments[:VOCABULARY] > 0).any()


def test_all_layouts_go_on_alike_with_a_larger_vocabulary(workers, tmp_path, seeds):
    recipe = seeds[False]
    curves = []
    for ranks, layout in ((1, []), (4, ["parallel.tp=2", "parallel.pp=2"]), (4, ["parallel.tp=4"])):
        overrides = [f"model.vocab_size={GROWN}", "train.steps=5", f"checkpoint.load={recipe.parent / 'run'}"]
        metrics = workers.run(ranks, train_recipe, recipe, [*overrides, *layout, f"run.dir={tmp_path / str(ranks)}"])
        curves.append([m["loss"] for m in metrics[0][-3:]])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5) and curves[2] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("mode", ["continue", "model"])
@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("model.max_position_embeddings=4096", "max_position_embeddings", 4096),
        ("model.max_position_embeddings=40", "max_position_embeddings", 40),  # still no shorter than the sequences
        ("model.rope_theta=3e5", "rope_theta", 3e5),
        (SCALING_TOML, "rope_scaling", SCALING),
    ],
)
def test_context_and_wavelengths_change_from_here_on(workers, tmp_path, seeds, mode, change, field, value):
    recipe = seeds[False]
    run, seed = tmp_path / "run", recipe.parent / "run/checkpoints/step_00000002"
    overrides = [f"run.dir={run}", f"checkpoint.load={seed}", f"checkpoint.load_mode={mode}", "train.steps=3"]
    (metrics,) = workers.run(1, train_recipe, recipe, [*overrides, change])
    (unchanged,) = workers.run(1, train_recipe, recipe, [*overrides, f"run.dir={tmp_path / 'same'}"])
    assert f"changed since step_00000002: model.{field} was" in log_of(run)
    assert "model." not in log_of(tmp_path / "same")
    assert (metrics[0]["loss"] == unchanged[0]["loss"]) == (field == "max_position_embeddings")
    assert getattr(load_model(run).settings, field) == value
    workers.run(1, train_recipe, recipe, [*overrides, change, "train.steps=4"])  # and goes on without another word
    assert log_of(run).count("model.") == 1


def test_a_longer_context_in_a_later_phase(workers, tmp_path):
    recipe = write_recipe(tmp_path, model={"max_position_embeddings": 32}, train={"steps": 2})
    workers.run(1, train_recipe, recipe, [])
    sources = [{"path": f"{name}_text_document", "weight": weight} for name, weight in (("fr", 0.7), ("en", 0.3))]
    later = {"sequence_length": 96, "rope_theta": 1e6}
    phases = [
        {"name": "short", "tokens": 2 * 8 * 32, "sources": sources},
        {"name": "long", "tokens": 8 * 96, "sources": sources} | later,
    ]
    data = {"sources": [], "phases": phases}
    recipe = write_recipe(tmp_path, data=data, train={"steps": 0}, model={"max_position_embeddings": 96})
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    assert [m["consumed_tokens"] for m in metrics] == [256, 512, 512 + 8 * 96]
    settings = load_model(tmp_path / "run").settings
    assert (settings.max_position_embeddings, settings.rope_theta) == (96, 1e6)


def test_transformers_agrees_with_a_model_that_has_grown(workers, tmp_path, seeds):
    recipe = seeds[False]
    change = [f"model.vocab_size={GROWN}", "model.max_position_embeddings=4096", "model.rope_theta=3e5", SCALING_TOML]
    loading = [f"checkpoint.load={recipe.parent / 'run'}", f"run.dir={tmp_path / 'run'}", "train.steps=4"]
    workers.run(2, train_recipe, recipe, [*change, *loading, "parallel.tp=2"])
    folder = tmp_path / "run/checkpoints/step_00000004"
    export(folder, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"], config["rope_theta"]) == (GROWN, 4096, 3e5)
    assert config["rope_scaling"] == SCALING.model_dump()
    tokens = torch.arange(GROWN - 60, GROWN).view(1, -1)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder)(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-5)


def another(model, name):
    value = getattr(model, name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    return SCALING if name == "rope_scaling" else "another"


@pytest.mark.parametrize("name", sorted(Model.model_fields.keys()))
def test_weights_are_refused_for_every_setting_with_which_the_result_would_be_wrong(tmp_path, name):
    recipe = load_recipe(write_recipe(tmp_path), ["model.rope_theta=1e4"])  # scaling is left out
    other = recipe.model.model_copy(update={name: another(recipe.model, name)})
    if name in ("preset", "initializer_range", "max_position_embeddings", "rope_theta"):
        refuse_another_model(other, recipe, tmp_path)
        return
    with pytest.raises(CheckpointError) as refusal:
        refuse_another_model(other, recipe, tmp_path)
    assert f"model.{name} was" in str(refusal.value)
    assert ("can only grow" in str(refusal.value)) == (name == "vocab_size")
    assert ("the default: set it" in str(refusal.value)) == (name == "rope_scaling")


def test_wavelengths_that_the_recipe_leaves_to_the_default_do_not_replace_those_of_the_weights(workers, tmp_path):
    model = {"preset": "", "vocab_size": VOCABULARY, "num_hidden_layers": 1, "hidden_size": 16}
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    recipe = write_recipe(tmp_path, model=model | shape, train={"steps": 2})
    workers.run(1, train_recipe, recipe, ["model.rope_theta=1e4"])
    for mode in ("continue", "model"):
        seed = [f"checkpoint.load={tmp_path / 'run'}", f"run.dir={tmp_path / mode}", f"checkpoint.load_mode={mode}"]
        with pytest.raises(AssertionError, match=r"rope_theta was 10000.0, is 500000.0, the default: set it"):
            workers.run(1, train_recipe, recipe, [*seed, "train.steps=3"])


def test_a_smaller_vocabulary_is_refused_when_a_run_goes_on(workers, tmp_path):
    recipe = write_recipe(tmp_path, model={"num_hidden_layers": 1}, train={"steps": 2})
    workers.run(1, train_recipe, recipe, [f"model.vocab_size={GROWN}"])
    with pytest.raises(AssertionError, match=rf"model.vocab_size was {GROWN}, is {VOCABULARY}: it can only grow"):
        workers.run(1, train_recipe, recipe, ["train.steps=3"])

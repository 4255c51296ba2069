"""A headless model trains alike in every layout, as a plain loop of transformers does, and goes on where it stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from megagap.checkpoint import Index, load_tensor
from megagap.checkpoint.huggingface import export
from megagap.checkpoint.huggingface_import import read_model_folder
from megagap.config import load_recipe
from megagap.config.learning_rate import learning_rate
from megagap.data.inspect import step_samples
from megagap.errors import CheckpointError
from megagap.inference.evaluation import find_model_files
from megagap.inference.generation import load_text_model
from megagap.model.llama import sharded_parameters
from megagap.model.shapes import model_tensors
from megagap.parallel.mesh import Mesh
from megagap.training.datasets import training_data
from megagap.training.trainer import build_state
from tests.huggingface import reference_model
from tests.parity.gradients import Mutation, assembled, gradients, largest_difference
from tests.parity.test_layouts import layout_overrides
from tests.recipes import write_recipe
from tests.training_run import train_recipe

HEADLESS = dict(tie_word_embeddings=True, headless=True)
STEPS = 6

LAYOUTS = {
    "tp2": (2, dict(tp=2)),
    "tp2 without sequence parallelism": (2, dict(tp=2, sequence_parallel=False)),
    "pp2, zb-v": (2, dict(pp=2, schedule="zb-v")),
    "tp2 pp2 dp2, document mask": (8, dict(tp=2, pp=2)),
    "cp2 tp2, ring, document mask": (4, dict(cp=2, tp=2)),
    "pp2 dp2 zero 3": (4, dict(pp=2, zero=3)),
}


@pytest.fixture(scope="module")
def reference(workers, tmp_path_factory):
    """A recipe, and the gradients of one process with and without a document mask."""
    recipe = write_recipe(tmp_path_factory.mktemp("gradients"), model=HEADLESS | {"attention_bias": True})
    expected = {}
    for masked in (False, True):
        ((parts, _),) = workers.run(1, gradients, recipe, [f"data.document_mask={str(masked).lower()}"])
        expected[masked] = assembled(parts)
    return recipe, expected


def run(workers, recipe, layout, mutation=None):
    ranks, parallel = LAYOUTS[layout]
    overrides = [*layout_overrides(parallel), f"data.document_mask={str('mask' in layout).lower()}"]
    return workers.run(ranks, gradients, recipe, overrides, mutation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_that_of_one_process(layout, reference, workers):
    recipe, expected = reference
    assert largest_difference(run(workers, recipe, layout), expected["mask" in layout]) < 1e-10


@pytest.mark.parametrize(
    ("layout", "sites"),
    [
        (
            "tp2 without sequence parallelism",
            {"contrastive_loss._ContrastiveLoss.forward: all_reduce over tp"},
        ),
        (
            "cp2 tp2, ring, document mask",
            {
                "contrastive_loss._ContrastiveLoss.forward: all_reduce over tp",
                "contrastive_loss.contrastive_loss: all_gather_async over cp",
            },
        ),
    ],
)
def test_a_reduction_of_the_loss_that_is_left_out_is_seen(layout, sites, reference, workers):
    recipe, expected = reference
    _, calls = run(workers, recipe, layout)[0]
    assert {site for site in calls if site.startswith("contrastive_loss")} == sites
    for site in sites:
        # Of the first microbatch: the embeddings; the losses, which have no gradient; the gradients.
        numbers = [0] if "gather" in site else [0, 2, 3] if "without" in layout else [0, 2]
        for mutation in [Mutation(site, number, "drop") for number in numbers]:
            assert largest_difference(run(workers, recipe, layout, mutation), expected["mask" in layout]) > 1e-7


@pytest.fixture(scope="module")
def trained(workers, tmp_path_factory):
    """A recipe and its metrics from one process that stopped half way and went on."""
    folder = tmp_path_factory.mktemp("headless")
    train = dict(steps=STEPS, evaluate_every=STEPS, evaluate_samples=5)
    recipe = write_recipe(folder, model=HEADLESS, train=train)
    workers.run(1, train_recipe, recipe, [f"run.stop_after={STEPS // 2}"])
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    return recipe, metrics


def test_losses_and_norms_are_those_of_a_plain_loop(trained):
    recipe, metrics = trained
    settings = load_recipe(recipe)
    model = reference_model(settings.model).model
    theirs = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in sharded_parameters(build_state(settings, Mesh.single()).stages):
            theirs[parameter.shard.name].copy_(parameter)
    embedding = model.embed_tokens.weight
    rest = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [{"params": [embedding], "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    data = training_data(settings)
    for step, record in enumerate(metrics, start=1):
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in step_samples(data, step)]))
        outputs, targets = model(tokens[:, :-1]).last_hidden_state, embedding[tokens[:, 1:]]
        scores = outputs @ targets.mT
        differences = scores - scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        loss = torch.nn.functional.pad(differences, (1, 0)).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.optim, STEPS, step)
        optimizer.step()
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=2e-5)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=4"]),
        (4, ["parallel.cp=2", "train.micro_batch_size=1"]),
    ],
    ids=str,
)
def test_neither_the_layout_nor_the_size_of_a_microbatch_changes_a_loss(ranks, overrides, trained, workers, tmp_path):
    recipe, expected = trained
    metrics = workers.run(ranks, train_recipe, recipe, [*overrides, f"run.dir={tmp_path}"])[0]
    assert "validation_loss" in expected[-1]
    for ours, theirs in zip(metrics, expected, strict=True):
        compared = {key for key in theirs if key == "grad_norm" or key.partition("/")[0].endswith("loss")}
        assert {key: ours[key] for key in compared} == pytest.approx({key: theirs[key] for key in compared}, rel=1e-5)


def test_a_run_goes_on_bit_for_bit(trained, workers, tmp_path):
    recipe, stopped = trained
    (whole,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path}"])
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in stopped] == [record[key] for record in whole]
    for name, tensor in weights(recipe.parent / "run").items():
        assert torch.equal(tensor, weights(tmp_path)[name]), name


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoints/step_{STEPS:08}"
    index = Index.read(folder)
    return {name: load_tensor(folder, index, "weight", name) for name in index.names("weight")}


def test_it_leaves_as_a_model_without_output_projection(trained, tmp_path):
    recipe, _ = trained
    (checkpoint,) = (recipe.parent / "run/checkpoints").glob(f"*{STEPS:08}")
    export(checkpoint, tmp_path / "hf", max_shard_size=100_000)
    loaded, report = AutoModel.from_pretrained(tmp_path / "hf", dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == "LlamaModel" and not (tmp_path / "hf/generation_config.json").exists()
    theirs, ours = loaded.state_dict(), weights(recipe.parent / "run")
    assert ours.keys() == model_tensors(load_recipe(recipe).model).keys() == {f"model.{name}" for name in theirs}
    assert all(torch.equal(tensor, ours[f"model.{name}"]) for name, tensor in theirs.items())
    stored = {name for file in (tmp_path / "hf").glob("*.safetensors") for name in load_file(file)}
    assert stored == set(theirs)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    with pytest.raises(CheckpointError, match="LlamaModel"):
        read_model_folder(tmp_path / "hf")


@pytest.mark.parametrize("use", [find_model_files, load_text_model])
def test_what_needs_probabilities_of_tokens_refuses_it(use, trained):
    recipe, _ = trained
    with pytest.raises(CheckpointError, match="headless model: without an output projection"):
        use(recipe.parent / "run")


def refused(rank, ranks, recipe, overrides):
    with pytest.raises(CheckpointError) as refusal:
        train_recipe(rank, ranks, recipe, overrides)
    return str(refusal.value)


def test_its_weights_start_a_model_that_predicts_tokens_only_where_the_recipe_says_so(trained, workers, tmp_path):
    recipe = write_recipe(tmp_path, model=dict(tie_word_embeddings=True), train=dict(steps=2))
    start = [f"checkpoint.load={trained[0].parent / 'run'}", "checkpoint.load_mode=model"]
    (message,) = workers.run(1, refused, recipe, start)
    assert "model.headless was true, is false" in message
    (metrics,) = workers.run(1, train_recipe, recipe, [*start, "model.headless=false"])
    assert len(metrics) == 2
    assert "model.headless was true, is false" in (tmp_path / "run/logs/rank_00000.log").read_text()

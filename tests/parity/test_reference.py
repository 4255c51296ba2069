"""Training equals a plain loop of transformers and torch.optim.AdamW on the samples that inspect_data prints."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megagap.config import Settings, load_recipe
from megagap.config.learning_rate import learning_rate
from megagap.data.inspect import step_samples
from megagap.model.llama import sharded_parameters
from megagap.parallel.mesh import Mesh
from megagap.training.datasets import training_data
from megagap.training.trainer import build_state
from tests.huggingface import OLMO2, reference_model
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[2]
STEPS = 10


def printed_samples(recipe: Path, step: int) -> list[list[int]]:
    command = [python(), ROOT / "tools/inspect_data.py", recipe, "--step", str(step), "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [sample["tokens"] for sample in json.loads(printed)]


def plain_loop(model: PreTrainedModel, settings: Settings, recipe: Path) -> list[dict[str, float]]:
    """Train ``model`` as the settings say, without any of our training code; the numbers of each step."""
    optim = settings.optim
    parameters = dict(model.named_parameters())
    embedding = [parameters["model.embed_tokens.weight"]]
    rest = [p for name, p in parameters.items() if "embed_tokens" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.0}, {"params": rest, "weight_decay": optim.weight_decay}],
        betas=optim.betas,
        eps=optim.eps,
    )
    data = training_data(settings)
    results = []
    for step in range(1, STEPS + 1):
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in step_samples(data, step)]))
        if step in (1, STEPS):  # starting the tool takes seconds
            assert tokens.tolist() == printed_samples(recipe, step)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        z_loss = settings.train.z_loss * logits.logsumexp(-1).square().mean()
        optimizer.zero_grad()
        (loss + z_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, STEPS, step)
        optimizer.step()
        results.append(dict(loss=loss.item(), z_loss=z_loss.item(), grad_norm=norm.item()))
    return results


def assert_equal(metrics: list[dict[str, Any]], expected: list[dict[str, float]]) -> None:
    for key in metrics[0].keys() & expected[0].keys():
        assert [m[key] for m in metrics] == pytest.approx([m[key] for m in expected], rel=2e-5), key


@pytest.mark.parametrize(
    ("changes", "z_loss"), [({}, 0.01), ({"tie_word_embeddings": True}, 0.0), (OLMO2, 0.0)], ids=str
)
def test_ten_steps_from_our_own_initialisation_equal_a_plain_loop(workers, tmp_path, changes, z_loss):
    train = dict(steps=STEPS, z_loss=z_loss)
    recipe = write_recipe(tmp_path, model=dict(attention_bias=True, **changes), train=train)
    settings = load_recipe(recipe)
    model = reference_model(settings.model)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in sharded_parameters(build_state(settings, Mesh.single()).stages):
            theirs[parameter.shard.name].copy_(parameter)
    metrics = workers.run(4, train_recipe, recipe, ["parallel.tp=2", "parallel.pp=2"])[0]
    assert ("z_loss" in metrics[0]) == (z_loss > 0)
    assert_equal(metrics, plain_loop(model, settings, recipe))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ten_steps_from_an_imported_hugging_face_model_equal_a_plain_loop(workers, tmp_path, tied):
    recipe = write_recipe(tmp_path, model=dict(tie_word_embeddings=tied, attention_bias=True), train=dict(steps=STEPS))
    settings = load_recipe(recipe)
    model = reference_model(settings.model)
    model.save_pretrained(tmp_path / "hf")
    command = [python(), ROOT / "tools/convert_checkpoint.py", "from-hf"]
    subprocess.run([*command, "--input", tmp_path / "hf", "--output", tmp_path / "start"], check=True)
    start = [f"checkpoint.load={tmp_path / 'start'}", "checkpoint.load_mode=model"]
    metrics = workers.run(4, train_recipe, recipe, ["parallel.tp=2", "parallel.pp=2", *start])[0]
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert_equal(metrics, plain_loop(model, settings, recipe))

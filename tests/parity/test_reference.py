"""Training equals a plain loop of transformers and torch.optim.AdamW on the samples that inspect_data prints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megagap.config import load_recipe
from megagap.data.inspect import step_samples
from megagap.optim.schedule import learning_rate
from megagap.parallel.mesh import Mesh
from megagap.training.datasets import training_data
from megagap.training.trainer import build_state
from tests.huggingface import reference_model
from tests.recipes import write_recipe
from tests.training_run import train_recipe

ROOT = Path(__file__).parents[2]
STEPS = 10


def printed_samples(recipe: Path, step: int) -> list[list[int]]:
    command = [sys.executable, ROOT / "tools/inspect_data.py", recipe, "--step", str(step), "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [sample["tokens"] for sample in json.loads(printed)]


@pytest.mark.parametrize("tied", [False, True])
def test_ten_steps_equal_a_plain_loop(workers, tmp_path, tied):
    recipe = write_recipe(tmp_path, model=dict(tie_word_embeddings=tied, attention_bias=True), train=dict(steps=STEPS))
    settings = load_recipe(recipe)
    model, optim = reference_model(settings.model), settings.optim
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in build_state(settings, Mesh.single()).stage.sharded_parameters():
            theirs[parameter.shard.name].copy_(parameter)
    embedding = [theirs["model.embed_tokens.weight"]]
    rest = [p for name, p in theirs.items() if "embed_tokens" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.0}, {"params": rest, "weight_decay": optim.weight_decay}],
        betas=optim.betas,
        eps=optim.eps,
    )
    data = training_data(settings)
    expected = []
    for step in range(1, STEPS + 1):
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in step_samples(data, 8, step)]))
        if step in (1, STEPS) and not tied:  # starting the tool takes seconds; the model plays no part
            assert tokens.tolist() == printed_samples(recipe, step)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, STEPS, step)
        optimizer.step()
        expected.append((loss.item(), norm.item()))

    metrics = workers.run(4, train_recipe, recipe, ["parallel.tp=2", "parallel.pp=2"])[0]
    assert [m["loss"] for m in metrics] == pytest.approx([loss for loss, _ in expected], rel=2e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx([norm for _, norm in expected], rel=2e-5)

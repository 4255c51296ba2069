"""What leaves as a Hugging Face model computes what was trained."""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagap.checkpoint import load_model
from tests.huggingface import OLMO2
from tests.recipes import VOCABULARY, write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"norm_gain_scale": 20.0}, OLMO2], ids=str)
def test_a_model_trained_in_tp2_pp2_gives_the_same_logits_in_transformers(workers, tmp_path, changes):
    recipe = write_recipe(tmp_path, model=changes, train=dict(steps=3))
    workers.run(4, train_recipe, recipe, ["parallel.tp=2", "parallel.pp=2"])
    command = [python(), ROOT / "tools/convert_checkpoint.py", "to-hf"]
    command += ["--checkpoint", tmp_path / "run/checkpoints/step_00000003", "--output", tmp_path / "hf"]
    subprocess.run(command, check=True)

    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_model(tmp_path / "run/checkpoints/step_00000003")(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()(tokens).logits
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

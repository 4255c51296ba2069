import json
import math
import subprocess
import tomllib
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from megagap.checkpoint import find_model, load_model, save_checkpoint
from megagap.config import Model, load_recipe
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from tests.launching import SECONDS
from tests.models import SHAPE
from tests.recipes import write_tokens
from tests.training_run import train_recipe
from tests.warm_start import python

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"

MODEL = SHAPE | dict(hidden_size=8, num_hidden_layers=1, head_dim=2, vocab_size=20)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose latest checkpoint holds ones."""
    for step, value in ((1, 0.0), (2, 1.0)):
        parts = []
        for name, shape in model_tensors(Model(**MODEL)).items():
            shard = whole(name, shape)
            parts.append(Slice("weight", shard, 0, shard.numel, torch.full((shard.numel,), value)))
        state = {"model": MODEL, "data": {"tokenizer": ""}, "train": {"precision": "fp32"}}
        save_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{step:08}", parts, state)
    return tmp_path / "run"


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), str(TOOL), "to-hf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_a_run_is_converted_from_its_latest_checkpoint_with_a_warning_of_the_missing_tokenizer(run: Path) -> None:
    done = convert("--checkpoint", run, "--output", run / "hf", "--dtype", "bfloat16", "--max-shard-size", "1KB")
    assert done.returncode == 0, done.stderr
    assert "warning: no tokenizer was exported" in done.stderr
    assert "step_00000002 as bfloat16" in done.stdout
    listing = json.loads((run / "hf" / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in set(listing["weight_map"].values()):
        tensors |= load_file(run / "hf" / file)
    assert tensors.keys() == model_tensors(Model(**MODEL)).keys() == listing["weight_map"].keys()
    assert all(tensor.dtype == torch.bfloat16 and (tensor == 1).all() for tensor in tensors.values())
    assert listing["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())


def test_a_users_mistake_ends_with_2_and_a_message_without_traceback(tmp_path: Path) -> None:
    done = convert("--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert "checkpoint error" in done.stderr and "nowhere does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hugging_face_model_becomes_a_checkpoint_with_a_warning_of_the_missing_tokenizer(run: Path) -> None:
    assert convert("--checkpoint", run, "--output", run / "hf").returncode == 0
    command = [python(), str(TOOL), "from-hf", "--input", str(run / "hf"), "--output", str(run / "back")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert "has no tokenizer" in done.stderr
    parameters = sum(prod(shape) for shape in model_tensors(Model(**MODEL)).values())
    assert f"{parameters:,} parameters" in done.stdout and "float32" in done.stdout
    for parameter in load_model(run / "back").parameters():
        assert (parameter == 1).all()


def from_hf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), str(TOOL), "from-hf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.fixture
def hugging_face(run: Path) -> Path:
    """A model with a tokenizer beside it, in a folder whose name has to be quoted."""
    folder = run.parent / 'my "model"'
    assert convert("--checkpoint", run, "--output", folder).returncode == 0
    (run.parent / "text.jsonl").write_text('{"text": "a b"}\n')
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(MODEL["vocab_size"])}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_output_of_from_hf_is_a_recipe_that_continues_from_it(hugging_face: Path, tmp_path: Path) -> None:
    done = from_hf("--input", hugging_face, "--output", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    recipe = tomllib.loads(done.stdout)
    assert "model" not in recipe
    assert recipe["checkpoint"]["load"] == str(tmp_path / "base") and recipe["checkpoint"]["load_mode"] == "model"
    assert recipe["data"]["tokenizer"] == str(hugging_face)
    assert recipe["train"]["sequence_length"] == MODEL["max_position_embeddings"]
    assert 0 < recipe["optim"]["lr"] <= 1e-4

    path = tmp_path / "recipe.toml"
    write_tokens(tmp_path / "web_text_document", 0, vocabulary=MODEL["vocab_size"])
    path.write_text(done.stdout.replace("PREFIX_text_document", "web_text_document"))
    settings = ["train.steps=2", "train.global_batch_size=2", f"run.dir={tmp_path / 'trained'}", "optim.warmup_steps=0"]
    losses = [record["loss"] for record in train_recipe(0, 1, path, settings)]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(MODEL["vocab_size"]), rel=1e-3)  # of ones: uniform
    assert load_recipe(path, settings, find_model=find_model).model.hidden_size == MODEL["hidden_size"]


def test_from_hf_writes_the_recipe_to_a_new_file_only(hugging_face: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "mine.toml"
    done = from_hf("--input", hugging_face, "--output", tmp_path / "base", "--recipe", path)
    assert done.returncode == 0 and f"saved {path}" in done.stdout and "[train]" not in done.stdout
    text = path.read_text()
    assert tomllib.loads(text)["checkpoint"]["load"] == str(tmp_path / "base") and f"megagap.train {path}" in text
    again = from_hf("--input", hugging_face, "--output", tmp_path / "other", "--recipe", path)
    assert again.returncode == 2 and f"{path} exists already" in again.stderr
    assert path.read_text() == text and not (tmp_path / "other").exists()


def test_a_recipe_of_a_model_without_tokenizer_leaves_it_to_be_filled_in(run: Path, tmp_path: Path) -> None:
    assert convert("--checkpoint", run, "--output", run / "hf").returncode == 0
    done = from_hf("--input", run / "hf", "--output", tmp_path / "base")
    assert "tokenizer" not in tomllib.loads(done.stdout)["data"] and "# tokenizer = " in done.stdout

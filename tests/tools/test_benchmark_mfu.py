"""The benchmark counts what the model really computes, and times what the trainer really does."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagap.config import load_recipe
from megagap.model.flops import flops_per_token
from megagap.parallel.mesh import Mesh
from megagap.training.trainer import build_state
from tests.huggingface import reference_model
from tests.recipes import write_recipe
from tests.training_run import train_recipe

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/benchmark_mfu.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_equal_an_independent_count(tmp_path, tied):
    """torch's counter over transformers' model, whose eager attention computes the whole square."""
    settings = load_recipe(write_recipe(tmp_path, model=dict(tie_word_embeddings=tied)))
    model, length = reference_model(settings.model), 48
    tokens = torch.randint(settings.model.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(settings.model, length).full == pytest.approx(counted, rel=1e-3)


def test_flops_of_our_own_stage_equal_the_formula(tmp_path):
    settings = load_recipe(write_recipe(tmp_path))
    stage = build_state(settings, Mesh.single()).stage
    tokens = torch.randint(settings.model.vocab_size, (2, 48))
    # The counter knows no fused attention on CPU; torch's plain one is made of matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.loss(stage(tokens, 48), tokens, torch.ones(()))[0].backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(settings.model, 48).full == pytest.approx(counted, rel=1e-3)


def test_the_report_has_the_keys_of_the_contract_and_its_speed_is_the_trainers(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=30))
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    trainer = statistics.median(m["tokens_per_second"] for m in metrics[5:])
    done = run(recipe, "--steps", "25", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert len(report["step_seconds"]) == 25
    assert report["tokens"] == "recipe"
    assert report["peak_tflops"]["datasheet"] is None and report["mfu"]["datasheet"] is None
    assert 0 < report["mfu"]["measured"]["causal"] < report["mfu"]["measured"]["full"] < 1
    assert {"flops_per_token", "tflops_per_device", "memory_bytes", "hardware", "versions", "recipe"} <= report.keys()
    # Machines that run tests are shared: a factor of two is noise, the wrong unit or batch is not.
    assert 0.5 < report["tokens_per_second"] / trainer < 2


def test_it_runs_under_torchrun_and_without_data_files(tmp_path):
    recipe = write_recipe(tmp_path)
    for file in tmp_path.glob("*_document.*"):
        file.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "tools/benchmark_mfu.py", recipe, "--steps", "2", "--parallel.tp", "2", "--output", tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert (report["hardware"]["layout"]["tp"], report["tokens"]) == (2, "random")
    assert "random" in done.stdout
    per_device = report["flops_per_token"]["full"] * report["tokens_per_second"] / 2 / 1e12
    assert report["tflops_per_device"] == pytest.approx(per_device)
    assert report["mfu"]["measured"]["full"] == pytest.approx(per_device / report["peak_tflops"]["measured"])


def test_a_bad_recipe_exits_2_with_a_message(tmp_path):
    done = run(write_recipe(tmp_path, train=dict(sequence_length=100_000)))
    assert done.returncode == 2 and "max_position_embeddings" in done.stderr and "Traceback" not in done.stderr


def test_an_output_that_cannot_be_a_folder_is_refused_before_the_time_is_spent(tmp_path):
    (tmp_path / "file").touch()
    done = run(write_recipe(tmp_path), "--steps", 10**9, "--output", tmp_path / "file" / "out")
    assert done.returncode == 2 and "cannot create the folder" in done.stderr and "Traceback" not in done.stderr

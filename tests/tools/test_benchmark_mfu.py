"""The benchmark counts what the model really computes, and times what the trainer really does."""

import json
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagap.benchmark.step import Report, first_step, peak_measurements
from megagap.config import load_recipe
from megagap.errors import ConfigError
from megagap.model.flops import flops_per_token
from megagap.parallel.mesh import Mesh
from megagap.training.trainer import build_state
from tests.huggingface import reference_model
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python, torchrun

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), ROOT / "tools/benchmark_mfu.py", *arguments]
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
    state = build_state(settings, Mesh.single())
    (stage,) = state.stages
    state.optimizer.store.begin(1)
    tokens = torch.randint(settings.model.vocab_size, (2, 48))
    # The counter knows no fused attention on CPU; torch's plain one is made of matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.loss(stage(tokens, 48), tokens, torch.ones(()))[0].backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(settings.model, 48).full == pytest.approx(counted, rel=1e-3)


def test_the_report_has_the_keys_of_the_contract_and_its_speed_is_that_of_the_trainers_tokens(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=30))
    (metrics,) = workers.run(1, train_recipe, recipe, ["run.stop_after=1"])
    begin = time.perf_counter()
    done = run(recipe, "--steps", "25", "--output", tmp_path / "out")
    elapsed = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert len(report["step_seconds"]) == 25
    assert report["tokens"] == "recipe"
    assert report["peak_tflops"]["datasheet"] is None and report["mfu"]["datasheet"] is None
    assert 0 < report["mfu"]["measured"]["causal"] < report["mfu"]["measured"]["full"]
    peaks = report["measured_peaks"]
    assert len(peaks) == 5 and report["peak_tflops"]["measured"] == statistics.median(peaks)
    assert report["peak_tflops_spread"] == pytest.approx((max(peaks) - min(peaks)) / statistics.median(peaks))
    assert report["phase"] == {"name": "training", "sequence_length": 32}
    assert "the whole run, sequences of 32 tokens" in done.stdout and "5 measurements" in done.stdout
    assert {"flops_per_token", "tflops_per_device", "memory_bytes", "hardware", "versions", "recipe"} <= report.keys()
    # Not the trainer's speed, which on a shared machine is another one seconds later.
    median = statistics.median(report["step_seconds"])
    assert report["tokens_per_second"] == pytest.approx(metrics[0]["consumed_tokens"] / median)
    assert elapsed / 1000 < sum(report["step_seconds"]) < elapsed  # in seconds


def test_it_runs_under_torchrun_and_without_data_files(tmp_path):
    recipe = write_recipe(tmp_path)
    for file in tmp_path.glob("*_document.*"):
        file.unlink()
    command = [torchrun(), "--standalone", "--nproc-per-node", "2"]
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


# ----------------------------------------------------------------------------------------------------- the peak


@pytest.mark.parametrize(("steps", "before"), [(1, {0}), (2, {0, 1}), (10, {0, 2, 5, 7}), (100, {0, 25, 50, 75})])
def test_the_peak_is_measured_before_and_between_the_timed_steps(steps, before):
    assert peak_measurements(steps) == before


def test_a_machine_that_was_not_quiet_is_told_with_the_range_of_the_mfu(tmp_path):
    settings = load_recipe(write_recipe(tmp_path))
    first = first_step(settings)
    noisy = Report(settings, Mesh.single(), first, [1.0], [0.323, 0.2, 0.170], 1)
    assert noisy.measured_peak == 0.2 and noisy.peak_spread == pytest.approx(0.765)
    achieved = noisy.as_dict()["tflops_per_device"]
    assert noisy.warning().startswith("the machine was not quiet: its measured peak varied by 76%")
    assert f"between {achieved / 0.323:.1%} and {achieved / 0.170:.1%}" in noisy.warning()
    assert Report(settings, Mesh.single(), first, [1.0], [0.323, 0.310], 1).warning() is None


# ----------------------------------------------------------------------------------------------------- phases

SOURCES = [{"path": "fr_text_document"}]
PHASES = [
    {"name": "short", "tokens": 8 * 16 * 4, "sequence_length": 16, "sources": SOURCES},
    {"name": "long", "tokens": 8 * 48 * 2, "sequence_length": 48, "rope_theta": 1e6, "sources": SOURCES},
]


def recipe_with_phases(folder: Path) -> Path:
    return write_recipe(folder, data={"phases": PHASES, "sources": []}, train={"steps": 0})


def test_the_first_phase_is_timed_unless_another_one_is_named(tmp_path):
    settings = load_recipe(recipe_with_phases(tmp_path))
    assert first_step(settings).phase.name == "short"
    first = first_step(settings, "long")
    assert (first.step, first.sequence_length, first.rope_theta) == (5, 48, 1e6)
    with pytest.raises(ConfigError, match="--phase none: unknown; phases of the recipe: short, long"):
        first_step(settings, "none")
    with pytest.raises(ConfigError, match="--phase long: the recipe has no phases"):
        first_step(load_recipe(write_recipe(tmp_path)), "long")


def test_a_named_phase_is_timed_with_its_own_data_however_short_it_is(tmp_path):
    done = run(recipe_with_phases(tmp_path), "--phase", "long", "--steps", "3", "--warmup", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["phase"] == {"name": "long", "sequence_length": 48} and report["tokens"] == "recipe"
    assert report["tokens_per_second"] == pytest.approx(8 * 48 / statistics.median(report["step_seconds"]))
    assert "long (2 of 2), sequences of 48 tokens" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "none"], "--phase none: the recipe has no phases"),
        (["--processes", "2"], "--processes N, at least 1, goes with --sweep"),
        (["--sweep", "parallel.tp=1", "--profile", "2"], "--profile applies to one layout only"),
        (["--parallel.tp", "1", "--sweep", "parallel.tp=1,2"], "parallel.tp is given by --sweep and by --parallel.tp"),
        (["--sweep", "parallel.tpp=1,2"], "parallel.tpp = 1  unknown; did you mean parallel.tp?"),
    ],
)
def test_faulty_options_exit_2_with_a_message(tmp_path, arguments, message):
    done = run(write_recipe(tmp_path), *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_sweep_ranks_what_it_measured_and_records_what_failed(tmp_path):
    """A vocabulary that no memory holds fails as it starts; two ranks are too many for one process."""
    recipe = write_recipe(tmp_path)
    sweep = ["--sweep", "parallel.tp=1,2", f"model.vocab_size=509,{2**52}"]
    done = run(recipe, "--steps", "2", "--warmup", "0", "--output", tmp_path / "out", *sweep)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/sweep.json").read_text())["results"]
    assert [result["status"] for result in results] == ["done", "failed", "refused", "refused"]
    assert results[0]["settings"] == {"parallel.tp": "1", "model.vocab_size": "509"}
    assert results[0]["tokens_per_second"] > 0
    assert "memory" in results[1]["reason"]
    assert "does not divide the 1 process" in results[2]["reason"]
    assert "Traceback" not in done.stderr and "refused: config error" in done.stdout


def test_a_sweep_starts_the_processes_of_a_layout_by_itself(tmp_path):
    done = run(
        write_recipe(tmp_path), "--steps", "1", "--warmup", "0", "--output", tmp_path / "out",
        "--processes", "2", "--sweep", "parallel.tp=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out/sweep.json").read_text())["results"]
    report = json.loads((Path(result["folder"]) / "benchmark.json").read_text())
    assert report["hardware"]["layout"]["tp"] == 2

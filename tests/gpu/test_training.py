"""The step, the loop, resuming and saving on a GPU, against the same on the CPU."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megagap.config import load_recipe
from megagap.observe.logs import log_to
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.process.rendezvous import Process
from megagap.training import keeper, trainer
from megagap.training.mesh import make_mesh
from tests.recipes import write_recipe

pytestmark = pytest.mark.gpu

MODEL: dict[str, Any] = dict(
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512
)
"""Heads of 64: every attention kernel supports them."""


def train(recipe: Path, overrides: list[str], device: torch.device) -> list[dict[str, Any]]:
    """As ``python -m megagap.train`` does; the metrics."""
    settings = load_recipe(recipe, overrides, 1)
    mesh = make_mesh(settings, Process(0, 1, 0, 1), device)
    run = RunDirectory(Path(settings.run.dir), is_writer=True)
    run.open()
    log_to(run.path / "logs", 0)
    trainer.train(settings, mesh, run)
    run.close()
    return read_metrics(run.metrics)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-pure", "fp16-mixed"])
@pytest.mark.parametrize("headless", [False, True], ids=["", "headless"])
def test_losses_and_norms_are_those_of_the_cpu(tmp_path, gpu, headless, precision, mask):
    model = MODEL | dict(headless=headless, tie_word_embeddings=headless)
    recipe = write_recipe(tmp_path, model=model, data=dict(document_mask=mask))
    overrides = [f"train.precision={precision}", "checkpoint.every=0"]
    on_gpu = train(recipe, [*overrides, f"run.dir={tmp_path / 'gpu'}"], gpu)
    on_cpu = train(recipe, [*overrides, f"run.dir={tmp_path / 'cpu'}"], torch.device("cpu"))
    # Rounding in bf16 is soon amplified by training itself, in norms more than in losses: of these the first counts.
    first, later = (1e-5, 1e-3) if precision == "fp32" else (5e-3, 3e-2)
    steps = len(on_cpu) if precision == "fp32" else 1
    for key, compared in (("loss", len(on_cpu)), ("grad_norm", steps)):
        found, expected = ([m[key] for m in metrics[:compared]] for metrics in (on_gpu, on_cpu))
        assert found[0] == pytest.approx(expected[0], rel=first), (key, found, expected)
        assert found == pytest.approx(expected, rel=later), (key, found, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-pure", "fp16-mixed"])
def test_a_run_that_goes_on_repeats_the_losses_of_an_undisturbed_one(tmp_path, gpu, precision):
    recipe = write_recipe(tmp_path, model=MODEL)
    overrides = [f"train.precision={precision}", "checkpoint.every=5", "checkpoint.keep=5"]
    whole = train(recipe, overrides, gpu)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000010")
    (tmp_path / "run/checkpoints/latest").write_text("step_00000005\n")
    again = train(recipe, overrides, gpu)
    assert [m["step"] for m in again] == list(range(1, 11))
    assert [m["loss"] for m in again] == pytest.approx([m["loss"] for m in whole], rel=1e-6)
    print("bit-equal:", [m["loss"] for m in again] == [m["loss"] for m in whole])


def test_a_file_that_asks_for_a_checkpoint_gets_one(tmp_path, gpu, monkeypatch):
    recipe = write_recipe(tmp_path, model=MODEL, train=dict(steps=12))
    (tmp_path / "run").mkdir()
    saved = []
    real = keeper.save
    monkeypatch.setattr(keeper, "save", lambda state, *rest: (saved.append(state.step), real(state, *rest)))
    (tmp_path / "run/SAVE").touch()
    train(recipe, ["checkpoint.every=0"], gpu)
    assert saved in ([2, 12], [1, 12])  # read one step late, and the end
    assert not (tmp_path / "run/SAVE").exists()


def test_the_host_runs_ahead_of_the_device_by_a_step(tmp_path, gpu, monkeypatch):
    """Reading a step's numbers must not wait for the step that is queued behind it."""
    busy = 0.15
    real = trainer.train_step

    def slow_step(*arguments: Any) -> Any:
        result = real(*arguments)
        torch.cuda._sleep(int(busy * 1.5e9))  # cycles, at 1.5 GHz or more: the device is busy that long after the step
        return result

    recipe = write_recipe(tmp_path, model=MODEL, train=dict(steps=4))
    train(recipe, ["checkpoint.every=0", f"run.dir={tmp_path / 'warm'}"], gpu)
    monkeypatch.setattr(trainer, "train_step", slow_step)
    queued = []
    done = trainer.Recorder.step_done

    def step_done(self: Any, step: int, result: Any) -> float:
        start = time.perf_counter()
        seconds = done(self, step, result)
        queued.append(time.perf_counter() - start)
        return seconds

    monkeypatch.setattr(trainer.Recorder, "step_done", step_done)
    train(recipe, ["checkpoint.every=0"], gpu)
    # The first has nothing to wait for; later ones wait for the step before, part of which is done.
    assert queued[0] < busy / 2, queued

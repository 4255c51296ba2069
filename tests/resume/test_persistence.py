"""Which checkpoint a run goes on from, in whatever layout it was written."""

from pathlib import Path

import pytest
import torch

from megagap.checkpoint import Index, load_model, load_tensor
from megagap.config import load_recipe, timeline_of
from megagap.observe.run_directory import RunDirectory
from megagap.process.rendezvous import Process
from megagap.resume.passing_over import find_source
from megagap.resume.persistence import load, save
from megagap.training.datasets import training_data
from megagap.training.mesh import make_mesh
from megagap.training.trainer import build_state
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def test_a_folder_to_load_is_not_used_once_the_run_has_a_checkpoint_and_the_log_says_so(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=2))
    for name in ("seed", "run"):
        workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / name}"])
    folder = tmp_path / "seed/checkpoints/step_00000002"
    workers.run(1, train_recipe, recipe, ["train.steps=3", f"checkpoint.load={folder}"])
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    (line,) = [line for line in log.splitlines() if "WARNING" in line]
    assert f"checkpoint.load = {folder} is not used" in line and str(tmp_path / "run/checkpoints") in line


def test_weights_of_another_gain_scale_are_rescaled_when_they_start_a_new_run(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=3))
    workers.run(1, train_recipe, recipe, [])
    first = tmp_path / "run/checkpoints/step_00000003"
    overrides = [
        f"checkpoint.load={first}",
        "checkpoint.load_mode=model",
        "model.norm_gain_scale=20.0",
        "optim.lr=1e-12",
    ]
    workers.run(1, train_recipe, recipe, [*overrides, "optim.min_lr=0.0", f"run.dir={tmp_path / 'scaled'}"])
    tokens = torch.arange(30).view(1, 30)
    with torch.no_grad():
        before = load_model(first)(tokens)
        after = load_model(tmp_path / "scaled/checkpoints/step_00000003")
    assert after.settings.norm_gain_scale == 20
    torch.testing.assert_close(after(tokens), before, rtol=1e-5, atol=1e-5)


def resave(rank, ranks, recipe, overrides):
    """Load a checkpoint and write it again, without a step."""
    settings = load_recipe(recipe, overrides, ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    run = RunDirectory(Path(settings.run.dir), is_writer=rank == 0)
    run.open()
    data = training_data(settings, timeline_of(settings))
    state = build_state(settings, mesh)
    load(state, run, data, find_source(settings, run, mesh, {})[0])
    save(state, run, data)
    run.close()


def tensors_of(run, kind):
    folder = run / "checkpoints/step_00000002"
    index = Index.read(folder)
    return {name: load_tensor(folder, index, kind, name) for name in index.names(kind)}


MODES = {
    "zero 0": (2, ["optim.zero=0"]),
    "tp2 dp2, zero 2": (4, ["parallel.tp=2", "optim.zero=2"]),
    "dp4, zero 3": (4, ["optim.zero=3"]),
    "dp4 in 2 replicas, zero 3": (4, ["parallel.dp_replicate=2", "optim.zero=3"]),
}


@pytest.mark.parametrize(
    ("writer", "reader", "precision", "moments"),
    [
        ("zero 0", "dp4, zero 3", "fp32", "fp32"),
        ("dp4 in 2 replicas, zero 3", "tp2 dp2, zero 2", "bf16-mixed", "fp32"),
        ("tp2 dp2, zero 2", "zero 0", "bf16-mixed", "bf16"),
    ],
)
def test_a_checkpoint_of_any_stage_goes_on_at_any_other_with_the_same_bits(
    workers, tmp_path, writer, reader, precision, moments
):
    recipe = write_recipe(tmp_path, train=dict(steps=2, precision=precision), optim=dict(moments_dtype=moments))
    ranks, layout = MODES[writer]
    workers.run(ranks, train_recipe, recipe, [*layout, f"run.dir={tmp_path / 'first'}"])
    ranks, layout = MODES[reader]
    loading = [f"checkpoint.load={tmp_path / 'first'}", f"run.dir={tmp_path / 'second'}"]
    workers.run(ranks, resave, recipe, [*layout, *loading])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        expected, found = (tensors_of(tmp_path / run, kind) for run in ("first", "second"))
        assert expected.keys() == found.keys() and len(expected) > 10
        for name, tensor in expected.items():
            assert tensor.dtype == (torch.bfloat16 if moments == "bf16" and kind != "weight" else torch.float32)
            assert torch.equal(tensor, found[name]), (kind, name)
            assert tensor.abs().max() > 0


def test_moments_are_taken_over_in_the_dtype_that_is_asked_for_now(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=2))
    before, after = (f"run.dir={tmp_path / run}" for run in ("first", "second"))
    workers.run(1, train_recipe, recipe, [before])
    loading = [f"checkpoint.load={tmp_path / 'first'}", "optim.moments_dtype=bf16"]
    workers.run(1, resave, recipe, [*loading, after])
    for kind, dtype in (("weight", torch.float32), ("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16)):
        expected, found = (tensors_of(tmp_path / run, kind) for run in ("first", "second"))
        for name, tensor in expected.items():
            assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), (kind, name)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fp32", "bf16-mixed"),
        ("bf16-mixed", "fp16-mixed"),
        ("fp16-mixed", "fp32"),
        ("bf16-mixed", "bf16-pure"),
        ("bf16-pure", "fp16-mixed"),
    ],
)
def test_another_precision_goes_on_with_the_weights_as_exactly_as_it_keeps_them(workers, tmp_path, before, after):
    recipe = write_recipe(tmp_path, train=dict(steps=2))
    workers.run(1, train_recipe, recipe, [f"train.precision={before}", f"run.dir={tmp_path / 'first'}"])
    loading = [f"checkpoint.load={tmp_path / 'first'}", f"run.dir={tmp_path / 'second'}"]
    workers.run(1, resave, recipe, [*loading, f"train.precision={after}"])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        expected, found = (tensors_of(tmp_path / run, kind) for run in ("first", "second"))
        dtype = torch.bfloat16 if after == "bf16-pure" else torch.float32
        for name, tensor in expected.items():
            assert tensor.dtype == (torch.bfloat16 if before == "bf16-pure" else torch.float32)
            assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), (kind, name)


def test_a_run_goes_on_at_another_precision_and_the_log_says_what_becomes_of_its_weights(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=8))
    said = {
        "bf16-pure": "bf16-pure: weights are rounded to the nearest bfloat16 number",
        "fp16-mixed": "fp16-mixed: masters start from the bfloat16 weights, exactly; the loss scale starts anew",
        "fp32": "fp32: weights are taken over exactly",
    }
    losses = workers.run(1, train_recipe, recipe, ["run.dir=" + str(tmp_path / "reference")])[0]
    workers.run(1, train_recipe, recipe, ["train.precision=bf16-mixed", "run.stop_after=2"])
    for precision, note in said.items():
        (metrics,) = workers.run(1, train_recipe, recipe, [f"train.precision={precision}", "run.stop_after=2"])
        log = (tmp_path / "run/logs/rank_00000.log").read_text()
        assert sum(f"is {note}" in line for line in log.splitlines()) == 1
        assert log.count("train.precision was") == len(said) - list(said)[::-1].index(precision)
    assert [record["step"] for record in metrics] == list(range(1, 9))
    assert [record["loss"] for record in metrics] == pytest.approx([record["loss"] for record in losses], rel=0.01)

"""Which checkpoint a run goes on from."""

import torch

from megagap.checkpoint import load_model
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

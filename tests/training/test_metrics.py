"""What metrics.jsonl says of a run."""

import pytest

from tests.recipes import write_recipe
from tests.training_run import train_recipe


def test_losses_of_sources_average_to_the_loss(workers, tmp_path):
    """Sequences are equally long, so the mean over sources is weighted by how many of each the step drew."""
    from megagap.config import load_recipe
    from megagap.training.datasets import training_data

    recipe = write_recipe(tmp_path, train=dict(steps=4))
    metrics = workers.run(4, train_recipe, recipe, ["parallel.pp=2"])[0]
    data = training_data(load_recipe(recipe))
    for m in metrics:
        drawn = data.source_indices(8 * (m["step"] - 1), 8).tolist()
        names = [("fr", "en")[i] for i in drawn]
        assert {key for key in m if key.startswith("loss/")} == {f"loss/{name}" for name in names}
        assert m["loss"] == pytest.approx(sum(m[f"loss/{name}"] for name in names) / 8, rel=1e-5)


def test_every_step_has_the_keys_of_the_contract(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=3, evaluate_every=2, evaluate_samples=3))
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    keys = {"step", "consumed_samples", "consumed_tokens", "loss", "grad_norm", "lr", "skipped"}
    keys |= {"step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes"}
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert keys <= m.keys()
        assert m["consumed_tokens"] == 32 * m["consumed_samples"] == 32 * 8 * m["step"]
        assert m["mfu"] is None, "the peak of a CPU is unknown"
        assert ("validation_loss" in m) == (m["step"] in (2, 3))

"""bf16 training follows fp32 training."""

import pytest

from tests.recipes import write_recipe, write_tokens
from tests.training_run import train_recipe

STEPS = 300


@pytest.mark.slow
def test_the_loss_curve_of_bf16_mixed_is_within_1_percent_of_fp32s(workers, tmp_path):
    for seed, name in enumerate(("fr", "en")):  # more than is read: of text learnt by heart, losses near 0 go astray
        write_tokens(tmp_path / f"{name}_text_document", seed, documents=600)
    recipe = write_recipe(tmp_path, train=dict(steps=STEPS, micro_batch_size=8), model=dict(num_hidden_layers=2))
    curves = []
    for precision in ("fp32", "bf16-mixed"):
        (metrics,) = workers.run(
            1, train_recipe, recipe, [f"train.precision={precision}", f"run.dir={tmp_path / precision}"]
        )
        curves.append([m["loss"] for m in metrics])
    fp32, bf16 = curves
    assert fp32 != bf16, "the precision made no difference at all"
    assert fp32[-1] < fp32[0] - 0.5, "a curve that stands still proves little"
    for step, (a, b) in enumerate(zip(fp32, bf16, strict=True), 1):
        assert b == pytest.approx(a, rel=0.01), step

"""bf16 training follows fp32 training."""

import pytest

from tests.recipes import write_recipe, write_tokens
from tests.training_run import train_recipe

STEPS = 300


@pytest.mark.slow
def test_the_loss_curves_of_bf16_mixed_are_within_1_percent_of_fp32s_with_moments_in_bf16_too(workers, tmp_path):
    for seed, name in enumerate(("fr", "en")):  # more than is read: of text learnt by heart, losses near 0 go astray
        write_tokens(tmp_path / f"{name}_text_document", seed, documents=600)
    recipe = write_recipe(tmp_path, train=dict(steps=STEPS, micro_batch_size=8), model=dict(num_hidden_layers=2))
    curves = []
    for number, (precision, moments) in enumerate((("fp32", "fp32"), ("bf16-mixed", "fp32"), ("bf16-mixed", "bf16"))):
        changes = [
            f"train.precision={precision}",
            f"optim.moments_dtype={moments}",
            f"run.dir={tmp_path / str(number)}",
        ]
        (metrics,) = workers.run(1, train_recipe, recipe, changes)
        curves.append([m["loss"] for m in metrics])
    fp32, *others = curves
    assert fp32 not in others and others[0] != others[1], "a precision made no difference at all"
    assert fp32[-1] < fp32[0] - 0.5, "a curve that stands still proves little"
    for curve in others:
        for step, (a, b) in enumerate(zip(fp32, curve, strict=True), 1):
            assert b == pytest.approx(a, rel=0.01), step

"""bf16 training follows fp32 training, where its updates are not lost."""

import json

import pytest

from megagap.optim.loss_scale import LARGEST
from megagap.training import step as training_step
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


@pytest.mark.slow
def test_pure_bf16_follows_fp32_within_1_percent_over_500_steps_unless_it_is_rounded_to_the_nearest(workers, tmp_path):
    """At a rate at which most updates of a matrix are smaller than the distance of its numbers."""
    for seed, name in enumerate(("fr", "en")):
        write_tokens(tmp_path / f"{name}_text_document", seed, documents=900)
    recipe = write_recipe(
        tmp_path,
        train=dict(steps=500, micro_batch_size=8),
        optim=dict(lr=3e-4, schedule="constant"),
        model=dict(num_hidden_layers=2),
    )
    curves = {}
    for name in ("fp32", "stochastic", "nearest"):
        pure = [] if name == "fp32" else ["train.precision=bf16-pure", f"optim.rounding={name}"]
        (metrics,) = workers.run(1, train_recipe, recipe, [*pure, f"run.dir={tmp_path / name}"])
        curves[name] = sum(m["loss"] for m in metrics[-20:]) / 20
    assert curves["stochastic"] == pytest.approx(curves["fp32"], rel=0.01)
    assert curves["nearest"] > 1.02 * curves["fp32"], "visibly behind"


@pytest.mark.parametrize("precision", ["bf16-pure", "fp16-mixed"])
def test_layouts_train_like_one_process_within_rounding(workers, tmp_path, precision):
    recipe = write_recipe(tmp_path, train=dict(steps=6, precision=precision), model=dict(num_hidden_layers=2))
    (whole,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'whole'}"])
    layouts = (["parallel.tp=2", "optim.zero=3"], ["parallel.pp=2", "parallel.schedule=zb-h1"], ["parallel.cp=2"])
    for number, layout in enumerate(layouts):
        metrics = workers.run(4, train_recipe, recipe, [*layout, f"run.dir={tmp_path / str(number)}"])[0]
        for ours, one in zip(metrics, whole, strict=True):
            assert ours["loss"] == pytest.approx(one["loss"], rel=1e-3), layout
            assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2), layout


def train_and_overflow(rank, ranks, recipe, overrides, at):
    """With a factor at step ``at`` that is too large."""
    begin = training_step.compute_gradients

    def computing(state, *rest, **others):
        if state.step == at and not others:
            state.optimizer.loss_scale.value.fill_(LARGEST)
        return begin(state, *rest, **others)

    training_step.compute_gradients = computing
    try:
        return train_recipe(rank, ranks, recipe, overrides)
    finally:
        training_step.compute_gradients = begin


@pytest.mark.parametrize("stops", [["run.stop_after=4"], ["train.steps=4"]], ids=["a stop", "the end"])
def test_an_overflow_of_fp16_in_the_last_step_neither_fails_a_run_nor_costs_its_checkpoint(workers, tmp_path, stops):
    recipe = write_recipe(tmp_path, train=dict(precision="fp16-mixed"), model=dict(num_hidden_layers=2))
    (metrics,) = workers.run(1, train_and_overflow, recipe, stops, 4)
    assert [m["skipped"] for m in metrics] == [False, False, False, True]
    assert (tmp_path / "run/checkpoints/step_00000004/index.json").exists()
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (skipped,) = [event for event in events if event["event"] == "skipped_step"]
    assert "overflowed fp16" in skipped["reason"]

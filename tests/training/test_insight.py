"""``run.insight_every``: what it says of each part of the model, against plain PyTorch, in every layout."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import load_model
from megagap.config import load_recipe
from megagap.training.datasets import training_data
from tests.recipes import write_recipe
from tests.training_run import train_recipe

LAYERS = 5
PARTS = ["embed_tokens", *(f"layers.{i}{kind}" for i in range(LAYERS) for kind in ("", ".norms")), "norm", "lm_head"]


def insight_of(record: dict) -> dict[str, float]:
    names = ("weight_norm", "gradient_norm", "update_norm", "changed", "activation_max")
    return {key: value for key, value in record.items() if key.split("/")[0] in names}


def by_part(model) -> dict[str, torch.Tensor]:
    """All weights of each part in one, by name."""
    found = defaultdict(list)
    for name, weight in model.stage.named_parameters():
        pieces = name.split(".")
        part = {"output": "lm_head"}.get(pieces[0], pieces[0])
        if part == "layers":
            part = f"layers.{pieces[1]}" + (".norms" if pieces[2].endswith("layernorm") else "")
        found[part].append(weight.detach().double().flatten())
    return {part: torch.cat(weights) for part, weights in found.items()}


def test_it_is_what_the_checkpoints_around_the_step_say(workers, tmp_path: Path):
    train, run = {"steps": 4}, {"insight_every": 3}
    recipe = write_recipe(tmp_path, train=train, checkpoint={"every": 1}, run=run)
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    assert [bool(insight_of(m)) for m in metrics] == [False, False, True, False]
    found = insight_of(metrics[2])
    before, after = (load_model(tmp_path / f"run/checkpoints/step_0000000{step}") for step in (2, 3))
    old, new = by_part(before), by_part(after)
    assert list(new) != [] and set(new) == set(PARTS)
    for part in PARTS:
        assert found[f"weight_norm/{part}"] == pytest.approx(float(new[part].norm()), rel=1e-5)
        assert found[f"update_norm/{part}"] == pytest.approx(float((new[part] - old[part]).norm()), rel=1e-4)
        assert found[f"changed/{part}"] == pytest.approx(float((new[part] != old[part]).double().mean()), rel=1e-6)
    squares = sum(found[f"gradient_norm/{part}"] ** 2 for part in PARTS)
    assert math.sqrt(squares) == pytest.approx(metrics[2]["grad_norm"], rel=1e-5)

    largest = [0.0] * LAYERS
    for i, layer in enumerate(before.stage.layers):
        layer.register_forward_hook(
            lambda module, given, made, i=i: largest.__setitem__(i, float((made[0] + made[1]).abs().max()))
        )
    tokens = torch.from_numpy(training_data(load_recipe(recipe)).batch(16, 8))
    with torch.no_grad():
        before.stage(tokens[:, :-1], 32)
    assert [found[f"activation_max/layers.{i}"] for i in range(LAYERS)] == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "layout", "tied"),
    [
        (4, ["parallel.tp=2", "parallel.pp=2"], True),
        (4, ["parallel.tp=2", "optim.zero=3"], False),
        (4, ["parallel.pp=2", "parallel.vpp=2", "optim.zero=2", "train.recompute=full"], False),
        (4, ["parallel.cp=2", "optim.zero=0"], False),
    ],
    ids=["tp2 pp2 tied", "tp2 dp2 zero 3", "pp2 vpp2 dp2 zero 2 recompute", "cp2 dp2 zero 0"],
)
def test_every_layout_says_the_same_as_one_process(workers, tmp_path: Path, ranks: int, layout: list[str], tied: bool):
    recipe = write_recipe(tmp_path, train={"steps": 2}, run={"insight_every": 2}, model={"tie_word_embeddings": tied})
    (one,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'one'}"])
    several = workers.run(ranks, train_recipe, recipe, layout)[0]
    expected, found = insight_of(one[1]), insight_of(several[1])
    assert found.keys() == expected.keys() and ("weight_norm/lm_head" in found) != tied
    for key, value in expected.items():
        # An element whose gradient is all but 0 may be updated the other way.
        assert found[key] == pytest.approx(value, rel=1e-3 if key.startswith(("update", "changed")) else 1e-5), key


def test_gains_that_bf16_freezes_are_seen_as_unchanged_while_matrices_change(workers, tmp_path: Path):
    """A step of 1e-4 is less than half of the distance of bf16 numbers next to 1, 2⁻⁸ below it."""
    recipe = write_recipe(
        tmp_path,
        train={"steps": 2, "precision": "bf16-mixed"},
        optim={"lr": 1e-4, "warmup_steps": 0, "schedule": "constant"},
        run={"insight_every": 1},
        parallel={"pp": 2},
    )
    metrics = workers.run(2, train_recipe, recipe, [])[0]
    for record in metrics:
        found = insight_of(record)
        for i in range(LAYERS):
            assert found[f"changed/layers.{i}.norms"] == 0 < found[f"changed/layers.{i}"] < 1
            assert found[f"update_norm/layers.{i}.norms"] > 0, "the masters move"


def test_tensorboard_has_it_whatever_its_interval(workers, tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = {"insight_every": 2, "tensorboard": True, "tensorboard_every": 100}
    recipe = write_recipe(tmp_path, train={"steps": 5}, run=run, model={"num_hidden_layers": 1})
    workers.run(1, train_recipe, recipe, [])
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("update_norm/layers.0.norms")] == [2, 4]

import pytest
import torch

from megagap.optim import loss_scale
from megagap.optim.loss_scale import INITIAL, INTERVAL, LARGEST, LossScale
from tests.recipes import write_recipe
from tests.training_run import train_recipe

OVERFLOW, FITS = torch.tensor(torch.inf), torch.tensor(1.0)


def after(norms, state=()):
    scale = LossScale(torch.device("cpu"))
    scale.load_state(list(state))
    for norm in norms:
        scale.update(norm)
    return scale.state()


def test_the_factor_halves_at_an_overflow_and_doubles_after_many_steps_without():
    assert after([]) == [INITIAL, 0]
    assert after([FITS, torch.tensor(torch.nan), OVERFLOW, FITS]) == [INITIAL / 4, 1]
    assert after([FITS] * 2, state=(1024.0, INTERVAL - 2)) == [2048, 0]
    assert after([FITS, OVERFLOW, FITS], state=(1024.0, INTERVAL - 2)) == [512, 1]


def test_the_factor_stays_within_bounds():
    assert after([OVERFLOW], state=(1.0, 0)) == [1, 0]
    assert after([FITS], state=(LARGEST, INTERVAL - 1)) == [LARGEST, 0]


def test_gradients_are_those_without_a_factor_once_divided_by_it():
    scale = LossScale(torch.device("cpu"))
    assert scale.scaled(torch.tensor(3.0)) == 3 * INITIAL
    assert scale.unscaled(scale.scaled(torch.tensor(3.0))) == 3


def train_from(rank, ranks, recipe, overrides, initial):
    """From another factor than the usual one."""
    loss_scale.INITIAL, usual = initial, loss_scale.INITIAL
    try:
        return train_recipe(rank, ranks, recipe, overrides)
    finally:
        loss_scale.INITIAL = usual


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_that_overflow_are_skipped_until_the_factor_fits_and_a_resumed_run_goes_on_with_it(
    workers, tmp_path, ranks
):
    recipe = write_recipe(
        tmp_path, train=dict(precision="fp16-mixed"), model=dict(num_hidden_layers=2), run=dict(insight_every=1)
    )
    too_large = LARGEST
    whole = workers.run(ranks, train_from, recipe, [f"run.dir={tmp_path / 'whole'}"], too_large)[0]
    skipped = [m["skipped"] for m in whole]
    assert skipped[0] and not skipped[-1]
    factors = [m["loss_scale"] for m in whole]
    assert factors == [too_large / 2 ** sum(skipped[:step]) for step in range(10)]
    assert whole[0]["loss"] == pytest.approx(whole[1]["loss"], rel=0.01) and whole[-1]["loss"] < whole[0]["loss"]
    last = whole[-1]
    parts = [value**2 for name, value in last.items() if name.startswith("gradient_norm/")]
    assert sum(parts) ** 0.5 == pytest.approx(last["grad_norm"], rel=1e-4)

    folder = f"run.dir={tmp_path / 'parts'}"
    stop = skipped.index(False) + 1
    workers.run(ranks, train_from, recipe, [folder, f"run.stop_after={stop}"], too_large)
    resumed = workers.run(ranks, train_from, recipe, [folder], 1.0)[0]
    numbers = [[(m["loss"], m["grad_norm"], m["loss_scale"]) for m in metrics[stop:]] for metrics in (whole, resumed)]
    assert numbers[0] == numbers[1]

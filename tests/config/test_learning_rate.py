"""Learning rates at the steps where a schedule changes."""

import pytest

from megagap.config import Optim
from megagap.config.learning_rate import learning_rate


def rates(steps, **settings):
    optim = Optim(lr=1.0, min_lr=0.1, **settings)
    return [learning_rate(optim, steps, step) for step in range(1, steps + 1)]


def test_warmup_is_linear_and_starts_at_lr_over_warmup_steps():
    assert rates(8, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_linear_reaches_min_lr_at_the_last_step():
    assert rates(4, schedule="linear") == pytest.approx([0.775, 0.55, 0.325, 0.1])


def test_cosine_is_halfway_at_half_time():
    values = rates(10, warmup_steps=2, schedule="cosine")
    assert values[1] == 1 and values[5] == pytest.approx(0.55) and values[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "half_way"), [("linear", 0.55), ("cosine", 0.55), ("sqrt", 1 - 0.9 * 0.5**0.5)])
def test_wsd_stays_constant_until_its_cooldown(shape, half_way):
    values = rates(10, warmup_steps=2, schedule="wsd", cooldown_steps=4, cooldown_shape=shape)
    assert values[2:6] == [1, 1, 1, 1]
    assert values[7] == pytest.approx(half_way) and values[9] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_the_last_step_the_rate_stays_at_min_lr_even_if_all_steps_were_warmup(schedule):
    optim = Optim(lr=1.0, min_lr=0.1, warmup_steps=4, schedule=schedule)
    assert [learning_rate(optim, 4, step) for step in (4, 5, 6)] == pytest.approx([1.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({"lr": 3e-4, "warmup_steps": 2_000}, 500_000, {1: 1.5e-7, 1_000: 1.5e-4, 2_000: 3e-4, 500_000: 3e-4}),
        ({"lr": 2e-4, "min_lr": 2e-5, "schedule": "cosine"}, 137_000, {34_250: 1.736396e-4, 108_000: 3.917797e-5}),
        (
            {"lr": 1.0, "min_lr": 0.1, "schedule": "wsd", "warmup_steps": 100, "cooldown_steps": 100},
            1_000,
            {100: 1.0, 900: 1.0, 950: 0.55, 1_000: 0.1},
        ),
        ({"lr": 1.0, "min_lr": 0.0, "schedule": "wsd", "cooldown_steps": 10}, 20, {10: 1.0, 15: 0.5, 20: 0.0}),
        ({"lr": 1.0, "min_lr": 0.0, "schedule": "cosine"}, 20, {10: 0.5, 20: 0.0}),
    ],
    ids=["constant after a long warmup", "cosine to a tenth", "wsd to a tenth", "wsd to nothing", "cosine to nothing"],
)
def test_rates_of_published_schedules(settings, steps, expected):
    optim = Optim(**({"schedule": "constant"} | settings))
    found = {step: learning_rate(optim, steps, step) for step in expected}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)

"""What bf16 alone does to small updates, and the cures."""

import pytest
import torch

from megagap.config import Optim
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter, whole

GAIN = 0.050048828125
"""1/20 in bf16: what a gain of 1 is stored as with ``model.norm_gain_scale = 20``."""


def trained(start: float, rounding: str, lr: float, gradient: float = 1.0, size: int = 4096, updates: int = 1):
    """The gains of a norm of so many features, all of which start there, after some updates of lr each."""
    gains = ShardedParameter(whole("model.norm.weight", (size,)), torch.device("cpu"), torch.float32)
    torch.nn.init.constant_(gains, start)
    optim = Optim(lr=lr, weight_decay=0.0, moments_dtype="bf16", rounding=rounding)
    optimizer = DistributedOptimizer([gains], optim, Mesh.single(), torch.bfloat16, gradient_dtype=torch.bfloat16)
    for _ in range(updates):
        optimizer.store.begin(1)
        gains.backward(torch.full((size,), gradient, dtype=torch.bfloat16))
        optimizer.store.finish()
        optimizer.step(lr, torch.tensor(1.0), torch.tensor(True))
    return gains.detach()


@pytest.mark.parametrize(
    ("start", "gradient", "lr", "moves"),
    [
        (1.0, -1, 4.0e-3, True),  # upward: half of 2⁻⁷
        (1.0, -1, 3.8e-3, False),
        (1.0, 1, 2.0e-3, True),  # downward: half of 2⁻⁸
        (1.0, 1, 1.9e-3, False),
        *((GAIN, gradient, lr, True) for gradient in (1, -1) for lr in (3e-4, 2e-4, 1.23e-4)),
        *((GAIN, gradient, lr, False) for gradient in (1, -1) for lr in (1.21e-4, 9.5e-5, 3e-5)),
    ],
)
def test_rounded_to_the_nearest_a_gain_moves_only_by_updates_of_half_a_unit(start, gradient, lr, moves):
    before, after = torch.tensor(start).bfloat16(), trained(start, "nearest", lr, gradient)
    assert (after != before).all() if moves else (after == before).all()


UPDATES, RATE = 200, 3e-5
"""A rate at which gains are frozen."""


@pytest.mark.parametrize("start", [1.0, GAIN])
def test_rounded_stochastically_gains_move_as_exact_ones_on_average(start):
    assert (trained(start, "nearest", RATE, updates=UPDATES) == start).all()
    moved = start - trained(start, "stochastic", RATE, updates=UPDATES).double()
    assert moved.unique().numel() > 1
    assert moved.mean().item() == pytest.approx(UPDATES * RATE, rel=0.03)


@pytest.mark.parametrize("start", [1.0, GAIN])
def test_kahan_loses_nothing_of_any_update(start):
    exact = torch.tensor(start - UPDATES * RATE).bfloat16()
    assert (trained(start, "kahan", RATE, updates=UPDATES) == exact).all() and exact != start


@pytest.mark.parametrize(
    ("rounding", "moments", "bytes_per_parameter"),
    [("stochastic", "bf16", 8), ("nearest", "bf16", 8), ("kahan", "bf16", 10), ("stochastic", "fp32", 12)],
)
def test_bytes_per_parameter_are_those_of_the_documentation(rounding, moments, bytes_per_parameter):
    weight = ShardedParameter(whole("a.weight", (64, 64)), torch.device("cpu"), torch.float32)
    optim = Optim(moments_dtype=moments, rounding=rounding)
    optimizer = DistributedOptimizer([weight], optim, Mesh.single(), torch.bfloat16, gradient_dtype=torch.bfloat16)
    (bucket,), (state,) = optimizer.store.buckets, optimizer.states
    kept = [bucket.values, bucket.own_gradient, *state.values()]
    kept += [] if bucket.remainder is None else [bucket.remainder]
    assert sum(tensor.nbytes for tensor in kept) == bytes_per_parameter * weight.numel()

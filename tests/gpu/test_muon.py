"""Muon on a GPU, whose products are in bf16, follows Muon on a CPU."""

import pytest
import torch

from megagap.config import Optim
from megagap.optim.muon_rule import Muon

pytestmark = pytest.mark.gpu


def updated(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights before and after two steps, and the momentum."""
    rule, shape = Muon(Optim(name="muon", weight_decay=0.1)), (48, 80)
    before, *gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(device).flatten(1)
    weight, state, one = before.clone(), rule.new_state(before), torch.ones((), device=device)
    for gradient in gradients:
        prepared = rule.prepare(gradient, state, one, (), one, 0 * one)
        update = rule.compute(prepared.view(shape)).flatten()
        rule.apply(weight, None, update, 1e-2, 0 * one, True)
    return before.cpu(), weight.cpu(), state["momentum"].cpu()


def test_a_gpus_updates_are_those_of_a_cpu_but_for_the_rounding_of_bf16(gpu: torch.device):
    before, expected, momentum = updated(torch.device("cpu"))
    _, found, theirs = updated(gpu)
    torch.testing.assert_close(theirs, momentum)
    change = expected - before
    assert (found - expected).norm() < 0.03 * change.norm()

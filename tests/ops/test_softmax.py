import importlib

import pytest
import torch

from megagap.ops import compiled, cross_entropy_, losses_of, softmax_gradient_, softmax_statistics

plain = importlib.import_module("megagap.ops.softmax")
FORMS = [
    pytest.param((softmax_statistics, softmax_gradient_), id="chosen"),
    pytest.param((plain.reference_statistics, plain.reference_gradient_), id="plain"),
]
needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")


def log_sum_exp(statistics):
    return statistics[0] + statistics[1].log()


def in_two_passes(form):
    statistics_of, gradient_ = form

    def run(logits, targets, scale, z_loss=0.0):
        statistics = statistics_of(logits, targets)
        gradient_(logits, targets, statistics, scale, z_loss)
        return statistics

    return run


@pytest.mark.parametrize(
    "to_gradient_",
    [pytest.param(cross_entropy_, id="one pass"), *(pytest.param(in_two_passes(*f.values), id=f.id) for f in FORMS)],
)
@pytest.mark.parametrize("columns", [1, 7, 16, 100, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_losses_and_gradient_equal_those_of_float64(to_gradient_, columns, dtype, z_loss):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, columns + 3, generator=generator)).to(dtype)[:, :columns]
    targets = torch.randint(columns, (7,), generator=generator)
    targets[3] = -100
    exact, scale = logits.double().requires_grad_(), torch.tensor(0.3)
    cross_entropies = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    z_losses = z_loss * exact.logsumexp(-1).square() * (targets >= 0)
    ((cross_entropies + z_losses).sum() * scale.double()).backward()

    losses = losses_of(to_gradient_(logits, targets, scale, z_loss), targets, z_loss)
    for got, wanted in zip(losses, (cross_entropies, z_losses), strict=True):
        torch.testing.assert_close(got.double(), wanted.detach(), rtol=1e-6, atol=2e-6)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.double(), exact.grad, rtol=rounding, atol=2e-7)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_vocabulary_have_the_gradient_of_their_columns(form):
    statistics_of, gradient_ = form
    logits, targets, scale = torch.randn(4, 30), torch.tensor([4, 19, 20, -100]), torch.tensor(0.5)
    wanted = logits.clone()
    whole = cross_entropy_(wanted, targets, scale, 0.01)
    parts = [(part.clone(), first) for part, first in ((logits[:, :20], 0), (logits[:, 20:], 20))]
    at_target = sum(statistics_of(part, targets, first)[2] for part, first in parts)
    torch.testing.assert_close(at_target, logits[range(4), targets.clamp(min=0)] * (targets >= 0))
    for part, first in parts:
        gradient_(part, targets, whole, scale, 0.01, first)
    torch.testing.assert_close(torch.cat([part for part, _ in parts], 1), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", [0, 17, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_makes_the_loss_not_finite(form, column, bad):
    logits, targets = torch.randn(1, 33), torch.tensor([5])
    logits[0, column] = bad
    assert not losses_of(form[0](logits, targets), targets)[0].isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_masked_logits_do_not_contribute(form):
    logits, targets = torch.randn(1, 40), torch.tensor([5])
    logits[0, 20:] = float("-inf")
    statistics = form[0](logits, targets)
    torch.testing.assert_close(log_sum_exp(statistics), logits[:, :20].logsumexp(-1))
    form[1](logits, targets, statistics, torch.ones(()))
    assert not logits[0, 20:].any()


@needs_kernels
def test_a_target_beyond_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="target 20 in 20 columns"):
        cross_entropy_(torch.randn(1, 20), torch.tensor([20]), torch.ones(()))

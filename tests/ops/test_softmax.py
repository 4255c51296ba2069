import importlib

import pytest
import torch

from megagap.ops import compiled, softmax_gradient_, softmax_statistics

cross_entropy = importlib.import_module("megagap.ops.softmax")
FORMS = [
    pytest.param((softmax_statistics, softmax_gradient_), id="chosen"),
    pytest.param((cross_entropy.reference_statistics, cross_entropy.reference_gradient_), id="plain"),
]
needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [1, 7, 16, 100, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_equal_those_of_float64(form, columns, dtype):
    statistics, gradient_ = form
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, columns + 3, generator=generator)).to(dtype)[:, :columns]
    targets = torch.randint(columns, (6,), generator=generator)
    scale = torch.rand(6, generator=generator)
    wide = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    losses.backward(scale.double())

    maximum, total, at_target = statistics(logits, targets)
    log_sum_exp = maximum + total.log()
    torch.testing.assert_close((log_sum_exp - at_target).double(), losses.detach(), rtol=1e-6, atol=2e-6)
    gradient_(logits, targets, log_sum_exp, scale)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.double(), wide.grad, rtol=rounding, atol=2e-7)


@pytest.mark.parametrize("form", FORMS)
def test_an_absent_target_adds_no_logit_and_gets_no_gradient(form):
    statistics, gradient_ = form
    logits, targets = torch.randn(2, 20), torch.tensor([-1, 4])
    maximum, total, at_target = statistics(logits, targets)
    assert at_target[0] == 0 and at_target[1] == logits[1, 4]
    softmax = logits.softmax(-1)
    gradient_(logits, targets, maximum + total.log(), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(logits, torch.stack([softmax[0], torch.zeros(20)]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", [0, 17, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_makes_the_loss_not_finite(form, column, bad):
    logits = torch.randn(1, 33)
    logits[0, column] = bad
    maximum, total, at_target = form[0](logits, torch.tensor([5]))
    assert not (maximum + total.log() - at_target).isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_masked_logits_do_not_contribute(form):
    logits = torch.randn(1, 40)
    logits[0, 20:] = float("-inf")
    maximum, total, _ = form[0](logits, torch.tensor([5]))
    torch.testing.assert_close(maximum + total.log(), logits[:, :20].logsumexp(-1))
    form[1](logits, torch.tensor([5]), maximum + total.log(), torch.ones(1))
    assert not logits[0, 20:].any()


@needs_kernels
def test_targets_outside_the_columns_are_refused():
    for wrong in (20, -2):
        with pytest.raises(IndexError, match="in 20 columns"):
            softmax_statistics(torch.randn(1, 20), torch.tensor([wrong]))

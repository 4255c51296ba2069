import pytest
import torch
from torch import Tensor

from tests.ops.gpu_source.shim import Shim

SIZES = [1, 7, 1000, 4099, 20008]
"""Columns of the vocabulary shard: less than a wave, not a multiple of 16 bytes, several turns of every thread."""


def inputs(size: int, dtype: torch.dtype, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = (5 * torch.randn(rows, size, generator=generator)).to(dtype)
    targets = torch.randint(0, size, (rows,), generator=generator)
    targets[1], targets[2] = -1, size  # of other shards
    targets[3] = size - 1
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_rows_give_maximum_sum_and_target_logit(shim: Shim, size, dtype):
    logits, targets = inputs(size, dtype)
    maximum, total, at_target = shim.cross_entropy_rows(logits, targets)
    exact = logits.double()
    assert torch.equal(maximum, logits.float().amax(-1))
    expected = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    here = (targets >= 0) & (targets < size)
    assert torch.equal(at_target, torch.where(here, logits.float()[torch.arange(6), targets.clamp(0, size - 1)], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_gradient_replaces_the_logits(shim: Shim, size, dtype):
    logits, targets = inputs(size, dtype)
    lse, scale = logits.double().logsumexp(-1), torch.rand(6, generator=torch.Generator().manual_seed(1))
    exact = (logits.double() - lse.unsqueeze(1)).exp()
    here = (targets >= 0) & (targets < size)
    exact[here, targets[here]] -= 1
    exact *= scale.double().unsqueeze(1)
    shim.cross_entropy_rows_gradient_(logits, targets, lse.float(), scale)
    unit = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(logits.double(), exact, rtol=unit + 6e-6, atol=max(2e-7, unit * 2**-13))


@pytest.mark.parametrize(("size", "stride"), [(1000, 1008), (1000, 1011), (1003, 1008)])
def test_rows_may_be_strided_and_the_gaps_are_untouched(shim: Shim, size, stride):
    logits, targets = inputs(size, torch.bfloat16)
    wide = torch.full((6, stride), 7.0, dtype=torch.bfloat16)
    wide[:, :size] = logits
    together, apart = shim.cross_entropy_rows(logits, targets), shim.cross_entropy_rows(wide[:, :size], targets)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    lse, scale = together[0] + together[1].log(), torch.ones(6)
    shim.cross_entropy_rows_gradient_(logits, targets, lse, scale)
    shim.cross_entropy_rows_gradient_(wide[:, :size], targets, lse, scale)
    assert torch.equal(wide[:, :size], logits) and (wide[:, size:] == 7).all()


def test_logits_of_minus_infinity_do_not_contribute_and_rows_of_them_give_no_nan(shim: Shim):
    logits = torch.full((2, 40), -torch.inf)
    logits[0, 3] = 2.0
    maximum, total, _ = shim.cross_entropy_rows(logits, torch.tensor([3, 3]))
    assert maximum.tolist() == [2.0, -torch.inf] and total.tolist() == [1.0, 0.0]


def test_nan_is_not_hidden(shim: Shim):
    logits = torch.randn(2, 700)
    logits[1, 500] = torch.nan
    assert shim.cross_entropy_rows(logits, torch.zeros(2, dtype=torch.int64))[1].isnan().tolist() == [False, True]


def test_bits_are_the_same_when_repeated_and_with_threads_in_reverse(shim: Shim):
    logits, targets = inputs(4099, torch.float32)
    first = shim.cross_entropy_rows(logits, targets)
    shim.reverse_threads(True)
    again = shim.cross_entropy_rows(logits, targets)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_no_rows_give_nothing(shim: Shim):
    assert shim.cross_entropy_rows(torch.empty(0, 9), torch.empty(0, dtype=torch.int64))[0].shape == (0,)

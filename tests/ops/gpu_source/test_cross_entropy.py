import pytest
import torch
from torch import Tensor

from tests.ops.gpu_source.shim import Shim

SIZES = [1, 7, 1000, 4099, 20008]
"""Columns of the vocabulary shard: less than a wave, not a multiple of 16 bytes, several turns of every thread."""

FIRST = 50
"""The first column's id."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE, Z_LOSS = torch.tensor(0.7), 0.01


def inputs(size: int, dtype: torch.dtype, first: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = (5 * torch.randn(rows, size, generator=generator)).to(dtype)
    targets = first + torch.randint(0, size, (rows,), generator=generator)
    targets[1], targets[3] = -100, first + size - 1
    return logits, targets


def of_a_shard(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, targets = inputs(size, dtype, FIRST)
    targets[2], targets[4] = FIRST - 1, FIRST + size  # of other shards
    return logits, targets


def exact_gradient(logits: Tensor, columns: Tensor, counted: Tensor) -> Tensor:
    """``columns``: of the targets, or outside of the logits."""
    lse = logits.double().logsumexp(-1, keepdim=True)
    gradient = (logits.double() - lse).exp() * (1 + 2 * Z_LOSS * lse)
    here = (columns >= 0) & (columns < logits.shape[1])
    gradient[here, columns[here]] -= 1
    return gradient * counted.unsqueeze(1) * SCALE.double()


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    unit = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=unit + 6e-6, atol=max(5e-7, unit * 2**-13))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_give_maximum_sum_and_target_logit(shim: Shim, size, dtype):
    logits, targets = of_a_shard(size, dtype)
    maximum, total, at_target = shim.cross_entropy_rows(logits, targets, FIRST)
    exact = logits.double()
    assert torch.equal(maximum, logits.float().amax(-1))
    expected = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    columns = targets - FIRST
    here = (columns >= 0) & (columns < size)
    assert here.tolist() == [True, False, False, True, False, True]
    assert torch.equal(at_target, torch.where(here, logits.float()[torch.arange(6), columns.clamp(0, size - 1)], 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gradient_replaces_the_logits(shim: Shim, size, dtype):
    logits, targets = of_a_shard(size, dtype)
    exact = exact_gradient(logits, targets - FIRST, targets >= 0)
    statistics = shim.cross_entropy_rows(logits, targets, FIRST)
    shim.cross_entropy_rows_gradient_(logits, targets, FIRST, statistics, SCALE, Z_LOSS)
    assert_rounded(logits, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_one_pass_gives_what_two_give(shim: Shim, size, dtype):
    logits, targets = inputs(size, dtype)
    exact, expected = exact_gradient(logits, targets, targets >= 0), shim.cross_entropy_rows(logits, targets, 0)
    statistics = shim.cross_entropy_(logits, targets, SCALE, Z_LOSS)
    torch.testing.assert_close(statistics, expected, rtol=1e-6, atol=0)
    assert_rounded(logits, exact)


@pytest.mark.parametrize(("size", "stride"), [(1000, 1008), (1000, 1011), (1003, 1008)])
def test_rows_may_be_strided_and_the_gaps_are_untouched(shim: Shim, size, stride):
    given, targets = inputs(size, torch.bfloat16)

    def strided() -> Tensor:
        wide = torch.full((6, stride), 7.0, dtype=torch.bfloat16)
        wide[:, :size] = given
        return wide

    logits, wide, in_one_pass = given.clone(), strided(), strided()
    together, apart = (shim.cross_entropy_rows(rows, targets, 0) for rows in (logits, wide[:, :size]))
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0)
    for rows in (logits, wide[:, :size]):
        shim.cross_entropy_rows_gradient_(rows, targets, 0, together, SCALE, Z_LOSS)
    shim.cross_entropy_(in_one_pass[:, :size], targets, SCALE, Z_LOSS)
    assert torch.equal(wide[:, :size], logits) and (wide[:, size:] == 7).all()
    torch.testing.assert_close(in_one_pass[:, :size], logits, rtol=2**-7, atol=1e-6)
    assert (in_one_pass[:, size:] == 7).all()


def test_logits_of_minus_infinity_do_not_contribute_and_rows_of_them_give_no_nan(shim: Shim):
    logits = torch.full((2, 40), -torch.inf)
    logits[0, 3] = 2.0
    maximum, total, _ = shim.cross_entropy_rows(logits, torch.tensor([3, 3]), 0)
    assert maximum.tolist() == [2.0, -torch.inf] and total.tolist() == [1.0, 0.0]


def test_columns_of_minus_infinity_get_no_gradient_in_one_pass(shim: Shim):
    """Whole vectors of them, as headless models have where targets are ignored, and at the end of a row."""
    logits, targets = inputs(4099, torch.float32)
    targets = targets.where(targets < 0, 2000)
    logits[:, 100:1900] = logits[:, 4090:] = -torch.inf
    exact = exact_gradient(logits, targets, targets >= 0)
    shim.cross_entropy_(logits, targets, SCALE, Z_LOSS)
    assert not logits[:, 100:1900].any() and not logits[:, 4090:].any()
    assert_rounded(logits, exact)


def test_nan_is_not_hidden(shim: Shim):
    logits, targets = torch.randn(2, 700), torch.zeros(2, dtype=torch.int64)
    logits[1, 500] = torch.nan
    assert shim.cross_entropy_rows(logits, targets, 0)[1].isnan().tolist() == [False, True]
    shim.cross_entropy_(logits, targets, SCALE, 0.0)
    assert logits.isnan().any(1).tolist() == [False, True]


def test_bits_are_the_same_when_repeated_and_with_threads_in_reverse(shim: Shim):
    logits, targets = inputs(4099, torch.float32)
    first = shim.cross_entropy_rows(logits, targets, 0)
    gradient = logits.clone()
    in_one_pass = shim.cross_entropy_(gradient, targets, SCALE, Z_LOSS)
    shim.reverse_threads(True)
    assert torch.equal(first, shim.cross_entropy_rows(logits, targets, 0))
    assert torch.equal(in_one_pass, shim.cross_entropy_(logits, targets, SCALE, Z_LOSS))
    assert torch.equal(gradient, logits)


def test_no_rows_give_nothing(shim: Shim):
    logits, targets = torch.empty(0, 9), torch.empty(0, dtype=torch.int64)
    assert shim.cross_entropy_rows(logits, targets, 0).shape == (3, 0)
    assert shim.cross_entropy_(logits, targets, SCALE, 0.0).shape == (3, 0)

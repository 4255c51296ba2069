"""fp32 numbers as bf16 and a remainder: none is lost, and the bf16 part is the number rounded to nearest."""

import torch
from torch import Tensor

from megagap.ops.remainder import join, split_


def all_kinds_of_numbers() -> Tensor:
    """For each of the 65,536 upper halves of fp32 numbers (zeros, denormals, infinities and NaN among them), lower
    halves at and beside every border of rounding, and others."""
    generator = torch.Generator().manual_seed(0)
    lower = torch.tensor([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    lower = torch.cat([lower, torch.randint(0, 2**16, (24,), generator=generator)])
    bits = (torch.arange(-(2**15), 2**15)[:, None] * 2**16 + lower).flatten()
    return bits.to(torch.int32).view(torch.float32)


def parts_of(numbers: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(numbers.shape, dtype=torch.bfloat16)
    remainder = torch.empty(numbers.shape, dtype=torch.int16)
    split_(numbers, values, remainder)
    return values, remainder


def test_every_number_keeps_its_bits_and_nan_stays_nan_in_bf16_too():
    numbers = all_kinds_of_numbers()
    values, remainder = parts_of(numbers)
    joined, is_nan = join(values, remainder), numbers.isnan()
    assert torch.equal(joined.view(torch.int32)[~is_nan], numbers.view(torch.int32)[~is_nan])
    assert torch.equal(joined.isnan(), is_nan) and torch.equal(values.isnan(), is_nan)


def test_bf16_is_the_nearest_and_away_from_zero_half_way():
    numbers = all_kinds_of_numbers()
    numbers = numbers[~numbers.isnan()]
    values, _ = parts_of(numbers)
    half_way = (numbers.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(values[~half_way].view(torch.int16), numbers[~half_way].bfloat16().view(torch.int16))
    assert half_way.sum() == 2 * 255 * 128
    away = (numbers[half_way].view(torch.int32) + 2**15).view(torch.float32)
    assert torch.equal(values[half_way].float(), away)


def test_views_with_gaps_and_other_dtypes_are_stored_too():
    values, remainder = torch.zeros(6, 8, dtype=torch.bfloat16), torch.zeros(6, 8, dtype=torch.int16)
    numbers = torch.randn(3, 4, dtype=torch.float64)
    split_(numbers, values[1:4, ::2], remainder[1:4, ::2])
    assert torch.equal(join(values, remainder)[1:4, ::2], numbers.float())
    assert values.count_nonzero() == 12
    split_(numbers.bfloat16(), values[1:4, ::2], remainder[1:4, ::2])
    assert torch.equal(values[1:4, ::2], numbers.bfloat16()) and not remainder.any()


def test_without_a_remainder_the_numbers_are_the_values():
    values = torch.zeros(3)
    split_(torch.ones(3).bfloat16(), values, None)
    assert join(values, None) is values and torch.equal(values, torch.ones(3))

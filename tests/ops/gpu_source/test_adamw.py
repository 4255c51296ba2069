import pytest
import torch
from torch import Tensor

from megagap.ops.remainder import join, split_
from tests.ops.gpu_source.shim import Shim
from tests.ops.test_remainder import all_kinds_of_numbers

FULL, HALF = torch.float32, torch.bfloat16
TYPES = [
    (FULL, FULL, FULL),
    (FULL, FULL, HALF),
    (FULL, HALF, FULL),
    (HALF, FULL, FULL),
    (HALF, FULL, HALF),
    (HALF, HALF, FULL),
    (HALF,) * 3,
]
"""Of parameter, moments, gradient."""
KEY = 0x123456789ABC
PLACE = (5, 0, 1, 1, 0)
"""Of a whole parameter."""


def inputs(size: int, types: tuple[torch.dtype, ...] = (FULL,) * 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parameter, exp_avg, exp_avg_sq, grad"""
    generator = torch.Generator().manual_seed(size)
    parameter, average, square, grad = (torch.randn(size, generator=generator) for _ in range(4))
    parameter_type, moment_type, grad_type = types
    return parameter.to(parameter_type), average.to(moment_type), square.pow(2).to(moment_type), grad.to(grad_type)


def exact_update(
    state: tuple[Tensor, ...], *, step: int, grad_scale: float = 1.0, lr: float = 1e-2, weight_decay: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Kingma & Ba's formulas with decoupled decay, in float64."""
    parameter, average, square, grad = (tensor.double() for tensor in state)
    grad = grad / grad_scale
    average, square = 0.9 * average + 0.1 * grad, 0.999 * square + 0.001 * grad**2
    corrected = average / (1 - 0.9**step), square / (1 - 0.999**step)
    return parameter * (1 - lr * weight_decay) - lr * corrected[0] / (corrected[1].sqrt() + 1e-8), average, square


def philox(words: list[int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-7 of a counter of four words, as published."""
    low, high = key
    for _ in range(7):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ low,
            second & 0xFFFFFFFF,
            first >> 32 ^ words[3] ^ high,
            first & 0xFFFFFFFF,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return words


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("size", [1, 4096, 5003])
def test_update_equals_float64_within_rounding(shim: Shim, size, types):
    state = inputs(size, types)
    expected = exact_update(state, step=3, grad_scale=4.0)
    shim.adamw_(*state, step=3, grad_scale=4.0, rounding=PLACE if types[1] == HALF and types != (HALF,) * 3 else None)
    for got, wanted in zip(state, expected, strict=False):
        unit = 2**-7 if got.dtype == HALF else 0
        torch.testing.assert_close(got.double(), wanted, rtol=unit + 1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 4096, 5003])
def test_a_parameter_with_a_remainder_is_updated_as_its_master_bit_for_bit(shim: Shim, size):
    master, *moments, grad = inputs(size)
    others = [moment.clone() for moment in moments]
    values, remainder = master.bfloat16(), torch.zeros(size, dtype=torch.int16)
    split_(master, values, remainder)
    for step in range(3, 6):
        shim.adamw_(master, *moments, grad, step=step)
        shim.adamw_(values, *others, grad, step=step, remainder=remainder)
    shim.adamw_(values, *others, grad, step=6, found_inf=1.0, remainder=remainder)
    assert torch.equal(join(values, remainder), master)
    assert all(torch.equal(one, other) for one, other in zip(moments, others, strict=True))


def test_an_update_of_nothing_keeps_every_kind_of_master(shim: Shim):
    numbers = all_kinds_of_numbers()[::5]
    values, remainder = numbers.bfloat16(), torch.zeros(len(numbers), dtype=torch.int16)
    split_(numbers, values, remainder)
    before, zeros = (values.clone(), remainder.clone()), torch.zeros(len(numbers))
    shim.adamw_(values, zeros, zeros.clone(), zeros.clone(), step=1, lr=0.0, remainder=remainder)
    assert torch.equal(values.view(torch.int16), before[0].view(torch.int16)) and torch.equal(remainder, before[1])


def test_twenty_steps_follow_torchs_adamw(shim: Shim):
    parameter, average, square, _ = inputs(300)
    average.zero_(), square.zero_()
    theirs = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(1, 21):
        grad = torch.randn(300, generator=torch.Generator().manual_seed(step))
        shim.adamw_(parameter, average, square, grad, step=step)
        theirs.grad = grad
        optimizer.step()
    torch.testing.assert_close(parameter, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_found_inf_leaves_everything_as_it_was(shim: Shim):
    state = inputs(70)
    before = [tensor.clone() for tensor in state]
    shim.adamw_(*state, step=1, found_inf=1.0)
    assert all(torch.equal(one, other) for one, other in zip(state, before, strict=True))


def test_philox_of_the_test_gives_the_published_words():
    assert philox([0] * 4, (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(
    ("size", "start", "place"),
    [
        (64, 0, (0, 1, 1, 0)),
        (67, 1, (5, 1, 1, 0)),  # aligned neither in the buffer nor in the tensor
        (64, 0, (2**33, 1, 1, 3)),
        (64, 0, (3, 7, 30, 11)),  # some columns: rows shorter than two vectors, and longer
        (67, 1, (0, 40, 41, 0)),
    ],
)
def test_stochastic_rounding_compares_the_truncated_bits_with_philox(shim: Shim, size, start, place):
    parameter, *rest = (tensor[start:] for tensor in inputs(size + start, (HALF, FULL, HALF)))
    wide = [parameter.float(), *(tensor.clone() for tensor in rest)]
    shim.adamw_(*wide, step=7)  # the same update, not rounded
    shim.adamw_(parameter, *rest, step=7, rounding=(KEY, *place))
    first, columns, pitch, offset = place
    for index, bits in enumerate(wide[0].view(torch.int32).tolist()):
        row, column = divmod(first + index, columns)
        element = offset + row * pitch + column
        words = philox([element // 8 & 0xFFFFFFFF, element // 8 >> 32, 7, 0], (KEY & 0xFFFFFFFF, KEY >> 32))
        random = words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF
        up = (bits & 0xFFFF) + random > 0xFFFF
        expected = ((bits >> 16) + up) & 0xFFFF
        assert parameter.view(torch.int16)[index].item() & 0xFFFF == expected


def rounded_down_or_up(bits: int, random: int) -> int:
    return (bits + random >> 16) & 0xFFFF


@pytest.mark.parametrize("types", [(FULL, HALF, FULL), (HALF, HALF, FULL)])
@pytest.mark.parametrize(("size", "place"), [(67, (5, 1, 1, 0)), (64, (3, 7, 30, 11))])
def test_moments_in_bf16_are_rounded_with_the_two_halves_of_a_word_of_their_own_stream(shim: Shim, types, size, place):
    parameter, *moments, grad = inputs(size, types)
    wide = [parameter.float(), *(moment.float() for moment in moments)]
    shim.adamw_(*wide, grad, step=7)  # the same update, not rounded
    remainder = torch.zeros(size, dtype=torch.int16) if parameter.dtype == HALF else None
    shim.adamw_(parameter, *moments, grad, step=7, rounding=(KEY, *place), remainder=remainder)
    assert torch.equal(join(parameter, remainder), wide[0])
    first, columns, pitch, offset = place
    for index in range(size):
        row, column = divmod(first + index, columns)
        element = offset + row * pitch + column
        words = philox([element // 4 & 0xFFFFFFFF, element // 4 >> 32, 7, 1], (KEY & 0xFFFFFFFF, KEY >> 32))
        for moment, exact, random in zip(
            moments, wide[1:], (words[element % 4] & 0xFFFF, words[element % 4] >> 16), strict=True
        ):
            expected = rounded_down_or_up(exact.view(torch.int32)[index].item(), random)
            assert moment.view(torch.int16)[index].item() & 0xFFFF == expected


def test_stochastic_rounding_is_unbiased(shim: Shim):
    size, updates = 20000, 4
    parameter, zeros = torch.ones(size, dtype=HALF), torch.zeros(size)
    for step in range(1, 1 + updates):  # decay alone: a 64th of the distance to the next lower number
        shim.adamw_(
            parameter, zeros, zeros.clone(), zeros.clone(), step=step, lr=2**-14, weight_decay=1.0, rounding=PLACE
        )
    lost = (1 - parameter.float()).mean().item() / (updates * 2**-14)
    assert abs(lost - 1) < 0.1


def test_empty_bucket_is_left_alone(shim: Shim):
    shim.adamw_(*inputs(0), step=1)

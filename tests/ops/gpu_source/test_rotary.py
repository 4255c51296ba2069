import pytest
import torch
from torch import Tensor

from tests.ops.gpu_source.shim import Shim

TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2**-8 + 5e-7, torch.float16: 2**-11 + 5e-7}
"""Tolerance relative to the largest value: half a unit in the last place, and a little for the sum in fp32."""
SHAPES = [(2, 3, 4, 2, 64), (1, 5, 9, 1, 128), (2, 2, 3, 3, 6), (1, 3, 1, 1, 2), (1, 2, 37, 5, 16)]
"""Batch, length, heads of q and k, head size: 16-byte accesses or not, more heads than a thread handles at once."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype, batched: bool = False) -> tuple[Tensor, ...]:
    batch, length, q_heads, k_heads, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, length, q_heads, size, generator=generator).to(dtype)
    k = torch.randn(batch, length, k_heads, size, generator=generator).to(dtype)
    # Halves that differ, so that each entry must be read at its own place.
    angles = torch.rand((batch, length, size) if batched else (length, size), generator=generator) * 6
    return q, k, angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """In float64, from the definition; cos, sin [b, s, d]."""
    x, cos, sin = x.double(), cos.double().unsqueeze(2), sin.double().unsqueeze(2)
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return x * cos + turned * sin


def transposed(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x = torch.zeros(grad.shape, dtype=torch.float64, requires_grad=True)
    rotated(x, cos, sin, interleaved).backward(grad.double())
    return x.grad


def assert_close(got: Tensor, exact: Tensor) -> None:
    assert (got.double() - exact).abs().max() <= TOLERANCE[got.dtype] * exact.abs().max()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_its_transpose_equal_float64(shim: Shim, shape, dtype, interleaved, backward):
    q, k, cos, sin = inputs(shape, dtype)
    got = shim.rotary(q, k, cos, sin, interleaved=interleaved, backward=backward)
    formula = transposed if backward else rotated
    for ours, x in zip(got, (q, k), strict=True):
        assert_close(ours, formula(x, cos.expand(shape[0], -1, -1), sin.expand(shape[0], -1, -1), interleaved))


def test_tables_of_each_sequence_and_position_ids_say_which_row_a_token_takes(shim: Shim):
    q, k, cos, sin = inputs((3, 5, 2, 1, 64), torch.float32, batched=True)
    own = shim.rotary(q, k, cos, sin)
    assert_close(own[0], rotated(q, cos, sin, False))
    positions = torch.tensor([[4, 0, 1, 2, 2], [0, 1, 0, 1, 0], [3, 3, 4, 1, 0]])
    by_position = shim.rotary(q, k, cos[0].contiguous(), sin[0].contiguous(), positions)
    assert_close(by_position[0], rotated(q, cos[0][positions], sin[0][positions], False))
    assert_close(by_position[1], rotated(k, cos[0][positions], sin[0][positions], False))


def test_position_outside_of_the_tables_gives_nan_for_that_token_alone(shim: Shim):
    q, k, cos, sin = inputs((1, 4, 2, 1, 64), torch.float32)
    got, _ = shim.rotary(q, k, cos, sin, torch.tensor([[0, 4, -1, 3]]))
    assert got.isnan().flatten(2).all(-1).tolist() == [[False, True, True, False]]
    assert not got[:, ::3].isnan().any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [6, 64])
def test_strides_do_not_matter_and_packed_heads_are_rotated_in_place(shim: Shim, size, interleaved):
    q, k, cos, sin = inputs((2, 3, 4, 2, size), torch.bfloat16)
    expected = shim.rotary(q, k, cos, sin, interleaved=interleaved)
    values = torch.randn(2, 3, 2, size).bfloat16()
    packed = torch.cat((q, k, values), 2)
    shim.rotary(packed[:, :, :4], packed[:, :, 4:6], cos, sin, interleaved=interleaved, in_place=True)
    assert torch.equal(packed, torch.cat((*expected, values), 2))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(shim.rotary(turned, k[:, :, :0], cos, sin, interleaved=interleaved)[0], expected[0])


def test_no_tokens_give_nothing(shim: Shim):
    q, k, cos, sin = inputs((2, 3, 4, 2, 64), torch.float32)
    assert shim.rotary(q[:0], k[:0], cos, sin)[0].shape == (0, 3, 4, 64)

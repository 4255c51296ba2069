import pytest
import torch

from megagap.ops import compiled, rotary, rotary_packed
from megagap.ops.adjacent import as_one
from megagap.ops.rotary import reference


def tables(length: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(length).float(), 0.3 ** torch.arange(size // 2).float())
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin(), angles


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_pairs_are_rotated_as_complex_numbers(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 8, generator=generator).to(dtype) for heads in (4, 2))
    cos, sin, angles = tables(5, 8)
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    for got, given in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        first, second = given.double().chunk(2, dim=-1)
        wanted = torch.complex(first, second) * turn
        assert got.dtype == dtype
        error = got.double() - torch.cat([wanted.real, wanted.imag], dim=-1)
        assert float(error.abs().max()) < tolerance * float(given.abs().max())


def test_tables_per_sequence_work_like_shared_ones():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    cos, sin, _ = tables(9, 8)
    own = [torch.stack([table[:5], table[4:9]]) for table in (cos, sin)]
    got = rotary(q, k, *own)
    for sequence, start in ((0, 0), (1, 4)):
        one = slice(sequence, sequence + 1)
        wanted = rotary(q[one], k[one], cos[start : start + 5], sin[start : start + 5])
        assert all(torch.equal(part[one], whole) for part, whole in zip(got, wanted, strict=True))


def test_convention_is_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    cos, sin, _ = tables(5, 8)
    wanted = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None])
    for got, other in zip(rotary(q, k, cos, sin), wanted, strict=True):
        torch.testing.assert_close(got, other.transpose(1, 2), rtol=0, atol=1e-6)


def test_rotation_is_undone_by_the_opposite_angles():
    q, k = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 1, 4)
    cos, sin, _ = tables(6, 4)
    for back, given in zip(rotary(*rotary(q, k, cos, sin), cos, -sin), (q, k), strict=True):
        torch.testing.assert_close(back, given, rtol=0, atol=1e-6)


needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")


def differentiate(function, q, k, cos, sin):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    rotated = function(q, k, cos, sin)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(rotated, [torch.randn(part.shape, generator=generator).to(part.dtype) for part in rotated])
    return [*(part.detach() for part in rotated), q.grad, k.grad]


@needs_kernels
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (1, 3, 1, 2), (3, 7, 5, 34), (2, 0, 4, 8)])
def test_compiled_values_and_gradients_equal_plain_ones(shape, dtype, tolerance, own_tables):
    batch, length, heads, size = shape
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, n, size, generator=generator).to(dtype) for n in (heads, 1))
    cos, sin, _ = tables(length, size)
    if own_tables:
        cos, sin = (torch.stack([table * (i + 1) for i in range(batch)]) for table in (cos, sin))
    for got, wanted in zip(
        differentiate(rotary, q, k, cos, sin), differentiate(reference, q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_compiled_form_takes_strided_heads_and_repeats_bit_for_bit():
    packed = torch.randn(2, 5, 6, 8)
    q, k = packed[:, :, :4], packed[:, :, 4:]
    cos, sin, _ = tables(5, 8)
    first, again = (differentiate(rotary, q, k, cos, sin) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for got, wanted in zip(first, differentiate(reference, q, k, cos, sin), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_pick_rows_of_the_tables(interleaved):
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    cos, sin, _ = tables(9, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1], [8, 3, 3, 4, 0]])
    got = differentiate(lambda *x: rotary(*x, positions, interleaved=interleaved), q, k, cos, sin)
    wanted = differentiate(
        lambda q, k, c, s: rotary(q, k, c[positions], s[positions], interleaved=interleaved), q, k, cos, sin
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_pairs_are_the_half_split_ones_in_another_order(dtype):
    q, k = torch.randn(2, 5, 4, 8).to(dtype), torch.randn(2, 5, 2, 8).to(dtype)
    cos, sin, _ = tables(5, 8)

    def weave(x):
        return torch.stack(x.chunk(2, -1), -1).flatten(-2)

    got = differentiate(lambda *x: rotary(*x, interleaved=True), *map(weave, (q, k, cos, sin)))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(part.shape, generator=generator).to(dtype) for part in (q, k)]
    q, k = q.requires_grad_(), k.requires_grad_()
    plain = rotary(q, k, cos, sin)
    torch.autograd.backward(plain, [torch.cat([g[..., ::2], g[..., 1::2]], -1) for g in grads])
    assert all(torch.equal(a, weave(b)) for a, b in zip(got, [*plain, q.grad, k.grad], strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_of_a_packed_projection_heads_of_q_and_k_are_rotated_and_gradients_are_packed_again(
    dtype, interleaved, in_place
):
    packed, grad = torch.randn(2, 5, 8, 6).to(dtype), torch.randn(2, 5, 8, 6).to(dtype)
    cos, sin, _ = tables(5, 6)
    if interleaved:
        cos, sin = (table.repeat_interleave(2, -1)[:, :6] for table in (cos, sin))
    heads = [4, 2, 2]
    work = packed.clone()
    given = [part.requires_grad_() for part in work.detach().split(heads, 2)]
    found = rotary_packed(*given, cos, sin, in_place=in_place, interleaved=interleaved)
    where = {part.untyped_storage().data_ptr() for part in found}
    assert (where == {work.untyped_storage().data_ptr()}) == in_place
    assert in_place or torch.equal(work, packed)
    grads = torch.autograd.grad(found, given, grad.split(heads, 2))
    q, k, v = (part.detach().requires_grad_() for part in packed.split(heads, 2))
    wanted = rotary(q, k, cos, sin, interleaved=interleaved)
    torch.autograd.backward(wanted, grad.split(heads, 2)[:2])
    torch.testing.assert_close([part.detach() for part in found], [*(x.detach() for x in wanted), v.detach()])
    torch.testing.assert_close(as_one(grads, 2), torch.cat([q.grad, k.grad, grad[:, :, 6:]], 2))


@needs_kernels
def test_positions_beyond_the_tables_are_refused():
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)
    cos, sin, _ = tables(3, 4)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match="positions from"):
            rotary(q, k, cos, sin, torch.tensor([[0, wrong]]))

"""Rotary position embeddings (Su et al. 2021): half-split as in ``transformers``, or interleaved as in the paper."""

from typing import Any

import torch
from torch import Tensor

from megagap.ops import compiled


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs of each head by the angles whose cosines and sines are given.

    q: [b, s, h, d], k: [b, s, hk, d]. cos, sin: [s, d] or [b, s, d] in fp32; with ``positions`` [b, s] (of documents
    packed into a sequence, or of a context-parallel rank's share) tables [p, d] whose rows they select. They get no
    gradient. Pairs are (x[i], x[i + d / 2]), or (x[2i], x[2i + 1]) if ``interleaved``; the tables hold an element's
    angle at the element's place. Computed in fp32 and rounded once to the dtype of q and k.
    """
    if compiled.supports(q, k) and _supports(q, k, cos, sin, positions):
        rotated: tuple[Tensor, Tensor] = torch.ops.megagap.rotary(q, k, cos, sin, positions, interleaved, False)
        return rotated
    return reference(q, k, cos, sin, positions, interleaved=interleaved)


def rotary_(
    packed: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """:func:`rotary` in place on the first ``heads`` heads of a packed projection [b, s, h, d]; returns it."""
    rotated: Tensor = _InPlace.apply(packed, heads, cos, sin, positions, interleaved)
    return rotated


def reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, heads: int, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
    ) -> Tensor:
        ctx.mark_dirty(packed)
        ctx.save_for_backward(cos, sin, positions)
        ctx.heads, ctx.interleaved = heads, interleaved
        return _turn(packed, heads, cos, sin, positions, interleaved, backward=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may be shared
        return _turn(grad, ctx.heads, cos, sin, positions, ctx.interleaved, backward=True), None, None, None, None, None


def _turn(
    packed: Tensor, heads: int, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, *, backward: bool
) -> Tensor:
    if compiled.supports(packed) and packed.stride(-1) == 1:
        torch.ops.megagap.rotary_(packed, cos, sin, positions, heads, interleaved, backward)
        return packed
    if backward:  # the opposite rotation: equal halves of the tables belong to a pair
        sin = -sin
    first = packed[:, :, :heads]
    first.copy_(reference(first, first[:, :, :0], cos, sin, positions, interleaved=interleaved)[0])
    return packed


def _supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> bool:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        return False
    if cos.device != q.device or not cos.dtype == sin.dtype == torch.float32 or cos.shape != sin.shape:
        return False
    if positions is not None:
        return positions.shape == q.shape[:2] and cos.dim() == 2 and cos.shape[1] == q.shape[-1]
    return cos.shape in (q.shape[1:2] + q.shape[-1:], q.shape[:2] + q.shape[-1:])


# ------------------------------------------------------------------------------- autograd and shapes of the kernels


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    rotated = torch.ops.megagap.rotary(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, not ctx.backward)
    return *rotated, None, None, None, None, None


def _shapes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _no_shapes(
    packed: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    heads: int,
    interleaved: bool,
    backward: bool,
) -> None:
    return None


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::rotary", _shapes)
    torch.library.register_autograd("megagap::rotary", _backward, setup_context=_setup_context)
    torch.library.register_fake("megagap::rotary_", _no_shapes)

"""Rotary position embeddings (Su et al. 2021): half-split as in ``transformers``, or interleaved as in the paper."""

from typing import Any

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.adjacent import as_one

HEADS = 2
"""The dimension of q, k and v [b, s, heads, d]."""


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


def rotary_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    in_place: bool,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rotary` of the q and k of a packed projection, which lie next to each other and before v; and v.

    ``in_place``: the results are q, k and v themselves, of which no other operation may have kept q and k. Otherwise
    they are copies, so that nothing keeps the projection. Their gradients are packed likewise: written to one tensor.
    """
    rotated: tuple[Tensor, Tensor, Tensor] = _Packed.apply(q, k, v, cos, sin, positions, interleaved, in_place)
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


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        if not in_place:
            return *rotary(q, k, cos, sin, positions, interleaved=interleaved), v.clone(
                memory_format=torch.contiguous_format
            )
        both = as_one((q, k), HEADS)
        assert both is not None, "q and k are not packed"
        if compiled.supports(both) and both.stride(-1) == 1 and _supports(q, k, cos, sin, positions):
            torch.ops.megagap.rotary_(both, cos, sin, positions, both.shape[HEADS], interleaved, False)
        else:
            both.copy_(reference(both, both[:, :, :0], cos, sin, positions, interleaved=interleaved)[0])
        return q.detach(), k.detach(), v.detach()

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin, positions), grads = ctx.saved_tensors, (grad_q, grad_k, grad_v)
        if compiled.supports(*grads) and _supports(grad_q, grad_k, cos, sin, positions):
            packed = torch.ops.megagap.rotary_pack(*grads, cos, sin, positions, ctx.interleaved, True)
        else:  # the opposite rotation: equal halves of the tables belong to a pair
            rotated = reference(grad_q, grad_k, cos, -sin, positions, interleaved=ctx.interleaved)
            packed = torch.cat((*rotated, grad_v), HEADS)
        parts = packed.split([grad.shape[HEADS] for grad in grads], HEADS)
        return *parts, None, None, None, None, None


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


def _pack_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    backward: bool,
) -> Tensor:
    heads = q.shape[HEADS] + k.shape[HEADS] + v.shape[HEADS]
    return q.new_empty(*q.shape[:HEADS], heads, q.shape[-1])


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
    torch.library.register_fake("megagap::rotary_pack", _pack_shapes)

"""Rotary position embeddings (Su et al. 2021) in the half-split convention of ``transformers``."""

from typing import Any

import torch
from torch import Tensor

from megagap.ops import compiled


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x[i], x[i + d / 2]) of each head by the angles whose cosines and sines are given.

    q: [b, s, h, d], k: [b, s, hk, d]; cos, sin: [s, d] or [b, s, d] in fp32, both halves alike; they get no gradient.
    Computed in fp32 and rounded once to the dtypes of q and k.
    """
    if compiled.AVAILABLE and _fits(q, k, cos, sin):
        rotated: tuple[Tensor, Tensor] = torch.ops.megagap.rotary(q, k, cos, sin, False)
        return rotated
    return reference(q, k, cos, sin)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    tables = (q.shape[1:2] + q.shape[-1:], q.shape[:2] + q.shape[-1:])
    return (
        all(tensor.device.type == "cpu" for tensor in (q, k, cos, sin))
        and q.dtype == k.dtype
        and q.dtype in (torch.float32, torch.bfloat16)
        and cos.dtype == sin.dtype == torch.float32
        and q.dim() == k.dim() == 4
        and q.shape[:2] == k.shape[:2]
        and q.shape[-1] == k.shape[-1]
        and cos.shape == sin.shape
        and cos.shape in tables
    )


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]
) -> None:
    _, _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    return *torch.ops.megagap.rotary(grad_q, grad_k, cos, sin, not ctx.backward), None, None, None


def _shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::rotary", _shapes)
    torch.library.register_autograd("megagap::rotary", _backward, setup_context=_setup_context)

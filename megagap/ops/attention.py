"""Scaled dot-product attention with grouped keys and values: flash-attn on GPUs that have it, else torch's own.

On CPU, torch's is slow in the backward pass; for sequences that are not long, a few matrix products over blocks of
queries are faster there. They keep the probabilities, whose memory grows with the square of the sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.optional import gpu_library

BLOCKED_FROM = 128
BLOCKED_UP_TO = {torch.bfloat16: 1024, torch.float32: 512}
"""Shortest and longest sequences that are computed in blocks on CPU, by measurement (docs/performance.md)."""

BLOCK = 128
"""Queries in a block: what lies above the diagonal is computed within blocks only."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, causal; q: [b, s, h, d], k, v: [b, t, hk, d] with hk dividing h. Result as q.

    s is t, a whole sequence, or 1, its last token, which sees all others.
    """
    assert q.shape[1] in (1, k.shape[1]), (q.shape, k.shape)
    causal = q.shape[1] == k.shape[1]
    if (flash := gpu_library("flash_attn", q, k, v)) is not None:
        mixed: Tensor = flash.flash_attn_func(q, k, v, causal=causal)
        return mixed
    if causal and _blocks_pay(q, k, v):
        return in_blocks(q, k, v)
    return reference(q, k, v)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=q.shape[1] == k.shape[1],
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The causal :func:`reference` of whole sequences as matrix products over blocks of queries."""
    mixed: Tensor = _Blocked.apply(q, k, v)
    return mixed


def _blocks_pay(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Only where there is a backward pass: forward alone, torch's is as fast and keeps nothing."""
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    on_cpu = compiled.AVAILABLE and q.device.type == "cpu"
    return on_cpu and trained and BLOCKED_FROM <= q.shape[1] <= BLOCKED_UP_TO.get(q.dtype, 0)


class _Blocked(torch.autograd.Function):
    """Layouts: B batch, K key heads, R queries of a block times those of a group, T keys up to the block's end, D."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, heads, size = q.shape[1:]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [b, hk, t, d]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        saved = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            rows_BKRD = _rows(q[:, start:end], k.shape[2]) * size**-0.5
            scores_BKRT = rows_BKRD @ keys[:, :, :end].transpose(2, 3)
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores_BKRT.unflatten(2, (heads // k.shape[2], -1))[..., start:].masked_fill_(future, float("-inf"))
            weights_BKRT = scores_BKRT.softmax(-1)
            out[:, start:end] = _from_rows(weights_BKRT @ values[:, :, :end], heads)
            saved += [rows_BKRD, weights_BKRT]
        ctx.save_for_backward(k, v, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v, *saved = ctx.saved_tensors
        length, heads, size = grad.shape[1:]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        grad_q = torch.empty_like(grad, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for i, start in enumerate(range(0, length, BLOCK)):
            end = min(start + BLOCK, length)
            rows_BKRD, weights_BKRT = saved[2 * i : 2 * i + 2]
            above_BKRD = _rows(grad[:, start:end], k.shape[2])
            grad_v[:, :, :end] += weights_BKRT.transpose(2, 3) @ above_BKRD
            grad_weights = above_BKRD @ values[:, :, :end].transpose(2, 3)
            grad_scores = torch._softmax_backward_data(grad_weights, weights_BKRT, -1, weights_BKRT.dtype)
            grad_k[:, :, :end] += grad_scores.transpose(2, 3) @ rows_BKRD
            grad_q[:, start:end] = _from_rows((grad_scores @ keys[:, :, :end]) * size**-0.5, heads)
        return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _rows(x: Tensor, groups: int) -> Tensor:
    """[b, s, h, d] -> [b, hk, h / hk · s, d]: the heads that share keys, one after the other."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _from_rows(x: Tensor, heads: int) -> Tensor:
    """The way back."""
    return x.unflatten(2, (heads // x.shape[1], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

"""Scaled dot-product attention with grouped keys and values: flash-attn on GPUs that have it, else torch's own."""

import torch.nn.functional as F
from torch import Tensor

from megagap.ops.optional import gpu_library


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, causal; q: [b, s, h, d], k, v: [b, t, hk, d] with hk dividing h. Result as q.

    s is t, a whole sequence, or 1, its last token, which sees all others.
    """
    assert q.shape[1] in (1, k.shape[1]), (q.shape, k.shape)
    causal = q.shape[1] == k.shape[1]
    if (flash := gpu_library("flash_attn", q, k, v)) is not None:
        mixed: Tensor = flash.flash_attn_func(q, k, v, causal=causal)
        return mixed
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)

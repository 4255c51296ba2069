"""Rotary position embeddings (Su et al. 2021) in the half-split convention of ``transformers``."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x[i], x[i + d / 2]) of each head by the angles whose cosines and sines are given.

    q: [b, s, h, d], k: [b, s, hk, d]; cos, sin: [s, d] or [b, s, d] in fp32, both halves alike. Computed in fp32 and
    rounded once to the dtypes of q and k.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)

"""Attention within the documents that a sequence is packed from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.ops.attention import attention
from megagap.ops.optional import gpu_library


@dataclass(frozen=True)
class Documents:
    """The documents of a microbatch of sequences [b, s], laid end to end; none reaches beyond its sequence."""

    positions: Tensor
    """The place of each token in its document, int64 [b, s]."""
    borders: Tensor
    """Where each document starts in the b · s tokens, and their number at the end: int32 [documents + 1]."""
    longest: int
    """Tokens of the longest."""

    @classmethod
    def of(cls, positions: Tensor) -> "Documents":
        """positions: int64 [b, s] on the CPU, 0 where a document starts, as it must at the start of a sequence."""
        starts = (positions.flatten() == 0).nonzero().flatten()
        borders = torch.cat([starts, starts.new_tensor([positions.numel()])])
        return cls(positions.contiguous(), borders.int(), int(borders.diff().max()))

    def to(self, device: torch.device) -> "Documents":
        moved = (self.positions, self.borders)
        positions, borders = (x.pin_memory() if device.type == "cuda" else x for x in moved)
        return Documents(positions.to(device, non_blocking=True), borders.to(device, non_blocking=True), self.longest)


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, causal and within documents; q: [b, s, h, d], k, v: [b, s, hk, d]. Result as q."""
    if (flash := gpu_library("flash_attn", q, k, v)) is not None:
        borders, longest = documents.borders, documents.longest
        flat = (x.flatten(0, 1) for x in (q, k, v))
        mixed: Tensor = flash.flash_attn_varlen_func(*flat, borders, borders, longest, longest, causal=True)
        return mixed.view_as(q)
    if q.device.type == "cpu":
        return torch.cat(list(_one_by_one(q, k, v, documents)), 1).view_as(q)
    return masked_attention(q, k, v, documents.positions)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """The same from the positions alone: for GPUs without flash-attn, where the host should not wait for borders.

    Its mask grows with the square of the sequence.
    """
    number = (positions == 0).cumsum(1)
    length = q.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
    mask = (number[:, None, :, None] == number[:, None, None, :]) & earlier
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Iterator[Tensor]:
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    for start, stop in pairwise(documents.borders.tolist()):
        yield attention(q[:, start:stop], k[:, start:stop], v[:, start:stop])

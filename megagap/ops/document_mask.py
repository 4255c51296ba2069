"""Attention within the documents that a sequence is packed from."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.ops.attention import HALF_PRECISION, attention, call_flash, flash_library, is_hopper, repeat_keys


@dataclass(frozen=True)
class Documents:
    """The documents of a microbatch of sequences [b, s], laid end to end; none crosses the end of its sequence."""

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


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, keep_scores: bool = True) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, causal and within documents; q: [b, s, h, d], k, v: [b, s, hk, d]. Result as q.

    ``keep_scores``: as for :func:`~megagap.ops.attention.attention`.
    """
    if q.device.type == "cpu":
        return torch.cat(list(_one_by_one(q, k, v, documents, keep_scores)), 1).view_as(q)
    kernel, _, _ = _variable_length(q, k, v)
    if kernel is not None:
        return kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), documents).view_as(q)
    return masked_attention(q, k, v, documents.positions)


def choose(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
    """How :func:`document_attention` of these tensors is computed, and why: for people."""
    if q.device.type == "cpu":
        return "each document by itself", "the host knows where they end"
    _, name, why = _variable_length(q, k, v)
    return name, why


def masked_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """The same from the positions alone: for GPUs and dtypes without a variable-length kernel, so that the host does
    not wait for document boundaries. Its mask grows with the square of the sequence length.
    """
    number = (positions == 0).cumsum(1)
    length = q.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
    mask = (number[:, None, :, None] == number[:, None, None, :]) & earlier
    k, v = repeat_keys(q, k, v)  # with grouped keys and a mask, torch stores all scores
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


VariableLengthKernel = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]
"""q [tokens, h, d], k, v [tokens, hk, d] of documents laid end to end -> as q."""


def _variable_length(q: Tensor, k: Tensor, v: Tensor) -> tuple[VariableLengthKernel | None, str, str]:
    """A variable-length kernel for this GPU: flash-attn 3, flash-attn 2, torch's own, or none. Its name, and why."""
    masked = "torch, masked"
    if q.dtype not in HALF_PRECISION or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None, masked, "no variable-length kernel supports these tensors"
    for module, name in (("flash_attn_interface", "flash-attn 3"), ("flash_attn", "flash-attn 2")):
        if module == "flash_attn_interface" and not is_hopper(q.device):
            continue
        if (library := flash_library(module, q, k, v)) is not None:
            return partial(_library_varlen, library.flash_attn_varlen_func), name, "it is installed"
    if (kernel := _torch_varlen()) is not None:
        return kernel, "torch, variable length", "flash-attn is not installed"
    return None, masked, "no variable-length kernel: torch has one from 2.10 on, flash-attn is not installed"


def _library_varlen(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    borders, longest = documents.borders, documents.longest
    return call_flash(function, q, k, v, borders, borders, longest, longest, causal=True)


@cache
def _torch_varlen() -> VariableLengthKernel | None:
    """``torch.nn.attention.varlen``, whose arguments differ between the releases that have it (from 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}

    def kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        grouped: dict[str, Any] = {}
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in takes:
                grouped = {"enable_gqa": True}
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        borders, longest = documents.borders, documents.longest
        mixed = varlen_attn(q, k, v, borders, borders, longest, longest, **causal, **grouped)
        assert isinstance(mixed, Tensor)
        return mixed

    return kernel


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents, keep_scores: bool) -> Iterator[Tensor]:
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    for start, stop in pairwise(documents.borders.tolist()):
        yield attention(q[:, start:stop], k[:, start:stop], v[:, start:stop], keep_scores=keep_scores)

"""Context parallelism: each sequence is divided over the cp axis, and only attention exchanges anything for it.

A sequence is cut into 2 · cp pieces, of which rank r has r and 2 · cp - 1 - r, one after the other: a *zigzag*, so that
causal attention is as much work on every rank. Three ways to attend to the keys of others (``parallel.context_mode``):

ring        keys and values travel around the ring while attention to those that are here is computed; parts of the
            softmax are merged (Liu et al. 2023). The gradients of keys and values travel with them.
alltoall    ranks exchange parts of the sequence for heads, and each computes some heads of whole sequences
            (Jacobs et al. 2023).
allgather   every rank gathers all keys and values (Grattafiori et al. 2024, section 3.3.2).
"""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from megagap.ops.attention import attention
from megagap.ops.attention_block import CAUSAL, NONE, Mask, Merged, attend, attend_backward
from megagap.ops.document_mask import Documents, document_attention
from megagap.parallel.collectives import (
    Pending,
    all_gather_async,
    all_to_all_async,
    pass_on_async,
    reduce_scatter_async,
)
from megagap.parallel.layout import ContextMode
from megagap.parallel.mesh import Axis

SEQUENCE, HEADS = 1, 2
"""Dimensions of queries, keys and values [b, s, h, d]."""


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """The pieces of a sequence, of 2 · size, that a rank has."""
    return rank, 2 * size - 1 - rank


@cache
def places_of(rank: int, size: int, length: int, device: torch.device) -> Tensor:
    """The places in a sequence of ``length`` of a rank's tokens, in their order: int64 [length / size]."""
    assert length % (2 * size) == 0, (length, size)
    pieces = torch.arange(length, device=device).view(2 * size, -1)
    return pieces[list(pieces_of(rank, size))].flatten()


def own_places(cp: Axis, length: int, device: torch.device) -> Tensor:
    """The places in a sequence of ``length`` of this rank's tokens, in their order: int64 [length / cp]."""
    return places_of(cp.rank, cp.size, length, device)


def own_tokens(x: Tensor, cp: Axis) -> Tensor:
    """This rank's part [..., s / cp] of something for each token [..., s]."""
    return x if cp.size == 1 else x[..., own_places(cp, x.shape[-1], x.device)]


@dataclass(frozen=True)
class OwnDocuments:
    """The documents of sequences of which this rank has a part."""

    whole: Documents
    """Of the whole sequences [b, s]."""
    positions: Tensor
    """The place of each of this rank's tokens in its document, int64 [b, s / cp]."""
    numbers: Tensor
    """Of the document of each token of the whole sequences, int64 [b, s]."""

    @classmethod
    def of(cls, whole: Documents, cp: Axis) -> "OwnDocuments":
        positions = own_tokens(whole.positions, cp).contiguous()
        return cls(whole, positions, (whole.positions == 0).cumsum(1))


def own_documents(documents: list[Documents] | None, cp: Axis) -> "list[Documents] | list[OwnDocuments] | None":
    """For each microbatch, what attention on this rank needs to know of its documents."""
    return documents if documents is None or cp.size == 1 else [OwnDocuments.of(whole, cp) for whole in documents]


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cp: Axis,
    mode: ContextMode,
    documents: OwnDocuments | None = None,
    *,
    keep_scores: bool = True,
) -> Tensor:
    """Causal attention, within documents if there are any, of this rank's queries to the keys of all ranks.

    q: [b, s / cp, h, d], k, v: [b, s / cp, hk, d] of this rank's tokens. Result as q. ``keep_scores``: as of
    :func:`megagap.ops.attention`, whose kernels see whole sequences if ``mode`` is alltoall; others keep none.
    """
    if mode == "alltoall":
        return _by_heads(q, k, v, cp, documents, keep_scores)
    function = _Ring if mode == "ring" else _Gathered
    mixed: Tensor = function.apply(q, k, v, cp, None if documents is None else documents.numbers)
    return mixed


# -------------------------------------------------------------------------------- ring


@dataclass(frozen=True)
class _Block:
    """What this rank's queries have to do with the keys of one rank: those from ``first_query`` on see the keys up to
    ``keys``."""

    first_query: int
    keys: int
    mask: Mask


def _ring_block(cp: Axis, owner: int, length: int, numbers: Tensor | None) -> _Block:
    """``length``: tokens of each rank. A rank's own keys; the first piece of an earlier one, for all queries; all keys
    of a later one, for the queries of the second piece."""
    half = length // 2
    first_query, keys = (0, length) if owner == cp.rank else (0, half) if owner < cp.rank else (half, length)
    causal = owner == cp.rank
    if numbers is None:
        return _Block(first_query, keys, CAUSAL if causal else NONE)
    ours, theirs = (numbers[:, places_of(rank, cp.size, length * cp.size, numbers.device)] for rank in (cp.rank, owner))
    return _Block(first_query, keys, Mask(causal, (ours[:, first_query:], theirs[:, :keys])))


class _Ring(torch.autograd.Function):
    """Keeps q, this rank's k and v, the result and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cp: Axis, numbers: Tensor | None) -> Tensor:
        here = torch.stack((k, v))
        merged: Merged | None = None
        for step in range(cp.size):
            coming = pass_on_async(here, cp) if step + 1 < cp.size else None
            block = _ring_block(cp, (cp.rank - step) % cp.size, q.shape[SEQUENCE], numbers)
            keys, values = here[:, :, : block.keys]
            part = attend(q[:, block.first_query :], keys, values, block.mask)
            if merged is None:
                merged = Merged(*part)
            else:
                merged.add(*part, block.first_query)
            if coming is not None:
                here = coming.wait()
        assert merged is not None
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged.log_sum, numbers)
        ctx.cp = cp
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, numbers = ctx.saved_tensors
        cp: Axis = ctx.cp
        here = torch.stack((k, v))
        grad_q = torch.zeros_like(q, dtype=log_sum.dtype)
        carried: Pending | None = None
        for step in range(cp.size):
            coming = pass_on_async(here, cp) if step + 1 < cp.size else None
            block = _ring_block(cp, (cp.rank - step) % cp.size, q.shape[SEQUENCE], numbers)
            keys, values = here[:, :, : block.keys]
            rows = slice(block.first_query, None)
            for_queries, *for_keys = attend_backward(
                grad[:, rows], q[:, rows], keys, values, out[:, rows], log_sum[:, :, rows], block.mask
            )
            grad_q[:, rows] += for_queries
            del for_queries  # before more is made
            # The gradients of these keys, from the ranks that had them before.
            total = torch.zeros_like(here, dtype=log_sum.dtype) if carried is None else carried.wait()
            carried = None  # what was sent is no longer needed
            for gradient, added in zip(total, for_keys, strict=True):
                gradient[:, : block.keys] += added
            del for_keys, added
            carried = pass_on_async(total, cp)
            if coming is not None:
                here = coming.wait()
        assert carried is not None
        # Each a tensor of its own: a deferred weight gradient would keep both for the sake of one.
        grad_k, grad_v = (gradient.to(k.dtype, copy=True) for gradient in carried.wait())
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


# -------------------------------------------------------------------------------- allgather


class _Gathered(torch.autograd.Function):
    """Keeps q, this rank's k and v, the result and the log-sum-exp: keys and values are gathered again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cp: Axis, numbers: Tensor | None) -> Tensor:
        keys, values = _gather_in_order(k, v, cp)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = []
        for piece, rows in _own_pieces(cp, q.shape[SEQUENCE]):
            merged: Merged | None = None
            for block, mask in _gathered_blocks(piece, rows, numbers):
                part = attend(q[:, rows], keys[:, block], values[:, block], mask)
                if merged is None:
                    merged = Merged(*part)
                else:
                    merged.add(*part)
            assert merged is not None
            out[:, rows] = merged.out.to(q.dtype)
            sums.append(merged.log_sum)
        ctx.save_for_backward(q, k, v, out, torch.cat(sums, -1), numbers)
        ctx.cp = cp
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, numbers = ctx.saved_tensors
        cp: Axis = ctx.cp
        keys, values = _gather_in_order(k, v, cp)
        grad_q = torch.zeros_like(q, dtype=log_sum.dtype)
        totals = [torch.zeros_like(x, dtype=log_sum.dtype) for x in (keys, values)]
        for piece, rows in _own_pieces(cp, q.shape[SEQUENCE]):
            for block, mask in _gathered_blocks(piece, rows, numbers):
                for_queries, *for_keys = attend_backward(
                    grad[:, rows], q[:, rows], keys[:, block], values[:, block], out[:, rows], log_sum[:, :, rows], mask
                )
                grad_q[:, rows] += for_queries
                for total, added in zip(totals, for_keys, strict=True):
                    total[:, block] += added
                del for_queries, for_keys, added  # before the next ones are made
        del keys, values
        pending = [reduce_scatter_async(_by_rank(total, cp), cp, SEQUENCE) for total in totals]
        grad_k, grad_v = (sums.wait().to(k.dtype) for sums in pending)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


def _own_pieces(cp: Axis, length: int) -> list[tuple[int, slice]]:
    """The two pieces of this rank, each with its rows of this rank's tokens."""
    half = length // 2
    first, second = pieces_of(cp.rank, cp.size)
    return [(first, slice(0, half)), (second, slice(half, length))]


def _gathered_blocks(piece: int, rows: slice, numbers: Tensor | None) -> list[tuple[slice, Mask]]:
    """The keys that the queries of a piece see, with the mask: those of the piece, and all before."""
    size = rows.stop - rows.start
    own, before = slice(piece * size, (piece + 1) * size), slice(0, piece * size)
    blocks = [(own, True), (before, False)] if piece else [(own, True)]
    return [
        (keys, Mask(causal, None if numbers is None else (numbers[:, own], numbers[:, keys])))
        for keys, causal in blocks
    ]


def _gather_in_order(k: Tensor, v: Tensor, cp: Axis) -> tuple[Tensor, Tensor]:
    """Keys and values of whole sequences, in order: [b, s, hk, d]."""
    pending = [all_gather_async(x, cp, SEQUENCE) for x in (k, v)]
    keys, values = (_in_order(x.wait(), cp) for x in pending)
    return keys, values


def _order(cp: Axis) -> list[int]:
    """The pieces that the ranks have, rank by rank."""
    return [piece for rank in range(cp.size) for piece in pieces_of(rank, cp.size)]


def _in_order(x: Tensor, cp: Axis) -> Tensor:
    """The parts of the ranks, one after the other [b, s, ...], as whole sequences."""
    order = _order(cp)
    return _rearranged(x, sorted(range(len(order)), key=order.__getitem__))


def _by_rank(x: Tensor, cp: Axis) -> Tensor:
    """The inverse of :func:`_in_order`."""
    return _rearranged(x, _order(cp))


def _rearranged(x: Tensor, order: list[int]) -> Tensor:
    """As many equal pieces of x [b, s, ...] in this order; by views, since a list as an index is copied to a GPU."""
    pieces = x.chunk(len(order), SEQUENCE)
    return torch.cat([pieces[piece] for piece in order], SEQUENCE)


# -------------------------------------------------------------------------------- alltoall


def _by_heads(q: Tensor, k: Tensor, v: Tensor, cp: Axis, documents: OwnDocuments | None, keep_scores: bool) -> Tensor:
    """Where key/value heads do not divide among the ranks, each is repeated as often as makes them."""
    repeats = cp.size // gcd(cp.size, k.shape[HEADS])
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, HEADS) for x in (k, v))
    whole_q, whole_k, whole_v = _ToHeads.apply(cp, q, k, v)
    if documents is None:
        mixed = attention(whole_q, whole_k, whole_v, keep_scores=keep_scores)
    else:
        mixed = document_attention(whole_q, whole_k, whole_v, documents.whole, keep_scores=keep_scores)
    result: Tensor = _ToTokens.apply(cp, mixed)
    return result


class _ToHeads(torch.autograd.Function):
    """[b, s / cp, h, d] of this rank's tokens -> [b, s, h / cp, d] of its heads, of whole sequences in order."""

    @staticmethod
    def forward(ctx: Any, cp: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.cp = cp
        pending = [all_to_all_async(_send_heads(x, cp), cp) for x in tensors]
        return tuple(_take_tokens(x.wait(), cp) for x in pending)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pending = [all_to_all_async(_send_tokens(grad, ctx.cp), ctx.cp) for grad in grads]
        return None, *(_take_heads(grad.wait()) for grad in pending)


class _ToTokens(torch.autograd.Function):
    """The inverse of :class:`_ToHeads`."""

    @staticmethod
    def forward(ctx: Any, cp: Axis, x: Tensor) -> Tensor:
        ctx.cp = cp
        return _take_heads(all_to_all_async(_send_tokens(x, cp), cp).wait())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _take_tokens(all_to_all_async(_send_heads(grad, ctx.cp), ctx.cp).wait(), ctx.cp)


def _send_heads(x: Tensor, cp: Axis) -> Tensor:
    """[b, s / cp, h, d] -> [cp, b, s / cp, h / cp, d], by the rank that gets these heads."""
    return x.unflatten(HEADS, (cp.size, -1)).permute(2, 0, 1, 3, 4)


def _take_heads(x: Tensor) -> Tensor:
    """[cp, b, s / cp, h / cp, d] -> [b, s / cp, h, d]."""
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _send_tokens(x: Tensor, cp: Axis) -> Tensor:
    """[b, s, h / cp, d] -> [cp, b, s / cp, h / cp, d], by the rank that gets these tokens."""
    return _by_rank(x, cp).unflatten(SEQUENCE, (cp.size, -1)).transpose(0, 1)


def _take_tokens(x: Tensor, cp: Axis) -> Tensor:
    """[cp, b, s / cp, h / cp, d] -> [b, s, h / cp, d]."""
    return _in_order(x.transpose(0, 1).flatten(1, 2), cp)

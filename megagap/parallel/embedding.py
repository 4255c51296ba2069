"""The token embedding and the output projection: tables with a row per token id, split by rows over tp."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagap.parallel.mesh import Axis
from megagap.parallel.shard import GradientSink, Shard, ShardedParameter, split
from megagap.parallel.tensor import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table split over tp (Shoeybi et al. 2019, section 3); also the tied output projection.

    tokens: [b, s], the same on every tp rank. Result: [b, s or s / tp, h].
    A vocabulary that tp does not divide is padded at its end, for storage only: padded rows are never used.
    """

    def __init__(self, shard: Shard, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.weight = tensor_parallel.parameter(shard)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tensor_parallel.mesh.tp.size == 1:
            return lookup(tokens, self.weight)
        rows, is_own = own_rows(tokens, self.weight.shard)
        return self.tensor_parallel.leave(lookup(rows, self.weight).where(is_own, 0))


def vocab_shard(name: str, vocab_size: int, hidden_size: int, tp: Axis, tied_across_stages: bool = False) -> Shard:
    """The record of an embedding or output projection, its rows split over tp and padded to equal parts."""
    replicas: dict[str, Any] = dict(replica_axis="embedding", partial_gradient=True) if tied_across_stages else {}
    return split(name, (vocab_size, hidden_size), dim=0, rank=tp.rank, size=tp.size, **replicas)


def own_rows(ids: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """The rows of global ids [..] in this rank's part of a table: [..]; and whether it has them, [.., 1]: the row of
    another id is any."""
    rows = ids - shard.offsets[0]
    return rows.remainder(shard.local_shape[0]), ((rows >= 0) & (rows < shard.sizes[0])).unsqueeze(-1)


def vocab_logits(x: Tensor, weight: ShardedParameter) -> Tensor:
    """This rank's columns of the logits, without padding: x [b, s, h] whole -> [b, s, sizes[0]].

    Training does not need them: see ``parallel/cross_entropy.py``.
    """
    return F.linear(x, weight[: weight.shard.sizes[0]])


def lookup(ids: Tensor, weight: ShardedParameter) -> Tensor:
    """Rows ``ids`` [..] of the table: [.., h]. Their gradient goes to the weight's sink, if it has one."""
    if weight.sink is None or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    rows: Tensor = _Lookup.apply(ids, weight, weight.sink)
    return rows


class _Lookup(torch.autograd.Function):
    """A gradient of the table's size, nearly all zeros, never exists."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sink: GradientSink) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink = sink
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.sink.add_rows(ids.flatten(), grad.flatten(0, -2))
        ctx.sink.finished()
        return None, None, None

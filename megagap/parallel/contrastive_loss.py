"""Contrastive weight tying (Godey et al. 2023, section 3): the loss of a headless model, in bounded memory.

A headless model has no output projection: its output h_i at token i is to resemble e_i, the input embedding of the
token's target, more than the embeddings of other targets,

    loss_i = logsumexp([0, h_i · e_j - h_i · e_i for all j]),

where j goes over the N targets of the sequence that count, i among them: the loss of h = 0 is log(N + 1). That the
target is there once more, as the 0, is the authors' code's doing, and Gapetron's. They compare with the targets of a
rank's microbatch; here these are the sequence's, so that a loss depends on neither the layout nor the size of a
microbatch. With one sequence per microbatch both are the same.

It is a cross-entropy over N + 1 columns, of which the last one, the score of the token's own target, is the right one.
Embeddings of targets are summed over tp, whose ranks have different rows; then each tp rank has some tokens of a
sequence, under sequence parallelism those that it has anyway, and scores them against all targets. Of other
context-parallel ranks' targets only the ids are gathered. The scores of a chunk of tokens exist at a time, and both
gradients are computed in the forward pass, as in ``cross_entropy.py``.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.ops import cross_entropy_, losses_of, softmax_statistics
from megagap.ops.products import add_product, add_rows, adds_inside, set_product
from megagap.ops.wide import wide, wide_dtype
from megagap.parallel.collectives import all_gather_async, all_reduce
from megagap.parallel.cross_entropy import chunk_tokens, saved_gradients
from megagap.parallel.embedding import own_rows
from megagap.parallel.mesh import Axis
from megagap.parallel.shard import GradientSink, Shard, ShardedParameter
from megagap.parallel.tensor import SEQUENCE, Region

COLUMN_MULTIPLE = 8
"""Rows of scores are padded to a multiple of this many columns, so that kernels read them in whole vectors."""


def contrastive_loss(
    x: Tensor,
    weight: ShardedParameter,
    targets: Tensor,
    scale: Tensor,
    tp: Axis,
    cp: Axis,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """``scale`` · the sum of the tokens' losses; and each token's loss, unscaled, without gradient.

    x: residual stream [b, s or s / tp, h], with s the tokens of a sequence that this cp rank has. weight: this rank's
    rows of the token embedding [vocab, h], padding after them. targets: [b, s] global ids, or ``IGNORED_TARGET``, whose
    losses are 0 and which no token is compared with. scale: fp32 scalar. Returns an fp32 scalar and fp32 [b, s]
    (float64 for x in float64), the same on every tp rank.

    If the weight has a sink, its gradient is there after the forward pass: the loss must then be the root of the
    backward pass, with a gradient of 1.
    """
    need_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # In the order of the ranks, not of the sequence: what a token is compared with has none.
    compared = targets if cp.size == 1 else all_gather_async(targets.int(), cp, SEQUENCE).wait().long()
    column = cp.rank * targets.shape[SEQUENCE]
    region = Region(tp, sequence_parallel)
    loss, losses = _ContrastiveLoss.apply(
        x, weight, targets, compared, column, scale, weight.shard, weight.sink, region, need_gradients
    )
    return loss, losses


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        compared: Tensor,
        column: int,
        scale: Tensor,
        shard: Shard,
        sink: GradientSink | None,
        region: Region,
        need_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        """compared: [b, n], in which this rank's targets begin at ``column``."""
        tp, length, width = region.tp, targets.shape[SEQUENCE], compared.shape[SEQUENCE]
        begin, end = (length * rank // tp.size for rank in (tp.rank, tp.rank + 1))
        mine = slice(None) if region.sequence_parallel else slice(begin, end)
        rows, is_own = own_rows(compared.clamp(min=0), shard)
        embeddings = F.embedding(rows, weight)
        if tp.size > 1:
            all_reduce(embeddings.masked_fill_(~is_own, 0), tp)
        losses = x.new_zeros(targets.shape, dtype=wide_dtype(x.dtype))
        grad_x = torch.zeros_like(x) if need_gradients else None
        grad_embeddings = torch.zeros_like(embeddings, dtype=losses.dtype) if need_gradients else None

        step = chunk_tokens(width, losses.itemsize, x.device.type)
        for i, start in product(range(len(x)), range(begin, end, step)):
            chunk = slice(start, min(start + step, end))
            part = slice(chunk.start - begin, chunk.stop - begin)
            h, target = x[i, mine][part], torch.where(targets[i, chunk] >= 0, width, -1)
            scores = _scores(h, embeddings[i], compared[i] < 0, column + start)
            if grad_x is None or grad_embeddings is None:
                statistics = softmax_statistics(scores, target)
            else:
                statistics = cross_entropy_(scores, target, scale)
                gradient = _of_all_targets(scores, width, column + start).to(h.dtype)
                torch.mm(gradient, embeddings[i], out=grad_x[i, mine][part])
                add_product(grad_embeddings[i], gradient, h)
                del gradient
            losses[i, chunk], _ = losses_of(statistics, target)
            del scores  # else they would be live until the next chunk's are there

        losses, own_sum = all_reduce(losses, tp), None
        if grad_x is not None and grad_embeddings is not None:
            if not region.sequence_parallel:
                all_reduce(grad_x, tp)
            all_reduce(grad_embeddings, tp)
            if tp.size > 1:
                grad_embeddings.masked_fill_(~is_own, 0)
            if sink is None:
                own_sum = torch.zeros_like(weight, dtype=losses.dtype)
                add_rows(own_sum, rows.flatten(), grad_embeddings.flatten(0, 1))
            else:
                sink.add_rows(rows.flatten(), grad_embeddings.flatten(0, 1))
        ctx.save_for_backward(grad_x, own_sum)
        ctx.sink = sink
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *saved_gradients(ctx, grad), *[None] * 8


def _scores(h: Tensor, embeddings: Tensor, ignored: Tensor, column: int) -> Tensor:
    """Of some tokens of a sequence, in fp32 [tokens, n + 1, and padding]: with each of n targets, then with their own.

    h: [tokens, h]. embeddings: [n, h], of the tokens' own targets from row ``column`` on. ignored: [n], targets whose
    scores are -inf, as are those of the padding.
    """
    width = len(embeddings)
    scores = h.new_empty(len(h), -(-(width + 1) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE, dtype=wide_dtype(h.dtype))
    if not adds_inside(h, scores.dtype):
        h, embeddings = wide(h), wide(embeddings)  # a product in half precision would be rounded
    set_product(scores[:, :width], h.T, embeddings.T)
    scores[:, width] = scores[:, :width].diagonal(column)
    scores[:, width + 1 :] = -torch.inf
    scores[:, :width].masked_fill_(ignored, -torch.inf)
    return scores


def _of_all_targets(gradient: Tensor, width: int, column: int) -> Tensor:
    """The gradient of all scores, each own target's once: what :func:`_scores` has repeated is added, in place."""
    of_all = gradient[:, :width]
    of_all.diagonal(column).add_(gradient[:, width])
    return of_all

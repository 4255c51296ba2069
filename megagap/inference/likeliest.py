"""Whether tokens are the likeliest ones, with the vocabulary split over tp."""

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.model.llama import LlamaStage
from megagap.parallel.collectives import all_reduce
from megagap.parallel.cross_entropy import IGNORED_TARGET, chunk_tokens
from megagap.parallel.embedding import vocab_logits


def count_misses(stage: LlamaStage, y: Tensor, targets: Tensor) -> Tensor:
    """How many of each row's targets [b, s] are not the likeliest token: int64 [b], the same on every tp rank.

    y: the last virtual stage's output, [b, s or s / tp, h]. Of tokens that are equally likely the first counts as the
    likeliest, as for ``argmax``. Takes the memory of the loss.
    """
    scored = targets != IGNORED_TARGET
    rows = stage.tensor_parallel.region.gather(y).wait()[scored]
    missed = torch.zeros_like(scored)
    if len(rows):
        # Counts padded rows of the projection, which are equal on every tp rank, so the number of chunks is, too.
        step = chunk_tokens(stage.output.shape[0], y.element_size(), y.device.type)
        missed[scored] = torch.cat([_likeliest(stage, part) for part in rows.split(step)]) != targets[scored]
    return missed.sum(1)


def _likeliest(stage: LlamaStage, rows: Tensor) -> Tensor:
    """The likeliest token after each of ``rows`` [n, h]: int64 [n]."""
    tp, shard = stage.tensor_parallel.mesh.tp, stage.output.shard
    logits = vocab_logits(rows, stage.output)
    if tp.size == 1:
        return logits.argmax(-1)
    if not shard.sizes[0]:  # this rank's part of the vocabulary is padding
        logits = logits.new_full((len(rows), 1), -torch.inf)
    own = logits.argmax(-1, keepdim=True)
    at_own = logits.gather(-1, own).squeeze(-1).float()
    highest = all_reduce(at_own.clone(), tp, dist.ReduceOp.MAX)
    ids = (own.squeeze(-1) + shard.offsets[0]).where(at_own == highest, shard.shape[0])
    return all_reduce(ids, tp, dist.ReduceOp.MIN)

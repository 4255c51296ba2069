"""Grouped-query causal self-attention with rotary positions, over this rank's heads."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagap.config import Model
from megagap.ops import attention, rotary, rotary_packed
from megagap.ops.adjacent import as_one
from megagap.ops.attention import keeps_inputs
from megagap.ops.document_mask import Documents, document_attention
from megagap.parallel.context import OwnDocuments, context_attention
from megagap.parallel.projection_norm import ProjectionNorm, normalised
from megagap.parallel.shard import pack
from megagap.parallel.tensor import Again, ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


@dataclass
class KeyValueCache:
    """One layer's keys and values of earlier tokens, for generation: [b, positions, heads, d], filled in order."""

    keys: Tensor
    values: Tensor
    length: int = 0
    """Positions filled."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of the next tokens, [b, new, heads, d]. Returns all, [b, length, heads, d]."""
        start, self.length = self.length, self.length + k.shape[1]
        self.keys[:, start : self.length] = k
        self.values[:, start : self.length] = v
        return self.keys[:, : self.length], self.values[:, : self.length]


class Attention(nn.Module):
    """One attention block: a region (see ``parallel/tensor.py``).

    Heads are split over tp. Where tp exceeds the key/value heads, consecutive ranks share one: mesh axis ``kv``.
    """

    def __init__(self, name: str, model: Model, tensor_parallel: TensorParallel, *, keep_scores: bool = True) -> None:
        """``keep_scores``: for the backward pass, in kernels that can; else they are computed again."""
        super().__init__()
        self.keep_scores = keep_scores
        self.head_dim = model.head_dim
        self.cp, self.context_mode = tensor_parallel.mesh.cp, tensor_parallel.context_mode
        query_width = model.num_attention_heads * model.head_dim
        key_width = model.num_key_value_heads * model.head_dim
        key_parts = min(tensor_parallel.mesh.tp.size, model.num_key_value_heads)
        bias = model.attention_bias

        def column(projection: str, width: int, **sharing: object) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                f"{name}.{projection}",
                model.hidden_size,
                width,
                tensor_parallel,
                bias=bias,
                **sharing,  # type: ignore[arg-type]
            )

        sharing = dict(parts=key_parts, replica_axis="kv" if tensor_parallel.mesh.kv.size > 1 else None)
        self.q_proj = column("q_proj", query_width)
        self.k_proj = column("k_proj", key_width, **sharing)
        self.v_proj = column("v_proj", key_width, **sharing)
        self.has_norms = model.qk_norm
        if self.has_norms:
            scale = model.rms_norm_eps, model.norm_gain_scale
            self.q_norm = ProjectionNorm(f"{name}.q_norm", self.q_proj, tensor_parallel, *scale)
            self.k_norm = ProjectionNorm(f"{name}.k_norm", self.k_proj, tensor_parallel, *scale)
        self.o_proj = RowParallelLinear(f"{name}.o_proj", query_width, model.hidden_size, tensor_parallel, bias=bias)
        if tensor_parallel.mesh.kv.size == 1:  # else the gradients of k and v are summed over ranks, that of q is not
            pack(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        documents: Documents | OwnDocuments | None = None,
        again: Again | None = None,
    ) -> Tensor:
        """x: residual stream [b, s or s / tp, h]; cos, sin: [s, d], of x's tokens or, with documents, of all positions.
        Result as x, to be added to the stream. Under context parallelism s counts this rank's tokens.

        A ``cache`` that is not empty holds the earlier tokens, and x must then be a single token. ``again``: makes x in
        the backward pass, which then does not keep it.
        """
        q, k, v = self.project(x, cos, sin, None if documents is None else documents.positions, again)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o_proj(self.mix(q, k, v, documents).flatten(2))

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, again: Again | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, rotated, of this rank's heads [b, s, heads, d], and keys, rotated, and values of its key heads."""
        projected = column_parallel(x, self.q_proj, self.k_proj, self.v_proj, again=again)
        if self.has_norms:
            projected = *normalised(projected[:2], (self.q_norm, self.k_norm)), projected[2]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if torch.compiler.is_compiling() or as_one((q, k, v), 2) is None:
            return *rotary(q, k, cos, sin, positions), v
        # Views of the product where attention keeps all three; elsewhere it would live beside what is kept.
        in_place = keeps_inputs(q, k, v, keep_scores=self.keep_scores)
        return rotary_packed(q, k, v, cos, sin, positions, in_place=in_place)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | OwnDocuments | None = None) -> Tensor:
        """The attention itself: [b, s, heads, d] of this rank's heads."""
        if self.cp.size > 1:
            assert not isinstance(documents, Documents), "not cut for this rank"
            return context_attention(q, k, v, self.cp, self.context_mode, documents, keep_scores=self.keep_scores)
        assert not isinstance(documents, OwnDocuments)
        if documents is None:
            return attention(q, k, v, keep_scores=self.keep_scores)
        return document_attention(q, k, v, documents, keep_scores=self.keep_scores)

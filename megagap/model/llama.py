"""Llama 3 (Grattafiori et al. 2024), written once as the mathematics of one pipeline stage over local shards.

Parameter names are those of Hugging Face's ``LlamaForCausalLM``.
"""

import torch
from torch import Tensor, nn

from megagap.config import Model
from megagap.model.attention import Attention, KeyValueCache
from megagap.model.feed_forward import FeedForward
from megagap.model.norm import RMSNorm
from megagap.model.rotary import rotary_tables
from megagap.ops.document_mask import Documents
from megagap.parallel.cross_entropy import linear_cross_entropy
from megagap.parallel.embedding import VocabParallelEmbedding, vocab_logits, vocab_shard
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter
from megagap.parallel.tensor import TensorParallel


class Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Its last addition is left to the norm that follows, which reads the sum anyway.
    """

    def __init__(self, index: int, model: Model, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", model, tensor_parallel)
        self.self_attn = Attention(f"{name}.self_attn", model, tensor_parallel)
        self.post_attention_layernorm = RMSNorm(f"{name}.post_attention_layernorm", model, tensor_parallel)
        self.mlp = FeedForward(f"{name}.mlp", model, tensor_parallel)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: residual stream [b, s or s / tp, h]; update: what the previous layer adds to it. Returns both, updated."""
        normalised, x = self.input_layernorm(x, update)
        mixed = self.self_attn(normalised, cos, sin, cache, documents)
        normalised, x = self.post_attention_layernorm(x, mixed)
        return x, self.mlp(normalised)


class LlamaStage(nn.Module):
    """The layers of one pipeline stage; the first has the token embedding, the last the norm and output projection.

    Input: tokens [b, s] on the first stage, else the residual stream [b, s or s / tp, h] from the previous stage.
    Output: the residual stream, on the last stage normalised, for :meth:`loss` or :meth:`logits`.
    """

    def __init__(self, model: Model, layers: range, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        mesh = tensor_parallel.mesh
        self.model, self.tensor_parallel, self.queue = model, tensor_parallel, tensor_parallel.queue
        self.is_first, self.is_last = mesh.is_first_stage, mesh.is_last_stage
        vocabulary = (model.vocab_size, model.hidden_size, mesh.tp)
        tied = model.tie_word_embeddings

        if self.is_first or (self.is_last and tied):
            shard = vocab_shard("model.embed_tokens.weight", *vocabulary, tied_across_stages=tied and mesh.pp.size > 1)
            self.embed_tokens = VocabParallelEmbedding(shard, tensor_parallel)
        self.layers = nn.ModuleList(Layer(index, model, tensor_parallel) for index in layers)
        if self.is_last:
            self.norm = RMSNorm("model.norm", model, tensor_parallel)
            self.output = (
                self.embed_tokens.weight
                if tied
                else tensor_parallel.parameter(vocab_shard("lm_head.weight", *vocabulary))
            )
            self.output.uses = 2 if tied and self.is_first else 1
        self._tables: tuple[Tensor, Tensor] | None = None

    def use_rope_theta(self, theta: float) -> None:
        """Compute with this base of the rotary wavelengths from now on."""
        if theta != self.model.rope_theta:
            self.model, self._tables = self.model.model_copy(update={"rope_theta": theta}), None

    def forward(
        self,
        x: Tensor,
        length: int,
        caches: list[KeyValueCache] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """``length``: tokens of a full sequence, which under sequence parallelism is not the length of x.

        ``caches``, one per layer, are for generation by a single process: they hold the tokens before x, which
        ``length`` counts too, and x is appended to them; the output is the last token's only, [b, 1, h]. With
        ``documents``, packed into the sequences, attention stays within each and positions count from its start.
        """
        cos, sin = self.rotary_tables(length)
        if caches:
            cos, sin = cos[caches[0].length :], sin[caches[0].length :]
        if self.is_first:
            x = self.embed_tokens(x)
        update = None
        for i, layer in enumerate(self.layers):
            x, update = layer(x, update, cos, sin, caches[i] if caches else None, documents)
        if caches:
            x, update = x[:, -1:], update if update is None else update[:, -1:]
        if self.is_last:
            return self.norm(x, update)[0]
        return x if update is None else x + update

    def loss(self, y: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``scale`` · the sum of the cross-entropies at the targets [b, s], and each of them: fp32 scalar and [b, s].

        y: the last stage's output. Ignored targets have a loss of 0; only the sum has a gradient.
        """
        region = self.tensor_parallel.region
        return linear_cross_entropy(y, self.output, targets, scale, region.tp, region.sequence_parallel)

    def logits(self, y: Tensor) -> Tensor:
        """This tp rank's columns of the logits [b, s, v], without padding, of the last stage's output."""
        return vocab_logits(self.tensor_parallel.enter(y), self.output)

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] < length:
            self._tables = rotary_tables(self.model, length, self.tensor_parallel.mesh.device)
        cos, sin = self._tables
        return cos[:length], sin[:length]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return next(self.parameters()).dtype

    def blocks(self) -> list[tuple[nn.Module, list[ShardedParameter]]]:
        """The modules in the order in which a forward pass calls them, each with the parameters used from there on."""
        blocks: list[tuple[nn.Module, list[ShardedParameter]]] = []
        if self.is_first:
            blocks.append((self.embed_tokens, [self.embed_tokens.weight]))
        blocks += [(layer, list(layer.parameters())) for layer in self.layers]  # type: ignore[arg-type]
        if self.is_last:
            blocks.append((self.norm, [self.norm.weight, self.output]))
        return blocks

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter once, in the order in which the forward pass uses them."""
        in_order = {id(parameter): parameter for _, parameters in self.blocks() for parameter in parameters}
        assert in_order.keys() == {id(parameter) for parameter in self.parameters()}
        return list(in_order.values())


def build_stage(
    model: Model, layers_per_stage: list[int], mesh: Mesh, *, sequence_parallel: bool, dtype: torch.dtype
) -> LlamaStage:
    """This rank's stage, with unset parameters: ``model.init`` or a checkpoint fills them."""
    first = sum(layers_per_stage[: mesh.pp.rank])
    layers = range(first, first + layers_per_stage[mesh.pp.rank])
    return LlamaStage(model, layers, TensorParallel(mesh, sequence_parallel and mesh.tp.size > 1, dtype))

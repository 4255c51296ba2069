"""Llama 3 (Grattafiori et al. 2024), written once as the mathematics of one virtual stage over local shards.

Parameter names are those of Hugging Face's ``LlamaForCausalLM``.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from megagap.config import Model, Settings
from megagap.model.attention import Attention, KeyValueCache
from megagap.model.feed_forward import FeedForward
from megagap.model.norm import RMSNorm
from megagap.model.recompute import Recompute, run_again_in_backward
from megagap.model.rotary import rotary_tables
from megagap.ops.document_mask import Documents
from megagap.parallel.context import OwnDocuments, own_places
from megagap.parallel.contrastive_loss import contrastive_loss
from megagap.parallel.cross_entropy import linear_cross_entropy
from megagap.parallel.embedding import VocabParallelEmbedding, vocab_logits, vocab_shard
from megagap.parallel.layout import ContextMode
from megagap.parallel.mesh import Mesh
from megagap.parallel.placement import Placement, VirtualStage
from megagap.parallel.shard import Block, ShardedParameter
from megagap.parallel.tensor import Again, RowParallelLinear, TensorParallel

Watch = Callable[[int, Tensor], None]
"""Called with the number of a layer and the residual stream behind it, [b, s or s / tp, h]."""


class Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Its last addition is left to the norm that follows, which reads the sum anyway.
    """

    needs_last_product = False
    """Whether its backward pass reads what the last matrix product made."""

    def __init__(
        self, index: int, model: Model, tensor_parallel: TensorParallel, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.is_selective = recompute == "selective"
        """Whether it computes cheap inputs of its matrix products again in the backward pass."""
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", model, tensor_parallel)
        self.self_attn = Attention(f"{name}.self_attn", model, tensor_parallel, keep_scores=not self.is_selective)
        self.post_attention_layernorm = RMSNorm(f"{name}.post_attention_layernorm", model, tensor_parallel)
        self.mlp = FeedForward(f"{name}.mlp", model, tensor_parallel, keep_product=not self.is_selective)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        documents: Documents | OwnDocuments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: residual stream [b, s or s / tp, h]; update: what the previous layer adds to it. Returns both, updated."""
        entering, x, again = self.before_attention(x, update)
        return self.after_attention(x, self.self_attn(entering, cos, sin, cache, documents, again))

    def before_attention(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Again | None]:
        """What attention is computed of, the residual stream, and how to make the former again."""
        normalised, x = self.input_layernorm(x, update)
        return normalised, x, self.input_layernorm.again(x) if self.is_selective else None

    def after_attention(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """x: residual stream; mixed: attention's output. Returns the stream and what is to be added to it."""
        normalised, x = self.post_attention_layernorm(x, mixed)
        return x, self.mlp(normalised, self.post_attention_layernorm.again(x) if self.is_selective else None)


class PostNormLayer(Layer):
    """Transformer layer of OLMo 2 (OLMo et al. 2024, section 2.1): x + norm(attention(x)), then
    x + norm(feed_forward(x)). Parameter names are those of ``transformers``' ``Olmo2ForCausalLM``."""

    needs_last_product = True

    def __init__(
        self, index: int, model: Model, tensor_parallel: TensorParallel, recompute: Recompute = "none"
    ) -> None:
        super().__init__(index, model, tensor_parallel, recompute)
        del self.input_layernorm
        name = f"model.layers.{index}.post_feedforward_layernorm"
        self.post_feedforward_layernorm = RMSNorm(name, model, tensor_parallel)

    def before_attention(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Again | None]:
        x = x if update is None else x + update
        return x, x, None

    def after_attention(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.post_attention_layernorm(mixed)[0]
        return x, self.post_feedforward_layernorm(self.mlp(x))[0]


LAYERS: dict[str, type[Layer]] = {"pre": Layer, "post": PostNormLayer}
"""By ``model.norm_position``."""


class LlamaStage(nn.Module):
    """One virtual stage: its layers; the first has the token embedding, the last the norm and output projection.

    Input: tokens [b, s] of the first, else the residual stream [b, s or s / tp, h] from the previous one.
    Output: the residual stream, of the last normalised, for :meth:`loss` or :meth:`logits`.
    """

    def __init__(
        self,
        model: Model,
        stage: VirtualStage,
        tensor_parallel: TensorParallel,
        tied: VocabParallelEmbedding | None = None,
        recompute: Recompute = "none",
    ) -> None:
        """``tied``: where embedding and output projection are one, what this rank's first and last stage share."""
        super().__init__()
        self.model, self.tensor_parallel, self.queue = model, tensor_parallel, tensor_parallel.queue
        self.has_embedding, self.has_head, self.recompute = stage.has_embedding, stage.has_head, recompute
        vocabulary = (model.vocab_size, model.hidden_size, tensor_parallel.mesh.tp)

        if tied is not None:
            self.embed_tokens = tied
        elif self.has_embedding:
            shard = vocab_shard("model.embed_tokens.weight", *vocabulary)
            self.embed_tokens = VocabParallelEmbedding(shard, tensor_parallel)
        self.layer_numbers = stage.layers
        kind = LAYERS[model.norm_position]
        self.layers = nn.ModuleList(kind(index, model, tensor_parallel, recompute) for index in stage.layers)
        if self.has_head:
            self.norm = RMSNorm("model.norm", model, tensor_parallel)
            self.output = (
                tensor_parallel.parameter(vocab_shard("lm_head.weight", *vocabulary)) if tied is None else tied.weight
            )
        self._tables: tuple[Tensor, Tensor] | None = None
        self._own: tuple[int, Tensor, Tensor] | None = None

    def use_rope_theta(self, theta: float) -> None:
        """Compute with this base of the rotary wavelengths from now on."""
        if theta != self.model.rope_theta:
            self.model, self._tables = self.model.model_copy(update={"rope_theta": theta}), None
            self._own = None

    def forward(
        self,
        x: Tensor,
        length: int,
        caches: list[KeyValueCache] | None = None,
        documents: Documents | OwnDocuments | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """``length``: tokens of a full sequence, which under sequence or context parallelism is not the length of x.

        ``caches``, one per layer, are for generation by a single process: they hold the tokens before x, which
        ``length`` counts too, and x is appended to them; the output is the last token's only, [b, 1, h]. With
        ``documents``, packed into the sequences, attention stays within each and positions count from its start.
        ``watch`` is called behind each layer.
        """
        cos, sin = self.rotary_tables(length)
        if documents is None and self.tensor_parallel.mesh.cp.size > 1:
            cos, sin = self._own_tables(length)
        if caches:
            cos, sin = cos[caches[0].length :], sin[caches[0].length :]
        if self.has_embedding:
            x = self.embed_tokens(x)
        update = None
        for i, layer in enumerate(self.layers):
            x, update = self.call_layer(layer, x, update, cos, sin, caches[i] if caches else None, documents)
            if watch is not None:
                with torch.no_grad():
                    watch(self.layer_numbers[i], x + update)
        if caches:
            x, update = x[:, -1:], update if update is None else update[:, -1:]
        if self.has_head:
            return self.norm(x, update)[0]
        return x if update is None else x + update

    def call_layer(self, layer: nn.Module, x: Tensor, update: Tensor | None, *others: object) -> tuple[Tensor, Tensor]:
        """What :meth:`Layer.forward` returns for these arguments; every layer is called here."""
        if self.recompute != "full" or not torch.is_grad_enabled():
            returned: tuple[Tensor, Tensor] = layer(x, update, *others)
        else:
            # The last product of a layer is for the next one, and that has kept it; or for its own norm.
            last_product: RowParallelLinear = layer.mlp.down_proj  # type: ignore[union-attr, assignment]
            while_again = nullcontext if layer.needs_last_product else last_product.only_keeping
            returned = run_again_in_backward(layer, x, update, *others, while_again=while_again)
        return returned

    def loss(self, y: Tensor, targets: Tensor, scale: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """``scale`` · the sum of the losses at the targets [b, s], cross-entropy and z-loss, an fp32 scalar; and each
        token's cross-entropy and z-loss, fp32 [b, s].

        y: the last virtual stage's output. z_loss: the coefficient of logsumexp². Ignored targets have losses of 0;
        only the sum has a gradient. A headless model has its contrastive loss in place of the cross-entropy.
        """
        region = self.tensor_parallel.region
        if self.model.headless:
            assert not z_loss, "nothing is normalised over a vocabulary"
            cp = self.tensor_parallel.mesh.cp
            loss, losses = contrastive_loss(y, self.output, targets, scale, region.tp, cp, region.sequence_parallel)
            return loss, losses, torch.zeros_like(losses)
        return linear_cross_entropy(y, self.output, targets, scale, region.tp, region.sequence_parallel, z_loss)

    def logits(self, y: Tensor) -> Tensor:
        """This tp rank's columns of the logits [b, s, v], without padding, of the last virtual stage's output."""
        return vocab_logits(self.tensor_parallel.enter(y), self.output)

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] < length:
            self._tables = rotary_tables(self.model, length, self.tensor_parallel.mesh.device)
        cos, sin = self._tables
        return cos[:length], sin[:length]

    def _own_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """The rows of :meth:`rotary_tables` for this cp rank's tokens of a sequence."""
        if self._own is None or self._own[0] != length:
            cos, sin = self.rotary_tables(length)
            places = own_places(self.tensor_parallel.mesh.cp, length, cos.device)
            self._own = length, cos[places], sin[places]
        return self._own[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return next(self.parameters()).dtype

    def blocks(self) -> list[Block]:
        """In the order in which a forward pass calls them."""
        blocks: list[Block] = []
        if self.has_embedding:
            blocks.append(Block(self.embed_tokens, [self.embed_tokens.weight], []))
        for layer in self.layers:
            parameters: list[ShardedParameter] = list(layer.parameters())  # type: ignore[arg-type]
            blocks.append(Block(layer, parameters, parameters))
        if self.has_head:
            # The loss computes all that depends on the output projection in its forward pass.
            blocks.append(Block(self.norm, [self.norm.weight, self.output], [self.norm.weight]))
        return blocks

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter once, in the order in which the forward pass uses them."""
        return sharded_parameters([self])


def sharded_parameters(stages: Iterable[LlamaStage]) -> list[ShardedParameter]:
    """Every parameter of a rank's stages once, in the order in which the forward pass uses them."""
    in_order = {id(p): p for stage in stages for block in stage.blocks() for p in block.parameters}
    assert in_order.keys() == {id(parameter) for stage in stages for parameter in stage.parameters()}
    return list(in_order.values())


def build_stages(
    model: Model,
    placement: Placement,
    mesh: Mesh,
    *,
    sequence_parallel: bool,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    context_mode: ContextMode = "ring",
) -> list[LlamaStage]:
    """This rank's virtual stages by chunk, with unset parameters: ``model.init`` or a checkpoint fills them."""
    assert placement.ranks == mesh.pp.size, (placement, mesh.pp)
    tensor_parallel = TensorParallel(mesh, sequence_parallel and mesh.tp.size > 1, dtype, context_mode)
    stages = placement.stages_of(mesh.pp.rank)
    uses = sum(stage.has_embedding + stage.has_head for stage in stages)
    tied = _tied_embedding(model, placement, tensor_parallel, uses) if model.tie_word_embeddings and uses else None
    return [
        LlamaStage(model, stage, tensor_parallel, tied if stage.has_embedding or stage.has_head else None, recompute)
        for stage in stages
    ]


def stages_of_recipe(settings: Settings, mesh: Mesh, dtype: torch.dtype = torch.float32) -> list[LlamaStage]:
    """:func:`build_stages` as ``settings`` ask for them."""
    return build_stages(
        settings.model,
        settings.placement,
        mesh,
        sequence_parallel=bool(settings.parallel.sequence_parallel),
        dtype=dtype,
        recompute=settings.train.recompute,
        context_mode=settings.parallel.context_mode,
    )


def build_whole(model: Model, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> LlamaStage:
    """The whole model as one stage in one process, with unset parameters."""
    placement, mesh = Placement.loop([model.num_hidden_layers]), Mesh.single(device)
    (stage,) = build_stages(model, placement, mesh, sequence_parallel=False, dtype=dtype)
    return stage


def _tied_embedding(
    model: Model, placement: Placement, tensor_parallel: TensorParallel, uses: int
) -> VocabParallelEmbedding:
    """The embedding that is also the output projection, of a rank that uses it as one of them or as both."""
    mesh, ranks = tensor_parallel.mesh, placement.embedding_ranks
    if len(ranks) > 1:
        assert set(mesh.embedding.ranks) == {mesh.pp.ranks[rank] for rank in ranks}, (mesh.embedding, placement)
    shard = vocab_shard(
        "model.embed_tokens.weight", model.vocab_size, model.hidden_size, mesh.tp, tied_across_stages=len(ranks) > 1
    )
    embedding = VocabParallelEmbedding(shard, tensor_parallel)
    embedding.weight.uses = uses
    return embedding

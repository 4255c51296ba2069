"""A rank's peak memory in a training step, by arithmetic alone: what is kept, by kind and by layout.

The formula follows Korthikanti et al. 2022 (section 4), for what this code really keeps; docs/memory.md derives it, and
``tests/planning/test_memory.py`` holds it against measured peaks. It counts the tensors of the step: not what the
driver, NCCL and the allocator's fragmentation take besides (:data:`RESERVE_BYTES`).

Legend, for one microbatch on one rank, each in bytes: R the residual stream [b, s or s / tp, h], A an activation that
is whole in a region [b, s, h], Q queries [b, s, heads / tp, d], K keys (and V values, as large), F a feed-forward
activation [b, s, intermediate / tp]. Under context parallelism s counts the tokens of one rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from rich.table import Table

from megagap.config import Settings, most_microbatches, timeline_of
from megagap.errors import ConfigError
from megagap.ops import compiled
from megagap.ops.attention import BLOCK, BLOCKED_FROM, BLOCKED_UP_TO
from megagap.optim.buckets import BUCKET_ELEMENTS
from megagap.optim.matrix_updates import rounds_of
from megagap.optim.precision import PRECISIONS, master_bytes
from megagap.optim.rules import rules_of
from megagap.parallel.actions import Action, BackwardInput, BackwardWeight, Compute, Forward, Transfer
from megagap.parallel.contrastive_loss import COLUMN_MULTIPLE
from megagap.parallel.cross_entropy import chunk_tokens
from megagap.parallel.layout import ContextMode
from megagap.parallel.pipeline import MOST_BATCHES
from megagap.parallel.placement import VirtualStage
from megagap.parallel.program import actions_of, peak_live_activations, with_transfers
from megagap.planning.context import ContextMemory
from megagap.planning.devices import Device
from megagap.planning.layer_memory import AttentionMemory, LayerMemory
from megagap.planning.program_memory import ChunkMemory, Occasion, most_beside
from megagap.planning.transient import BF16, FP32, StoredParameters, Transient, transient
from megagap.training.mesh import make_layout

GIB = 2**30

RESERVE_BYTES = 4 * GIB
"""Left free on a GPU for what the formula does not count: the driver's context (0.5 GiB), buffers of NCCL or RCCL (1 to
2 GiB with several groups), workspaces of libraries, and fragmentation of the allocator."""


@dataclass(frozen=True)
class RankMemory:
    """The processes of one pipeline rank at the moment of a step in which most is live; all in bytes."""

    stage: int
    """The pipeline rank."""
    ranks: range
    """Global ranks of the processes, all of which take as much."""
    parameters: int
    """In the dtype that is computed in; this data rank's slice where ``optim.zero`` is 3."""
    masters: int
    """What this data rank's slice of the fp32 masters has beyond the parameters; 0 where these are fp32."""
    moments: int
    """The optimizer's state, of the slice."""
    gradients: int
    """fp32 sums of all local parameters (``optim.zero`` below 2) and, where they are sharded, of the slice after the
    reduction."""
    activations: int
    """What backward passes need of the microbatches in flight."""
    workspace: int
    """Temporary tensors of the moment: gradients of activations, a chunk's logits, gathered sequences, and, where
    ``optim.zero`` is 2 or 3, whole gradients and parameters of some blocks."""
    inputs: int
    """Tokens of the step, rotary tables."""
    moment: str
    """What is computed at the peak."""
    in_flight: int
    """Microbatches whose activations are kept."""

    @property
    def total(self) -> int:
        return self.static + self.activations + self.workspace + self.inputs

    @property
    def static(self) -> int:
        """What is kept between steps."""
        return self.parameters + self.masters + self.moments + self.gradients

    def fits(self, device: Device) -> bool | None:
        """Whether the device has as much and the reserve; None where its memory is the machine's."""
        return None if not device.memory_gib else self.total + RESERVE_BYTES <= device.memory_gib * GIB

    def as_dict(self, device: Device) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "ranks": [self.ranks.start, self.ranks.stop - 1],
            **{kind: getattr(self, kind) for kind in KINDS},
            "total": self.total,
            "fits": self.fits(device),
            "peak_moment": self.moment,
            "microbatches_in_flight": self.in_flight,
        }


KINDS = ("parameters", "masters", "moments", "gradients", "activations", "workspace", "inputs")
"""Fields of :class:`RankMemory` that add up to the total."""


def memory_by_stage(settings: Settings, device: Device, world_size: int) -> list[RankMemory]:
    """The peak of each pipeline stage; ranks of one stage are alike. The longest sequences of all phases count.

    Raises :class:`ConfigError` for a document mask where what attention keeps depends on the documents, or is not
    counted.
    """
    _require_known_attention(settings, device)
    placement, parallel = settings.placement, settings.parallel
    microbatches = most_microbatches(settings, world_size // (parallel.pp * parallel.cp * parallel.tp))
    programs = with_transfers(actions_of(settings.schedule, placement, microbatches), placement)
    return [_rank_memory(settings, device, world_size, rank, program) for rank, program in enumerate(programs)]


def memory_of_rank(settings: Settings, device: Device, world_size: int, rank: int) -> RankMemory:
    """The peak of one global rank."""
    return next(memory for memory in memory_by_stage(settings, device, world_size) if rank in memory.ranks)


def fullest(stages: list[RankMemory]) -> RankMemory:
    """The stage that takes most: what has to fit."""
    return max(stages, key=lambda memory: memory.total)


def report(settings: Settings, device: Device, world_size: int) -> dict[str, Any]:
    """What ``trace_step --memory --json`` prints."""
    stages, parallel = memory_by_stage(settings, device, world_size), settings.parallel
    dp = world_size // (parallel.pp * parallel.cp * parallel.tp)
    return {
        "device": device.key,
        "device_memory_bytes": int(device.memory_gib * GIB) or None,
        "reserve_bytes": RESERVE_BYTES if device.memory_gib else 0,
        "world_size": world_size,
        "layout": {"pp": parallel.pp, "dp": dp, "cp": parallel.cp, "tp": parallel.tp},
        "peak_memory_bytes": fullest(stages).total,
        "fits": fullest(stages).fits(device),
        "stages": [memory.as_dict(device) for memory in stages],
        "recipe": settings.model_dump(mode="json"),
    }


def stages_table(stages: list[RankMemory]) -> Table:
    """For a person: one row per pipeline stage, GiB of each of its ranks."""
    table = Table("stage", "ranks", *KINDS, "total", "peak in")
    for column in table.columns[2:-1]:
        column.justify = "right"
    for memory in stages:
        ranks = f"{memory.ranks.start}" + (f" to {memory.ranks.stop - 1}" if len(memory.ranks) > 1 else "")
        sizes = [f"{getattr(memory, kind) / GIB:.2f}" for kind in (*KINDS, "total")]
        table.add_row(str(memory.stage), ranks, *sizes, memory.moment)
    return table


def verdict(stages: list[RankMemory], device: Device) -> str:
    """Whether the layout fits, in a line."""
    most = fullest(stages)
    peak = f"the fullest rank takes {most.total / GIB:.2f} GiB"
    if most.fits(device) is None:
        return f"{peak}; a {device.key} has what its machine has"
    has = (
        f"{device.key} has {device.memory_gib:g} GiB, of which {RESERVE_BYTES / GIB:g} are left for what is not counted"
    )
    return f"{peak}: {'fits' if most.fits(device) else 'does not fit'} ({has})"


def assumptions(settings: Settings) -> list[str]:
    """What the numbers count, one per line."""
    longest = _longest_sequence(settings)
    lines = [
        f"counted: all tensors at the fullest moment of a step, with sequences of {longest:,} tokens"
        + (", the longest of all phases" if settings.data.phases else ""),
        "not counted: the driver's context, buffers of NCCL or RCCL, fragmentation (docs/memory.md)",
    ]
    if not compiled.AVAILABLE:
        lines.append(
            "megagap's kernels are not built here (or MEGAGAP_OPS=plain): plain torch keeps more than is counted"
        )
    return lines


def _longest_sequence(settings: Settings) -> int:
    return timeline_of(settings).sequence_lengths[-1]


def _require_known_attention(settings: Settings, device: Device) -> None:
    parallel = settings.parallel
    if settings.data.document_mask and parallel.cp > 1 and parallel.context_mode != "alltoall":
        raise ConfigError(
            f"data.document_mask = true with parallel.context_mode = {parallel.context_mode}: what attention needs is "
            "not counted\n  ask with --data.document_mask false, or --parallel.context_mode alltoall."
        )
    if settings.data.document_mask and (device.kind == "cpu" or settings.train.precision == "fp32"):
        raise ConfigError(
            f"data.document_mask = true: what attention keeps on {device.key} in {settings.train.precision} depends on "
            "the documents\n  ask with --data.document_mask false, or in bf16-mixed on a GPU."
        )


@dataclass(frozen=True)
class _Moment:
    """Something that is computed in a step, and what is live besides the static memory meanwhile."""

    name: str
    activations: int
    workspace: int


def _rank_memory(
    settings: Settings, device: Device, world_size: int, rank: int, program: Sequence[Action]
) -> RankMemory:
    """The peak of one pipeline rank, whose virtual stages share its memory."""
    placement = settings.placement
    stored = stored_parameters(settings, world_size, rank)
    stages = [
        _Stage(
            settings,
            device,
            world_size,
            stage,
            shares_input=stage.index > 0 and placement.places[stage.index - 1].rank == rank,
        )
        for stage in placement.stages_of(rank)
    ]
    any_stage = stages[0]
    microbatches, itemsize, dp = any_stage.microbatches, any_stage.itemsize, any_stage.dp
    actions = [action for action in program if not isinstance(action, Transfer)]
    sharding, elements, ranks = stored.sharding, stored.elements, stored.sharding.shard.size
    slices = elements // ranks
    most_batches = MOST_BATCHES if any_stage.is_gpu else 1
    beside = most_beside(program, rank, placement, [stage.memory for stage in stages], any_stage.R, most_batches)
    # What is held repeats itself after the first microbatches.
    few = min(microbatches, placement.ranks * (2 * placement.chunks + 2))
    held = transient(stored, list(settings.schedule(rank, placement.ranks, placement.chunks, few)), itemsize)
    moments = [
        moment
        for occasion, others in beside.items()
        for stage in [stages[occasion.chunk]]
        for moment in stage.moments(occasion.kind, others, _Held(held, occasion, stage.has_embedding))
    ]
    moments += _matrix_updates(stored, any_stage.tp, any_stage.is_gpu)
    peak = max(moments, key=lambda moment: moment.activations + moment.workspace)
    processes = any_stage.tp * dp * any_stage.cp
    tables = len(stages) * 2 * FP32 * any_stage.length * settings.model.head_dim
    tokens = 8 * microbatches * any_stage.batch * (any_stage.length + 1)
    if any_stage.cp > 1:  # this rank's rows and tokens, inputs and targets, are copies
        tables += tables // any_stage.cp
        tokens += 2 * 8 * microbatches * any_stage.tokens
    return RankMemory(
        stage=rank,
        ranks=range(rank * processes, (rank + 1) * processes),
        parameters=(slices if sharding.parameters else elements) * itemsize,
        masters=slices * master_bytes(any_stage.dtype, settings.optim),
        moments=_state_bytes(settings, stored),
        gradients=stored.gradient_bytes * ((0 if sharding.gradients else elements) + (slices if ranks > 1 else 0)),
        activations=peak.activations,
        workspace=peak.workspace,
        inputs=tokens + tables,
        moment=peak.name,
        in_flight=peak_live_activations(actions),
    )


def _state_bytes(settings: Settings, stored: StoredParameters) -> int:
    """Of the update rules' state, of a rank's slices."""
    rule, matrix_rule = rules_of(settings.optim)
    one = torch.empty(1, device="meta")
    total = 0
    for bucket in stored.buckets.buckets:
        own = matrix_rule if matrix_rule is not None and bucket.kind.is_matrix else rule
        elements = (bucket.stop - bucket.start) // stored.sharding.shard.size
        total += elements * sum(tensor.nbytes for tensor in own.new_state(one).values())
    return total


def _matrix_updates(stored: StoredParameters, tp: int, is_gpu: bool) -> Iterator[_Moment]:
    """The fullest round of updates of whole matrices, if there are any: nothing else is live then, but for what is
    kept between steps. Exact on one rank, an estimate on several."""
    sharding, buckets, itemsize = stored.sharding, stored.buckets.buckets, BF16 if is_gpu else FP32
    shards = sharding.shard.size
    for numbers in rounds_of(stored.buckets, shards * sharding.replicate.size * BUCKET_ELEMENTS):
        slices = [(buckets[number].stop - buckets[number].start) // shards for number in numbers]
        shapes = [stored.parameters[p].shard.shape for number in numbers for p in buckets[number].parameters]
        products = max(2 * rows * columns + 2 * min(rows, columns) ** 2 for rows, columns in shapes)
        piece = max(prod(shape) for shape in shapes) // tp // shards
        # What was prepared, and the updates; over each axis, what has arrived and what it is put together to.
        kept = itemsize * sum(slices) * (2 + 2 * (shards > 1) + 2 * (tp > 1))
        preparing = itemsize * sum(slices) + 2 * FP32 * max(slices)
        applying = kept + (5 if is_gpu else 3) * FP32 * piece
        yield _Moment("update of matrices", 0, max(preparing, kept + itemsize * products, applying))


def stored_parameters(settings: Settings, world_size: int, rank: int) -> StoredParameters:
    """Of a pipeline rank's first process."""
    layout = make_layout(settings, world_size)
    return StoredParameters.of_rank(settings, layout, rank * layout.world_size // layout.pp)


@dataclass(frozen=True)
class _Held:
    """What is held for a while (:class:`Transient`) while an action is computed; 0 bytes below stage 2."""

    transient: Transient
    occasion: Occasion
    has_embedding: bool

    @property
    def _place(self) -> tuple[int, bool]:
        return self.occasion.chunk, self.occasion.fresh

    @property
    def in_loss(self) -> int:
        return self.transient.loss[self._place]

    def backward(self, layer: int) -> int:
        return self._backward(layer + self.has_embedding)

    @property
    def in_embedding_backward(self) -> int:
        return self._backward(0)

    def _backward(self, block: int) -> int:
        return self.transient.backward[self.occasion.chunk, block, self.occasion.fresh]

    @property
    def most_in_forward(self) -> int:
        return self.transient.forward[self._place]

    @property
    def most_in_weights(self) -> int:
        return self.transient.weights[self._place]


class _Stage:
    """The arithmetic of one virtual stage."""

    def __init__(
        self, settings: Settings, device: Device, world_size: int, stage: VirtualStage, *, shares_input: bool
    ) -> None:
        """``shares_input``: whether the stage before is on this rank, too, and what it keeps as its output is what this
        one keeps as its input."""
        model, parallel, train = settings.model, settings.parallel, settings.train
        self.model, self.is_gpu = model, device.kind != "cpu"
        self.pp, self.cp, self.tp = parallel.pp, parallel.cp, parallel.tp
        self.dp = world_size // (self.pp * self.cp * self.tp)
        self.has_embedding, self.has_head, self.layers = stage.has_embedding, stage.has_head, len(stage.layers)
        self.shares_input = shares_input
        self.recompute = train.recompute
        self.dtype = PRECISIONS[train.precision].compute
        self.itemsize = self.dtype.itemsize
        self.gradient_bytes = PRECISIONS[train.precision].gradients.itemsize

        self.batch = train.micro_batch_size
        self.length = _longest_sequence(settings)
        self.microbatches = most_microbatches(settings, self.dp)

        self.splits_sequence = self.tp > 1 and bool(parallel.sequence_parallel)
        self.heads = model.num_attention_heads // self.tp
        self.key_heads = max(1, model.num_key_value_heads // self.tp)
        self.inner = model.intermediate_size // self.tp
        self.rows = ceil(model.vocab_size / self.tp)
        """Of the embedding and the output projection, with padding."""

        tokens = self.batch * self.length // self.cp
        self.tokens, self.residual_tokens = tokens, tokens // self.tp if self.splits_sequence else tokens
        self.R = self.residual_tokens * model.hidden_size * self.itemsize
        self.A = tokens * model.hidden_size * self.itemsize
        self.norm = FP32 * self.residual_tokens
        self.layer = LayerMemory(
            R=self.R,
            A=self.A,
            Q=tokens * self.heads * model.head_dim * self.itemsize,
            K=tokens * self.key_heads * model.head_dim * self.itemsize,
            F=tokens * self.inner * self.itemsize,
            norm=self.norm,
            attention=self._attention(parallel.context_mode),
            keeps_inputs=self.recompute != "selective",
            splits_sequence=self.splits_sequence,
            is_compiled=train.compile,
            inner_copy=self._product_copy(self.inner),
            query_copy=self._product_copy(self.heads * model.head_dim),
            is_post_norm=model.norm_position == "post",
            projection_norms=self._projection_norms if model.qk_norm else 0,
            projection_norms_backward=self._projection_norms_backward if model.qk_norm else 0,
        )

    # -- activations

    @property
    def memory(self) -> ChunkMemory:
        """Of a microbatch, for the program."""
        return ChunkMemory(self.saved, self.layers * self.layer.deferred)

    @property
    def saved(self) -> int:
        """What a microbatch keeps from its forward to its backward pass."""
        # With full, what enters each: the stream and its update, at first no update.
        total = max(0, 2 * self.layers - 1) * self.R if self.recompute == "full" else self.layers * self.layer.saved
        if self.shares_input:
            total -= self.R
        if self.has_embedding and self.tp > 1:
            total += 9 * self.tokens  # which tokens are this rank's rows: an int64 and a bool for each
        return total + self._border

    @property
    def _border(self) -> int:
        """What is kept behind the layers: the output for the next stage; or the last norm's input and statistics, and
        the gradient that the loss computes with itself."""
        return 2 * self.R + self.norm if self.has_head else self.R

    def _attention(self, mode: ContextMode) -> AttentionMemory:
        head = self.tokens * self.model.head_dim * self.itemsize
        queries, keys, log_sums = self.heads * head, self.key_heads * head, FP32 * self.tokens * self.heads
        context = None
        if self.cp > 1:
            wide = max(FP32, self.itemsize) / self.itemsize
            context = ContextMemory(mode, self.cp, self.key_heads, queries, keys, log_sums, wide)
            if not context.sees_whole_sequences:
                return context.in_parts
            keys = context.repeated_keys
        if not self.is_gpu and BLOCKED_FROM <= self.length <= BLOCKED_UP_TO.get(self.dtype, 0):
            again = self.recompute == "selective"
            # Of a block: its scores' gradients, its rows of the result's gradient, and what is computed again of both;
            # and what it adds to the gradient of all keys.
            block = self.batch * self.heads // self.cp * BLOCK * self.length * self.itemsize
            rows = queries * BLOCK // self.length
            kernel = AttentionMemory(
                inputs=queries + 2 * keys,
                statistics=0 if again else self._block_scores,
                keeps_result=False,
                backward=2 * queries + 3 * keys + (3 * block + 2 * rows if again else 2 * block + rows),
            )
        else:
            kept = queries + 2 * (queries if self._repeats_keys else keys)
            kernel = AttentionMemory(kept, log_sums, keeps_result=True, backward=2 * queries + 2 * keys)
        return kernel if context is None else context.around(kernel)

    @property
    def _repeats_keys(self) -> bool:
        """Whether attention is given copies of keys and values, one for each query head."""
        return self.is_gpu and self.itemsize == FP32 and self.heads != self.key_heads

    @property
    def _projection_norms(self) -> int:
        """What norms of queries and keys keep: these as they were before, and a number per token of each; values, too,
        where attention has copies of them, since all three are columns of one product. Where tp splits them, plain
        torch keeps queries and keys in fp32, and rounded without their gain."""
        columns = (self.heads + (2 if self._repeats_keys else 1) * self.key_heads) * self.model.head_dim
        plain = self._normed * (self.itemsize + (FP32 if self.itemsize < FP32 else 0)) if self.tp > 1 else 0
        return self.tokens * (columns * self.itemsize + 2 * max(FP32, self.itemsize)) + plain

    @property
    def _projection_norms_backward(self) -> int:
        """Gradients of queries and keys; in plain torch, of both before and after their rounding, and in fp32."""
        wide = max(FP32, self.itemsize)
        return self._normed * ((2 * wide + self.itemsize) if self.tp > 1 else self.itemsize)

    @property
    def _normed(self) -> int:
        """Elements of queries and keys."""
        return self.tokens * (self.heads + self.key_heads) * self.model.head_dim

    @property
    def _block_scores(self) -> int:
        """Probabilities of each block of queries with the keys up to its end."""
        ends = (min(start + BLOCK, self.length) for start in range(0, self.length, BLOCK))
        starts = range(0, self.length, BLOCK)
        scores = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
        return self.batch * self.heads // self.cp * scores * self.itemsize

    # -- moments

    def moments(self, kind: type[Compute], others: int, held: _Held) -> Iterator[_Moment]:
        """Those of an action in which the peak can be, beside ``others`` bytes."""
        if kind is Forward:
            yield from self._forward(others, held)
        elif kind is BackwardWeight:
            if self.layers:
                deferred = self.layers * self.layer.deferred
                yield _Moment("weight gradients", others + deferred, self.layer.weight_gradients + held.most_in_weights)
        else:
            yield from self._backward(others, kind is BackwardInput, held)

    def _forward(self, others: int, held: _Held) -> Iterator[_Moment]:
        if self.layers:
            kept = others + self.saved - self._border
            work = self.layer.forward
            if self.recompute == "full":  # all of the layer's feed-forward, beside four of the residual stream's size
                work += 3 * self.R + 3 * self.layer.F
            yield _Moment("forward", kept, work + held.most_in_forward)
        if self.has_head:
            work = self._contrastive_loss() if self.model.headless else self._output_and_loss()
            yield _Moment("loss", others + self.saved, self.R + work + held.in_loss)

    def _output_and_loss(self) -> int:
        """Beside the output, whose gradient is kept."""
        chunk = min(self.tokens, chunk_tokens(self.rows, self.itemsize, self._device_type))
        logits = chunk * min(self.rows, self.model.vocab_size) * self.itemsize
        # Under sequence parallelism, the output gathered, and its whole gradient instead of this rank's part.
        output = 2 * self.A - self.R if self.splits_sequence else 0
        return output + logits + self._product_copy(self.rows)

    def _contrastive_loss(self) -> int:
        """Likewise: the embeddings of the targets of whole sequences, their gradients, and a chunk's scores."""
        columns, width = self.length, self.model.hidden_size
        embeddings = self.batch * columns * width
        chunk = min(ceil(columns / self.cp / self.tp), chunk_tokens(columns, FP32, self._device_type))
        scores = chunk * ceil((columns + 1) / COLUMN_MULTIPLE) * COLUMN_MULTIPLE * FP32
        if self.itemsize != FP32:
            gradient = chunk * columns * self.itemsize + self._product_copy(columns)
            scores += gradient if self.is_gpu else max(gradient, (chunk + columns) * width * FP32)
        return (self.itemsize + FP32) * embeddings + scores

    @property
    def _device_type(self) -> str:
        return "cuda" if self.is_gpu else "cpu"

    def _backward(self, others: int, deferring: bool, held: _Held) -> Iterator[_Moment]:
        """Layer by layer, from the last; a gradient that comes in stays until all of it ends."""
        full, deferred = self.recompute == "full", self.layer.deferred if deferring else 0
        kept = others + self.saved - (self._border if self.has_head else 0)
        for layer in reversed(range(self.layers)):
            is_last = layer == self.layers - 1
            # With full, it is computed again from what stays beside it, unless it is a graph, which drops that at once;
            # the first norm of a stage keeps what came in.
            inputs = self.R * (2 * self.layer.is_compiled if layer else 1)
            own = inputs if full else self.layer.saved
            # A gradient that comes in stays. A deferred weight gradient of the last layer keeps it anyway, or a copy.
            incoming = 0 if self.has_head or is_last or (deferring and not self.layer.is_compiled) else self.R
            for step in self.layer.backward(deferring, keeps_output_gradient=is_last and not self.has_head):
                name = f"backward of {'the last' if is_last else 'an earlier'} layer"
                yield _Moment(name, kept - own + step.kept, step.made + incoming + held.backward(layer))
            kept += deferred - (2 * self.R if full else self.layer.saved)
        if self.has_embedding:
            yield self._embedding_backward(others + (self.layers * deferred), held)

    def _embedding_backward(self, others: int, held: _Held) -> _Moment:
        border = 0 if self.has_head else 2 * self.R  # the stage's output and its gradient
        incoming = self.R if self.tp == 1 else self.A
        rows = 0
        if self.gradient_bytes != FP32:  # on CPU those of a token are summed in fp32 first
            rows = 0 if self.is_gpu else 2 * self.tokens * self.model.hidden_size * FP32
        elif self.itemsize != FP32:
            rows = self.tokens * self.model.hidden_size * FP32
        return _Moment("backward of the embedding", others, border + incoming + rows + held.in_embedding_backward)

    def _product_copy(self, rows: int) -> int:
        """On CPU a weight's gradient in bf16 is computed before it is added to the fp32 sum."""
        copies = not self.is_gpu and self.itemsize != self.gradient_bytes
        return rows * self.model.hidden_size * self.itemsize if copies else 0

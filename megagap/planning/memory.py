"""A rank's peak memory in a training step, by arithmetic alone: what is kept, by kind and by layout.

The formula follows Korthikanti et al. 2022 (section 4), for what this code really keeps; docs/memory.md derives it, and
``tests/planning/test_memory.py`` holds it against measured peaks. It counts the tensors of the step: not what the
driver, NCCL and the allocator's fragmentation take besides (:data:`RESERVE_BYTES`).

Legend, for one microbatch on one rank, each in bytes: R the residual stream [b, s or s / tp, h], A an activation that
is whole in a region [b, s, h], Q queries [b, s, heads / tp, d], K keys (and V values, as large), F a feed-forward
activation [b, s, intermediate / tp]. Under context parallelism s counts the tokens of one rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from rich.table import Table

from megagap.config import Settings, most_microbatches, timeline_of
from megagap.errors import ConfigError
from megagap.ops import compiled
from megagap.ops.attention import BLOCK, BLOCKED_FROM, BLOCKED_UP_TO
from megagap.optim.precision import COMPUTE_DTYPES
from megagap.optim.rules import RULES
from megagap.parallel.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megagap.parallel.cross_entropy import chunk_tokens
from megagap.parallel.pipeline import MOST_BATCHES
from megagap.parallel.placement import VirtualStage
from megagap.parallel.program import peak_live_activations
from megagap.planning.context import ContextMemory
from megagap.planning.devices import Device
from megagap.planning.transient import FP32, StoredParameters, Transient, transient
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
    """AdamW's, of the slice."""
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
    return [_rank_memory(settings, device, world_size, rank) for rank in range(settings.placement.ranks)]


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


def _rank_memory(settings: Settings, device: Device, world_size: int, rank: int) -> RankMemory:
    """The peak of one pipeline rank, whose virtual stages share its memory."""
    placement = settings.placement
    stored = stored_parameters(settings, world_size, rank)
    stages = [_Stage(settings, device, world_size, stage) for stage in placement.stages_of(rank)]
    any_stage = stages[0]
    microbatches, itemsize, dp = any_stage.microbatches, any_stage.itemsize, any_stage.dp
    actions = list(settings.schedule(rank, placement.ranks, placement.chunks, microbatches))
    sharding, buckets = stored.sharding, [bucket.stop - bucket.start for bucket in stored.buckets.buckets]
    elements, ranks = stored.elements, sharding.shard.size
    slices = elements // ranks
    kept = _kept_beside(actions, [stage.saved for stage in stages], [stage.deferred for stage in stages])
    # What is held repeats itself after the first microbatches.
    few = min(microbatches, placement.ranks * (2 * placement.chunks + 2))
    held = transient(stored, list(settings.schedule(rank, placement.ranks, placement.chunks, few)), itemsize)
    moments = [
        moment
        for (kind, chunk), others in kept.items()
        for moment in stages[chunk].moments(others, _Held(held, chunk, stages[chunk]), kind is BackwardInput)
    ]
    if not any_stage.is_gpu:  # squares of a bucket
        moments.append(_Moment("norm of the gradients", 0, max(buckets) // ranks * FP32))
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
        masters=slices * (FP32 - itemsize),
        moments=slices * _state_bytes(settings),
        gradients=(0 if sharding.gradients else elements * FP32) + (slices * FP32 if ranks > 1 else 0),
        activations=peak.activations,
        workspace=peak.workspace,
        inputs=tokens + tables,
        moment=peak.name,
        in_flight=peak_live_activations(actions),
    )


def _state_bytes(settings: Settings) -> int:
    """Of the update rule's state, per element."""
    one = torch.empty(1, device="meta")
    return sum(tensor.nbytes for tensor in RULES[settings.optim.name](settings.optim).new_state(one).values())


def _kept_beside(actions: list[Compute], saved: list[int], deferred: list[int]) -> dict[tuple[type[Compute], int], int]:
    """The most that other microbatches, and other chunks, keep while a chunk goes backward; in bytes, by the kind of
    action and the chunk.

    ``saved``: what a microbatch keeps of each chunk, until its backward; ``deferred``: what the weight gradients keep
    that it has deferred, until they are computed.
    """
    most: dict[tuple[type[Compute], int], int] = {}
    live = 0
    for action in actions:
        place = (type(action), action.chunk)
        match action:
            case Forward():
                live += saved[action.chunk]
            case Backward() | BackwardInput():
                live -= saved[action.chunk]
                most[place] = max(most.get(place, 0), live)
                live += deferred[action.chunk] if isinstance(action, BackwardInput) else 0
            case BackwardWeight():
                live -= deferred[action.chunk]
    return most


def stored_parameters(settings: Settings, world_size: int, rank: int) -> StoredParameters:
    """Of a pipeline rank's first process."""
    layout = make_layout(settings, world_size)
    return StoredParameters.of_rank(settings, layout, rank * layout.world_size // layout.pp)


@dataclass(frozen=True)
class _Held:
    """What is held for a while (:class:`Transient`) at the moments of one chunk; 0 bytes below stage 2."""

    transient: Transient
    chunk: int
    stage: "_Stage"

    @property
    def in_loss(self) -> int:
        return self.transient.loss[self.chunk]

    def _block(self, layer: int) -> int:
        return layer + self.stage.has_embedding

    def backward(self, layer: int) -> int:
        return self.transient.backward[self.chunk, self._block(layer)]

    @property
    def in_embedding_backward(self) -> int:
        return self.transient.backward[self.chunk, 0]

    @property
    def most_in_forward(self) -> int:
        return self.transient.forward[self.chunk]

    @property
    def any(self) -> bool:
        return bool(self.transient.backward)


class _Stage:
    """The arithmetic of one virtual stage."""

    def __init__(self, settings: Settings, device: Device, world_size: int, stage: VirtualStage) -> None:
        model, parallel, train = settings.model, settings.parallel, settings.train
        self.model, self.is_gpu = model, device.kind != "cpu"
        self.pp, self.cp, self.tp = parallel.pp, parallel.cp, parallel.tp
        self.dp = world_size // (self.pp * self.cp * self.tp)
        self.has_embedding, self.has_head, self.layers = stage.has_embedding, stage.has_head, len(stage.layers)
        self.recompute = train.recompute
        self.dtype = COMPUTE_DTYPES[train.precision]
        self.itemsize = self.dtype.itemsize

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
        self.Q = tokens * self.heads * model.head_dim * self.itemsize
        self.K = tokens * self.key_heads * model.head_dim * self.itemsize
        self.F = tokens * self.inner * self.itemsize
        self.context: ContextMemory | None = None
        if self.cp > 1:
            wide = max(FP32, self.itemsize) / self.itemsize
            self.context = ContextMemory(parallel.context_mode, self.cp, self.key_heads, self.Q, self.K, wide)

    # -- activations

    @property
    def saved(self) -> int:
        """What a microbatch keeps from its forward to its backward pass."""
        rstd = FP32 * self.residual_tokens
        total = self.layers * self._saved_by_layer
        if self.recompute == "full" and self.layers:
            total = (2 * self.layers - 1) * self.R  # what enters each: the stream and its update, at first no update
        if self.has_embedding and self.tp > 1:
            total += 9 * self.tokens  # which tokens are this rank's rows: an int64 and a bool for each
        if not self.has_head:
            return total + self.R  # its output, for the next stage
        # The last norm's input, and the gradient that the loss computes with itself.
        return total + self.R + rstd + self.R

    @property
    def _saved_by_layer(self) -> int:
        """What a layer's own operations keep; with ``full``, while its backward pass goes on only."""
        norms = 2 * (self.R + FP32 * self.residual_tokens)
        attention = self._saved_by_attention() + self.Q  # its result is the input of the output projection
        return norms + 2 * self._input + attention + 2 * self.F + self._product  # gate and up

    @property
    def _input(self) -> int:
        """What is kept of the input of attention, or of feed-forward."""
        return 0 if self.recompute == "selective" else self.R

    @property
    def _product(self) -> int:
        """What is kept of the product of gate and up."""
        return 0 if self.recompute == "selective" else self.F

    def _saved_by_attention(self) -> int:
        keys = self.context.saved_keys if self.context else 2 * self.K
        if self._in_blocks:
            return self.Q + keys + (0 if self.recompute == "selective" else self._block_scores)
        if self.context:
            return self.Q + keys + self.context.saved_result + FP32 * self.tokens * self.heads
        keys_repeated = self.is_gpu and self.itemsize == FP32 and self.heads != self.key_heads
        log_sums = FP32 * self.tokens * self.heads
        return self.Q + 2 * (self.Q if keys_repeated else self.K) + log_sums

    @property
    def _in_blocks(self) -> bool:
        """On CPU, sequences of some lengths (``ops/attention.py``)."""
        whole = self.context is None or self.context.sees_whole_sequences
        return whole and not self.is_gpu and BLOCKED_FROM <= self.length <= BLOCKED_UP_TO.get(self.dtype, 0)

    @property
    def _block_scores(self) -> int:
        """Probabilities of each block of queries with the keys up to its end."""
        ends = (min(start + BLOCK, self.length) for start in range(0, self.length, BLOCK))
        starts = range(0, self.length, BLOCK)
        scores = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
        return self.batch * self.heads // self.cp * scores * self.itemsize

    @property
    def deferred(self) -> int:
        """What the weight gradients of a microbatch keep until they are computed: input and output's gradient of each
        matrix. It is a little less than :attr:`saved`."""
        return self.layers * self._deferred_by_layer

    @property
    def _deferred_by_layer(self) -> int:
        attention = self.R + self.Q + 2 * self.K + self.Q + self.R
        feed_forward = self.R + 2 * self.F + self.F + self.R
        # What the product of gate and up is made of again is kept in its place.
        return attention + feed_forward + (self.F if self.recompute == "selective" else 0)

    # -- moments

    def moments(self, others: int, held: _Held, deferring: bool) -> Iterator[_Moment]:
        """Those in which the peak can be, beside ``others`` bytes of activations. Earlier ones of a forward pass, and
        earlier layers' backward, hold less, unless gradients and parameters are there for a while only. ``deferring``:
        whether weight gradients are put off."""
        if self.has_head:
            yield from self._loss(others, held.in_loss)
        kept = 2 * self.R if self.recompute == "full" else self._saved_by_layer
        for layer in reversed(range(self.layers if held.any or deferring else min(self.layers, 1))):
            # Counted from the last layer; once it went backward, it has only what is deferred.
            gone = self.layers - 1 - layer if held.any or deferring else 0
            for moment in self._last_layer_backward(others, deferring):
                less = gone * (kept - (self._deferred_by_layer if deferring else 0))
                name = moment.name if not gone else "backward of an earlier layer"
                yield _Moment(name, moment.activations - less, moment.workspace + held.backward(layer))
        if self.has_embedding:
            moment = self._embedding_backward(others)
            yield replace(moment, workspace=moment.workspace + held.in_embedding_backward)
        if held.any:
            yield _Moment("forward", others + self.saved, held.most_in_forward)

    def _loss(self, others: int, held: int) -> Iterator[_Moment]:
        device = "cuda" if self.is_gpu else "cpu"
        chunk = min(self.tokens, chunk_tokens(self.rows, self.itemsize, device))
        logits = chunk * min(self.rows, self.model.vocab_size) * self.itemsize
        # Under sequence parallelism, the output gathered, and its whole gradient instead of this rank's part.
        output = self.R + (2 * self.A - self.R if self.splits_sequence else 0)
        work = output + logits + self._product_copy(self.rows) + self._sending + held
        yield _Moment("loss", others + self.saved, work)

    @property
    def _sending(self) -> int:
        """Gradients before that may still be on their way to the stage before."""
        return self.R * (MOST_BATCHES if self.is_gpu else 1) if self.pp > 1 and self.microbatches > 1 else 0

    def _last_layer_backward(self, others: int, deferring: bool) -> Iterator[_Moment]:
        """The feed-forward, then attention, of the layer whose backward pass is first, beside all others' activations.

        ``kept``: activations then left of this microbatch. A stage's gradient stays until its backward pass ends. What
        is deferred stays as well: of each matrix its input, and the gradient of its output.
        """
        kept = others + self.saved - (2 * self.R + FP32 * self.residual_tokens if self.has_head else 0)
        if self.recompute == "full":  # with the layer's own, computed again; the first norm of a stage reads its input
            kept += self._saved_by_layer - (self.R if self.layers == 1 else 0)
        gathered = self.A if self.splits_sequence else 0
        summed = self.R if self.splits_sequence else 0
        name = "backward of the last layer"
        sending = self._sending if self.has_head else 0
        stream = self.R + sending  # the gradient of the residual stream
        product_again, input_again = self.F - self._product, self.R - self._input
        yield _Moment(name, kept, stream + gathered + self.F + product_again + self._product_copy(self.inner))
        kept -= 0 if deferring else self._product
        yield _Moment(name, kept, stream + 3 * self.F)
        # The input, made and gathered again; its gradient, and that summed over tp.
        inputs = input_again + gathered + self.A + summed
        kept -= 2 * self.F
        yield _Moment(name, kept, stream + 2 * self.F + inputs + self._product_copy(self.inner))
        kept -= self.R + self._input
        if deferring:
            kept += 2 * self.F + self._input + (self.R if self.has_head else 0)
        stream += 0 if self.has_head else self.R
        queries = self.heads * self.model.head_dim
        yield _Moment(name, kept, stream + gathered + self.Q + self._product_copy(queries))
        heads = self.heads // self.cp
        block = self.batch * heads * BLOCK * self.length * self.itemsize if self._in_blocks else 0
        scores = (3 if self.recompute == "selective" else 2) * block  # gradients, and what is computed again
        kept -= self.Q if self._in_blocks else 0
        gradients = self.context.backward_workspace if self.context else 2 * self.Q + 2 * self.K
        yield _Moment(name, kept, stream + gradients + scores)

    def _embedding_backward(self, others: int) -> _Moment:
        border = 2 * self.R if self.pp > 1 else 0  # the stage's output and its gradient
        incoming = self.R if self.tp == 1 else self.A
        rows = self.tokens * self.model.hidden_size * FP32 if self.itemsize != FP32 else 0
        return _Moment("backward of the embedding", others, border + incoming + rows)

    def _product_copy(self, rows: int) -> int:
        """On CPU a weight's gradient in bf16 is computed before it is added to the fp32 sum."""
        copies = not self.is_gpu and self.itemsize != FP32
        return rows * self.model.hidden_size * self.itemsize if copies else 0

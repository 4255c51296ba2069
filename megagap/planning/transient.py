"""What stages 2 and 3 of ``optim.zero`` hold for a while in a step, by arithmetic: whole gradients and gathered blocks.

It follows the events of a rank's program as the gradient store does (``optim/gradient_store.py``), without tensors, and
so knows how often a bucket is reduced and gathered, too.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megagap.config import Settings
from megagap.model.llama import LlamaStage, sharded_parameters, stages_of_recipe
from megagap.optim.buckets import BUCKET_ELEMENTS, Arrangement, Kind, Range
from megagap.optim.gradient_store import arrangement, kind_of
from megagap.optim.precision import PRECISIONS
from megagap.optim.rules import MATRIX_RULES
from megagap.optim.sharding import Sharding
from megagap.parallel.actions import BackwardInput, BackwardWeight, Compute, Forward
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Block, ShardedParameter

BF16 = 2
"""Bytes of an element of what updates of matrices are computed from, on a GPU."""

FP32 = 4
"""Bytes of an element."""


@dataclass(frozen=True)
class StoredParameters:
    """The parameters of a rank, built without storage, in the buckets of its gradient store."""

    stages: Sequence[LlamaStage]
    """Its virtual stages, by chunk."""
    sharding: Sharding
    parameters: Sequence[ShardedParameter]
    kinds: Sequence[Kind]
    """Of each parameter."""
    buckets: Arrangement
    gradient_bytes: int
    """Of an element."""

    @classmethod
    def of_rank(cls, settings: Settings, layout: Layout, rank: int) -> "StoredParameters":
        mesh = Mesh.without_groups(layout, rank, torch.device("meta"))
        stages = stages_of_recipe(settings, mesh)
        parameters, sharding = sharded_parameters(stages), Sharding.of(settings.optim.zero, mesh)
        optim = settings.optim
        kinds = [kind_of(p.shard, optim.decay_embeddings, optim.name in MATRIX_RULES) for p in parameters]
        sizes = [(kind, parameter.numel()) for kind, parameter in zip(kinds, parameters, strict=True)]
        blocks = [stage.blocks() for stage in stages]
        buckets = arrangement(sizes, sharding, BUCKET_ELEMENTS, parameters, blocks)
        gradient_bytes = PRECISIONS[settings.train.precision].gradients.itemsize
        return cls(stages, sharding, parameters, kinds, buckets, gradient_bytes)

    @property
    def elements(self) -> int:
        """With padding."""
        return sum(bucket.stop - bucket.start for bucket in self.buckets.buckets)

    @cached_property
    def places(self) -> dict[int, int]:
        """By the parameter's identity, its number."""
        return {id(parameter): number for number, parameter in enumerate(self.parameters)}

    @cached_property
    def bucket_of(self) -> dict[int, Range]:
        """The bucket of each parameter, by number; where none is cut."""
        return {number: bucket for bucket in self.buckets.buckets for number in bucket.parameters}

    def numbers(self, parameters: Iterable[ShardedParameter]) -> list[int]:
        return [self.places[id(parameter)] for parameter in parameters]

    def buckets_of(self, parameters: Iterable[ShardedParameter]) -> frozenset[Range]:
        """Those that hold some of these parameters."""
        return frozenset(self.bucket_of[number] for number in self.numbers(parameters))


@dataclass(frozen=True)
class _Block:
    """A block of a stage, as events need it."""

    forward: frozenset[Range]
    """What is gathered before its forward pass."""
    backward: frozenset[Range]
    gradients: list[int]
    """Parameters in the order in which its backward pass adds their gradients, but for the output projection."""
    deferrable: frozenset[int]
    """Those of them whose gradients can be deferred: a layer's matrices."""

    @classmethod
    def of(cls, block: Block, stage: LlamaStage, stored: StoredParameters) -> "_Block":
        is_head = stage.has_head and block.module is stage.norm
        added = block.in_backward if is_head else block.parameters
        return cls(
            stored.buckets_of(block.parameters),
            stored.buckets_of(block.in_backward),
            list(reversed(stored.numbers(added))),
            frozenset(stored.numbers(p for p in added if p.dim() == 2 and block.in_backward)),
        )


class _Gradients:
    """The whole gradients that are live, as events follow each other."""

    def __init__(self, stored: StoredParameters) -> None:
        self._stored = stored
        self._bucket_of = stored.bucket_of
        self._kinds = len({bucket.kind for bucket in stored.buckets.buckets})
        self._reports = [0] * len(stored.parameters)
        self._reduced: dict[Range, int] = defaultdict(int)
        self._open: set[Range] = set()
        self._in_flight: dict[Kind, tuple[Range, int, bool]] = {}
        """Bucket, number of openings before, whether its slice is to be added to a sum."""
        self._holds_sum: set[Range] = set()
        self._openings = 0
        self.reductions: Counter[Range] = Counter()

    @property
    def live(self) -> int:
        """Bytes."""
        ranks = self._stored.sharding.shard.size
        size = lambda bucket: bucket.stop - bucket.start  # noqa: E731
        whole = sum(map(size, self._open)) + sum(size(bucket) for bucket, _, _ in self._in_flight.values())
        arriving = sum(size(bucket) // ranks for bucket, _, adds in self._in_flight.values() if adds)
        return self._stored.gradient_bytes * (whole + arriving)

    def add(self, number: int) -> None:
        bucket = self._bucket_of[number]
        if bucket in self._open:
            return
        self._openings += 1
        for kind, (_, before, _) in list(self._in_flight.items()):
            if self._openings - before > self._kinds:
                del self._in_flight[kind]
        self._open.add(bucket)

    def report(self, number: int) -> None:
        self._reports[number] += 1
        bucket = self._bucket_of[number]
        done = min(self._reports[n] // self._stored.parameters[n].uses for n in bucket.parameters)
        if done > self._reduced[bucket]:
            self._reduced[bucket] = done
            if bucket in self._open:
                self._open.remove(bucket)
                self._in_flight[bucket.kind] = (bucket, self._openings, bucket in self._holds_sum)
                self._holds_sum.add(bucket)
                self.reductions[bucket] += 1


class _Residents:
    """The parameters that are there, as blocks are used one after another (``optim/resident_blocks.py``)."""

    def __init__(self, stored: StoredParameters) -> None:
        self._stored = stored
        self._resident: frozenset[Range] = frozenset()
        self.gathers: Counter[Range] = Counter()
        self.elements = 0
        """Of all that are there."""

    def use(self, now: frozenset[Range], soon: frozenset[Range]) -> None:
        """Leave the block that is computed now and the one after it there."""
        if self._stored.sharding.parameters:
            needed = now | soon
            self.gathers.update(needed - self._resident)
            self._resident = needed
            self.elements = sum(bucket.stop - bucket.start for bucket in needed)


@dataclass
class Transient:
    """The most that is held, in bytes, while chunks and their blocks are computed.

    ``fresh`` tells whether no backward pass of the step has begun before: no gradients are on their way then, while
    most activations may be there.
    """

    loss: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """By chunk and ``fresh``: in the forward pass of the last block, with its loss."""
    backward: Counter[tuple[int, int, bool]] = field(default_factory=Counter)
    """By chunk, block and ``fresh``: while the block goes backward."""
    weights: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """By chunk and ``fresh``: while deferred weight gradients are computed."""
    forward: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """By chunk and ``fresh``: while any block goes forward, without the loss."""
    reductions: Counter[Range] = field(default_factory=Counter)
    """How often each bucket is reduced in a step, from stage 2 on."""
    gathers: Counter[Range] = field(default_factory=Counter)
    """How often each bucket is gathered in a step, at stage 3."""


def transient(stored: StoredParameters, actions: Sequence[Compute], itemsize: int) -> Transient:
    """Follow a rank's program of a step. ``itemsize``: of the parameters."""
    found = Transient()
    if not stored.sharding.gradients:
        return found
    gradients, residents = _Gradients(stored), _Residents(stored)
    found.reductions, found.gathers = gradients.reductions, residents.gathers
    blocks = [[_Block.of(block, stage, stored) for block in stage.blocks()] for stage in stored.stages]
    outputs = [stored.numbers([stage.output])[0] if stage.has_head else None for stage in stored.stages]
    nothing: frozenset[Range] = frozenset()

    def largest(known: int) -> int:
        return max(known, gradients.live + itemsize * residents.elements)

    fresh = True
    for action in actions:
        chunk, place = action.chunk, (action.chunk, fresh)
        own, output = blocks[chunk], outputs[chunk]
        if isinstance(action, Forward):
            for i, block in enumerate(own):
                residents.use(block.forward, own[i + 1].forward if i + 1 < len(own) else nothing)
                found.forward[place] = largest(found.forward[place])
            if output is not None:
                gradients.add(output)
                found.loss[place] = largest(found.loss[place])
            continue
        if isinstance(action, BackwardWeight):  # needs no parameters
            for block in reversed(own):
                for number in (n for n in block.gradients if n in block.deferrable):
                    gradients.add(number)
                    found.weights[place] = largest(found.weights[place])
                    gradients.report(number)
            continue
        if output is not None:
            gradients.report(output)
        for i, block in reversed(list(enumerate(own))):
            if block.backward:
                residents.use(block.backward, own[i - 1].backward if i else nothing)
                found.backward[chunk, i, fresh] = largest(found.backward[chunk, i, fresh])
            for number in block.gradients:
                if isinstance(action, BackwardInput) and number in block.deferrable:
                    continue
                gradients.add(number)
                found.backward[chunk, i, fresh] = largest(found.backward[chunk, i, fresh])
                gradients.report(number)
        fresh = False
    return found

"""Where parameters and their gradients lie: flat buckets, which are reduced while backward still runs.

What of a bucket each data-parallel rank has only its slice of says ``optim.zero`` (Rajbhandari et al. 2020, section 5;
:class:`Sharding`): nothing (0), the remainder of its masters and the sum of its gradient (1), the gradient while it is
accumulated (2), the parameters (3). What becomes of them in an update is the business of a rule (``rules.py``), which
this module knows nothing of. docs/data_parallelism.md compares the modes.

In a step, in this order:

1. :meth:`GradientStore.begin`;
2. forward and backward passes; what is computed first for a parameter overwrites its gradient, the rest is added.
   Up to stage 1, a bucket's reduction starts as soon as all microbatches have added to it. From stage 2 on, its
   full-size gradient is made when something is first added to it, reduced as soon as a microbatch has added all, and
   gone afterwards: only the slice accumulates;
3. :meth:`GradientStore.finish`: every :attr:`Bucket.own_gradient` is the sum over data ranks and replicas;
4. :meth:`Bucket.publish` of every bucket, once its slice is updated. The next forward pass waits for each where it
   reaches it (:meth:`GradientStore.wait_as_used`), or for all (:meth:`GradientStore.wait_for_parameters`). At stage 3
   nothing is published: ``resident_blocks.py`` gathers each block's parameters before it is computed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megagap.ops.adjacent import as_one
from megagap.ops.products import add_product, add_rows, adds_inside, set_product
from megagap.ops.random_bits import Segment
from megagap.ops.remainder import join, split_
from megagap.ops.wide import wide_dtype
from megagap.optim.buckets import BUCKET_ELEMENTS, Arrangement, Kind, Range, arrange
from megagap.optim.clipping import squared_norm
from megagap.optim.resident_blocks import ResidentBlocks
from megagap.optim.sharding import Sharding
from megagap.parallel.collectives import (
    Pending,
    Started,
    all_gather_flat_async,
    all_reduce_async,
    reduce_scatter_flat_async,
)
from megagap.parallel.mesh import Axis, Mesh
from megagap.parallel.shard import Block, GradientSink, Shard, ShardedParameter, Slice


class _Place:
    """Where a parameter lies in its kind's buffers; the sink of its gradient (:class:`GradientSink`)."""

    def __init__(self, parameter: ShardedParameter, start: int, report: "Callable[[_Place], None]") -> None:
        self.parameter, self.start, self._report = parameter, start, report
        self.bucket: Bucket
        """The one whose gradient it is in, or that with its first element where it is cut."""
        self.whole: Tensor | None = None
        """Its gradient, where it is kept between steps."""
        self.written = False
        """Whether something was computed for it since its gradient was last reduced: until then it is an old one."""
        self.microbatches = 0
        self.missing = 0
        """How many reports of its uses are yet to come in this step: each use makes one per microbatch."""

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    @property
    def gradient(self) -> Tensor:
        """The sum so far."""
        if self.whole is not None:
            return self.whole
        start = self.start - self.bucket.start
        return self.bucket.full_gradient()[start : start + self.parameter.numel()].view_as(self.parameter)

    @property
    def done(self) -> int:
        """Microbatches of this step for which all of its uses have reported."""
        return self.microbatches - -(-self.missing // self.parameter.uses)

    def begin(self, microbatches: int) -> None:
        self.written, self.microbatches = False, microbatches
        self.missing = self.parameter.uses * microbatches

    def add_product(self, left: Tensor, right: Tensor, following: Sequence[GradientSink] = ()) -> None:
        places = [self, *(place for place in following if isinstance(place, _Place))]
        total = self.gradient[: left.shape[1]] if len(places) == 1 else self._together(places, left)
        if total is None:
            rows = [len(place.parameter) for place in places]
            for place, part in zip(places, left.split(rows, 1), strict=True):
                place.add_product(part, right)
            return
        (add_product if self.written else set_product)(total, left, right)
        for place in places:
            place.written = True

    def _together(self, places: "Sequence[_Place]", left: Tensor) -> Tensor | None:
        """The gradients of a pack, of which this is the first, as one that a product with ``left`` is added to; None
        where they are apart, or not all of this step, or where the product would take memory of its own."""
        alike = all(place.written == self.written for place in places)
        apart = self.whole is None and any(place.bucket is not self.bucket for place in places)
        if apart or not alike or not adds_inside(left, self.bucket.own_gradient.dtype):
            return None
        return as_one([place.gradient for place in places], 0)

    def add_rows(self, ids: Tensor, rows: Tensor) -> None:
        self.clear_unless_written()
        add_rows(self.gradient, ids, rows)

    def finished(self) -> None:
        self._report(self)

    def collect(self, parameter: Tensor) -> None:
        """Autograd's hook: move the gradient into the bucket."""
        if parameter.grad is None:  # an operation added it itself, or will: some releases of torch run the hook too
            return
        if self.written:
            self.gradient.add_(parameter.grad)
        else:
            self.gradient.copy_(parameter.grad)
        self.written = True
        parameter.grad = None
        self.finished()

    def clear_unless_written(self) -> None:
        if not self.written:
            self.gradient.zero_()
            self.written = True


def _collect(parameter: Tensor) -> None:
    """A method of the sink would do, but torch hides what a hook refers to from Python's garbage collector: the
    optimizer, its memory and its process groups would then live as long as the process."""
    parameter.sink.collect(parameter)  # type: ignore[attr-defined]


class Bucket:
    """A range of a kind's flat buffers, of which this data rank owns a slice, or all of it.

    values: [n] in the parameters' dtype, which are views of it. gradients: [n]; None where only the slice is kept.
    own_values: this rank's slice of the values: the masters or, where these are fp32 and the values bf16, the masters
    rounded to nearest. remainder: then the rest of these masters, int16 (``ops/remainder.py``), else None. Masters of
    values in fp16 are whole, and no part of them.
    """

    def __init__(
        self,
        place: Range,
        places: list[_Place],
        values: Tensor,
        gradients: Tensor | None,
        gradient_dtype: torch.dtype,
        exact: bool,
        sharding: Sharding,
        replicas: Axis | None,
        opening: Callable[[], None],
    ) -> None:
        """``exact``: bf16 values have fp32 masters. ``opening`` is called before a full-size gradient is made, where
        none is kept."""
        self._opening = opening
        self.kind, self.start, self.places, self.replicas = place.kind, place.start, places, replicas
        self.watch: Callable[[Tensor], None] | None = None
        """Is given this rank's full-size gradient before it is reduced."""
        self.sharding, self.shard, self.replicate = sharding, sharding.shard, sharding.replicate
        self.values, self.gradients = values, gradients
        length = self.values.numel() // self.shard.size
        self.own = slice(self.shard.rank * length, (self.shard.rank + 1) * length)
        self.own_values, self.remainder = self._fill(exact)
        if gradients is not None and self.shard.size == 1:
            self.own_gradient = gradients
        else:
            self.own_gradient = values.new_zeros(length, dtype=gradient_dtype)
        self.microbatches_reduced = 0
        """Those that have reported for all of its parameters, of this step."""
        self.holds_sum = False
        """Whether ``own_gradient`` is of this step."""
        self._open: Tensor | None = None
        """A full-size gradient that is being added to, where none is kept."""
        self._reduced: Tensor | None = None
        self._arriving: Tensor | None = None
        """What is to be added to ``own_gradient`` once it is reduced."""
        self._reduction: Started | Pending | None = None
        self._gathering: Started | None = None

    def _fill(self, exact: bool) -> tuple[Tensor, Tensor | None]:
        """Take over the parameters' initial values. Returns this rank's slice, and the remainder of its masters if they
        have one."""
        initial = self.values
        if self.values.dtype == torch.float16 or (exact and self.values.dtype == torch.bfloat16):
            initial = torch.zeros_like(self.values, dtype=torch.float32)
        for place, here, there in self._parts(slice(0, self.values.numel())):
            initial[here].copy_(place.parameter.detach().reshape(-1)[there])
        if self.values.dtype == torch.float16:
            self.values.copy_(initial)
            return initial[self.own].clone(), None
        remainder = None
        if initial is not self.values:
            whole = torch.empty_like(self.values, dtype=torch.int16)
            split_(initial, self.values, whole)
            remainder = whole[self.own].clone()
        own = self.values[self.own]
        return own.clone() if self.sharding.parameters else own, remainder

    def _parts(self, within: slice) -> Iterator[tuple[_Place, slice, slice]]:
        """For each parameter with elements in a part of the bucket: where they are in the bucket, and in itself."""
        for place in self.places:
            start, stop = max(within.start + self.start, place.start), min(within.stop + self.start, place.stop)
            if start < stop:
                yield (
                    place,
                    slice(start - self.start, stop - self.start),
                    slice(start - place.start, stop - place.start),
                )

    @property
    def is_owned(self) -> bool:
        """Whether this rank, among the ranks with the same elements, counts and saves them."""
        return self.replicate.rank == 0 and (self.replicas is None or self.replicas.rank == 0)

    @property
    def done(self) -> int:
        """Microbatches of this step for which all of its parameters have their gradients."""
        return min(place.done for place in self.places)

    @property
    def is_complete(self) -> bool:
        """Whether all uses of its parameters have reported for every microbatch."""
        return not any(place.missing for place in self.places)

    def masters(self) -> Tensor:
        """This rank's slice of the weights as exactly as they are kept: a copy where they have a remainder."""
        return join(self.own_values, self.remainder)

    # -- gradients

    def begin(self, microbatches: int) -> None:
        for place in self.places:
            place.begin(microbatches)
        self.microbatches_reduced, self.holds_sum = 0, False
        self._open = None

    @property
    def is_open(self) -> bool:
        """Whether it has a full-size gradient that is to be reduced."""
        return self._open is not None

    def full_gradient(self) -> Tensor:
        """Where gradients are added: made if it is not there."""
        if self.gradients is not None:
            return self.gradients
        if self._open is None:
            self._opening()
            self._open = torch.empty_like(self.values, dtype=self.own_gradient.dtype)
            for gap in self._gaps():
                self._open[gap].zero_()
        return self._open

    def _gaps(self) -> Iterator[slice]:
        """What no gradient is written to: padding of parameters, and between them."""
        end = 0
        for place in sorted(self.places, key=lambda place: place.start):
            start = place.start - self.start
            yield slice(end, start)
            end = start + place.parameter.shard.numel
        yield slice(end, self.values.numel())

    def start_reduction(self) -> None:
        assert self._gathering is None or self.sharding.parameters, "its parameters were used before they had arrived"
        full = self.full_gradient()
        for place in self.places:
            place.clear_unless_written()
        if self.watch is not None:
            self.watch(full)
        if self.shard.size == 1:
            if self.replicate.size > 1 and not self.sharding.gradients:
                self._reduction = all_reduce_async(self.own_gradient, self.replicate)
        elif self.gradients is not None:
            self._reduction = reduce_scatter_flat_async(self.own_gradient, full, self.shard)
        else:
            target = self.own_gradient
            if self.holds_sum:
                target = self._arriving = torch.empty_like(target)
            self._reduction = reduce_scatter_flat_async(target, full, self.shard)
            self._reduced, self._open = full, None
            for place in self.places:
                place.written = False
        self.holds_sum = True

    def finish_reduction(self) -> None:
        """``own_gradient`` then holds the sum over the ranks that it is sharded over."""
        if self._reduction is not None:
            self._reduction.wait()
        if self._arriving is not None:
            self.own_gradient.add_(self._arriving)
        self._reduction = self._arriving = self._reduced = None

    def sum_over_replicate(self) -> Pending:
        """Start summing the slices of all parts of the data ranks that each hold everything."""
        if self.shard.size == 1:
            return Pending(self.own_gradient)  # that was the reduction
        return all_reduce_async(self.own_gradient, self.replicate)

    def sum_over_replicas(self) -> Pending:
        """Start summing the slices of the replicas, where each has a part of the gradient."""
        # Replicas lay out their buckets alike, so slices can be summed: 1 / data of the traffic of whole gradients.
        if not self.kind.partial_gradient or self.replicas is None:
            return Pending(self.own_gradient)
        return all_reduce_async(self.own_gradient, self.replicas)

    # -- parameters

    def publish(self) -> None:
        """This rank's slice has changed: start gathering, or forget what was gathered before."""
        if self.sharding.parameters:
            self.free_values()
            return
        if self.own_values.dtype != self.values.dtype:
            self.values[self.own].copy_(self.own_values)
        self.start_gather()

    def start_gather(self) -> None:
        """Start collecting all ranks' slices, if they are not there."""
        if self.sharding.parameters:
            if self.is_resident:
                return
            self.values.untyped_storage().resize_(self.values.numel() * self.values.itemsize)
        if self.shard.size > 1:
            own = self.own_values.to(self.values.dtype) if self.sharding.parameters else self.values[self.own]
            self._gathering = all_gather_flat_async(self.values, own, self.shard)

    def finish_gather(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    @property
    def is_resident(self) -> bool:
        """Whether its parameters have memory, which may still be arriving."""
        return self.values.untyped_storage().nbytes() > 0

    def free_values(self) -> None:
        """Give back the memory of the whole parameters; what autograd has kept of them is views, which see it when they
        are gathered again."""
        self.finish_gather()
        self.values.untyped_storage().resize_(0)

    def slices(self, kind: str, tensor: Tensor, remainder: Tensor | None = None) -> Iterator[Slice]:
        """The parts of parameters, without padding, that this rank's slice ``tensor`` covers, with its remainder."""
        return self._slices(kind, tensor, self.own, remainder)

    def pieces(self, rank: int) -> Iterator[tuple[Shard, int, int]]:
        """What the slice of a rank of the ``shard`` axis has of parameters: record, first element there, elements."""
        length = len(self.own_values)
        for shard, first, part in self._real_parts(slice(rank * length, (rank + 1) * length)):
            yield shard, first, part.stop - part.start

    def parts_of(self, full: Tensor) -> Iterator[Slice]:
        """The parts of parameters in a full-size gradient [n]."""
        return self._slices("gradient", full, slice(0, self.values.numel()))

    def segments(self, seed: int) -> list[Segment]:
        """The same parts, for rounding them stochastically."""
        return [
            Segment.of(
                seed,
                shard.name,
                shard.shape,
                shard.offsets,
                shard.sizes,
                first=first,
                begin=part.start,
                end=part.stop,
            )
            for shard, first, part in self._real_parts(self.own)
        ]

    def _slices(self, kind: str, tensor: Tensor, within: slice, remainder: Tensor | None = None) -> Iterator[Slice]:
        for shard, first, part in self._real_parts(within):
            rest = None if remainder is None else remainder[part]
            yield Slice(kind, shard, first, first + part.stop - part.start, tensor[part], rest)

    def _real_parts(self, within: slice) -> Iterator[tuple[Shard, int, slice]]:
        """For each parameter with elements, without padding, in a part of the bucket: its record, its first element
        there, and where they are in the part."""
        for place, here, there in self._parts(within):
            stop = min(there.stop, place.parameter.shard.numel)
            if there.start < stop:
                begin = here.start - within.start
                yield place.parameter.shard, there.start, slice(begin, begin + stop - there.start)


class GradientStore:
    """The buckets of a stage's parameters, which become views of them: build it before anything reads them."""

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        mesh: Mesh,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype | None = None,
        *,
        exact: bool = True,
        zero: int = 1,
        decay_embeddings: bool = False,
        matrices_apart: bool = False,
        bucket_elements: int = BUCKET_ELEMENTS,
        blocks: Sequence[Sequence[Block]] = (),
    ) -> None:
        """``parameters``: in the order in which the forward pass uses them, with their initial values in fp32; they are
        in ``dtype`` afterwards: fp32, float64, fp16 with fp32 masters, or bf16, which has some if it is ``exact``.
        ``gradient_dtype``: by default fp32, of float64 parameters float64.

        ``matrices_apart``: keep the matrices of layers in buckets of their own.

        ``blocks``: of each virtual stage, in the order of its forward pass, which waits at each for its parameters. At
        stage 3 they are gathered there, so that all parameters must be in one.
        """
        assert dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16), dtype
        self.mesh, self.sharding = mesh, Sharding.of(zero, mesh)
        kinds = [kind_of(parameter.shard, decay_embeddings, matrices_apart) for parameter in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        layout = arrangement(list(zip(kinds, sizes, strict=True)), self.sharding, bucket_elements, parameters, blocks)
        self.arrangement = layout
        """Of the parameters, in the order given; its buckets are :attr:`buckets`."""
        self._places = [
            _Place(parameter, start, self._reported) for parameter, start in zip(parameters, layout.starts, strict=True)
        ]
        self.buckets = list(self._make_buckets(layout, dtype, gradient_dtype or wide_dtype(dtype), exact))
        for place in self._places:
            place.parameter.sink = place
            place.parameter.register_post_accumulate_grad_hook(_collect)
        self._next_reduction = len(self.buckets)
        self._kinds = len({bucket.kind for bucket in self.buckets})
        self._openings = 0
        self._in_flight: dict[Kind, tuple[Bucket, int]] = {}
        """From stage 2 on: of each kind, the bucket whose reduction was started last, and how many full-size gradients
        had been made then."""
        self._complete = False
        self._resident: ResidentBlocks[Bucket] | None = None
        if self.sharding.parameters:
            assert blocks, "stage 3 gathers the parameters of blocks"
            self._resident = ResidentBlocks(self.buckets, blocks, self._buckets_of)
        else:
            for chunk in blocks:
                self.wait_as_used(chunk)

    def _make_buckets(
        self, layout: Arrangement, dtype: torch.dtype, gradient_dtype: torch.dtype, exact: bool
    ) -> Iterator[Bucket]:
        device, mesh = self.mesh.device, self.mesh
        lengths = {kind: layout.buffer_elements(kind) for kind in {place.kind for place in layout.buckets}}
        values: dict[Kind, Tensor] = {}
        gradients: dict[Kind, Tensor] = {}
        if not self.sharding.parameters:
            values = {k: torch.zeros(n, dtype=dtype, device=device) for k, n in lengths.items()}
        if not self.sharding.gradients:
            gradients = {k: torch.zeros(n, dtype=gradient_dtype, device=device) for k, n in lengths.items()}
        for place in layout.buckets:
            kind, places = place.kind, [self._places[number] for number in place.parameters]
            within = slice(place.start, place.stop)
            own = None
            if not values:
                # Grown from nothing, so that it can shrink to nothing: what follows memory then sees that it does.
                # Padding is zero, as elsewhere: replicas of a slice are compared bit for bit.
                own = torch.empty(0, dtype=dtype, device=device).resize_(place.stop - place.start).zero_()
            replicas = mesh.axis(kind.replica_axis) if kind.replica_axis else None
            bucket = Bucket(
                place,
                places,
                values[kind][within] if own is None else own,
                gradients[kind][within] if gradients else None,
                gradient_dtype,
                exact,
                self.sharding,
                replicas,
                self._opening,
            )
            for member in places:
                member.bucket = bucket
                if gradients:
                    member.whole = gradients[kind][member.start : member.stop].view_as(member.parameter)
                if own is not None:
                    flat = own[member.start - place.start : member.stop - place.start]
                    member.parameter.data = flat.view_as(member.parameter)
            if own is not None:
                bucket.free_values()
            yield bucket
        # Only now, as a parameter that is cut is read by several buckets.
        for place in layout.buckets if values else ():
            for member in (self._places[number] for number in place.parameters):
                flat = values[place.kind][member.start : member.stop]
                member.parameter.data = flat.view_as(member.parameter)

    def _buckets_of(self, parameters: Iterable[ShardedParameter]) -> list[Bucket]:
        used = {id(parameter) for parameter in parameters}
        return [b for b in self.buckets if any(id(place.parameter) in used for place in b.places)]

    def begin(self, microbatches: int) -> None:
        """Before the first forward pass of a step of so many microbatches, which may add gradients already."""
        for bucket in self.buckets:
            bucket.begin(microbatches)
        self._next_reduction = 0
        self._complete = False

    @contextmanager
    def watched(self, watch: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the block ``watch`` is given each gradient of this rank alone, [n], before it is reduced."""
        for bucket in self.buckets:
            bucket.watch = watch
        try:
            yield
        finally:
            for bucket in self.buckets:
                bucket.watch = None

    def finish(self) -> None:
        """Wait until every bucket's ``own_gradient`` is complete."""
        assert not self._complete, "begin() comes first"
        if self._resident is not None:
            self._resident.free_all()
        if self.sharding.gradients:
            for bucket in self.buckets:
                if bucket.is_open or not bucket.holds_sum:
                    self._reduce(bucket)
            self._in_flight.clear()
        else:
            self._start_ready_reductions(all_buckets=True)
        for start in (Bucket.sum_over_replicate, Bucket.sum_over_replicas):
            started = []
            for bucket in self.buckets:
                bucket.finish_reduction()
                started.append(start(bucket))
            for pending in started:
                pending.wait()
        self._complete = True

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared global gradient norm, fp32 scalar: the sum over the world is the total."""
        assert self._complete, "finish() comes first"
        owned = [bucket.own_gradient for bucket in self.buckets if bucket.is_owned]
        return squared_norm(owned) if owned else torch.zeros((), device=self.mesh.device)

    def gather_parameters(self) -> None:
        """Start copying every rank's changed slices into all ranks' parameters."""
        for bucket in self.in_order_of_use():
            bucket.publish()

    def wait_for_parameters(self) -> None:
        """Before parameters are read; at stage 3, only blocks can read theirs."""
        for bucket in self.buckets:
            bucket.finish_gather()

    def wait_as_used(self, blocks: Iterable[Block]) -> None:
        """From now on a forward pass waits at each module for the parameters named with it, and not for later ones."""
        for block in blocks:
            block.module.register_forward_pre_hook(_Wait(self._buckets_of(block.parameters)))

    def in_order_of_use(self) -> Iterator[Bucket]:
        """Buckets as the forward pass comes to them."""
        return reversed(self.buckets)

    def _reported(self, place: _Place) -> None:
        place.missing -= 1
        assert place.missing >= 0, f"{place.parameter.shard.name} is used more than .uses times"
        if not self.sharding.gradients:
            self._start_ready_reductions()
        elif (bucket := place.bucket).done > bucket.microbatches_reduced:
            bucket.microbatches_reduced = bucket.done
            if bucket.is_open:  # what is computed in a forward pass was reduced with an earlier microbatch
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        """Start reducing what a microbatch has added, in the order of the backward pass: the same on all data ranks,
        which compute the same."""
        # One bucket of a kind is on its way while the next is filled: two are live.
        if bucket.kind in self._in_flight:
            self._in_flight.pop(bucket.kind)[0].finish_reduction()
        bucket.start_reduction()
        self._in_flight[bucket.kind] = bucket, self._openings

    def _opening(self) -> None:
        """Wait for reductions since which each kind can have been added to: else the last of a backward pass would keep
        its memory through the next forward pass."""
        self._openings += 1
        for kind, (bucket, before) in list(self._in_flight.items()):
            if self._openings - before > self._kinds:
                bucket.finish_reduction()
                del self._in_flight[kind]

    def _start_ready_reductions(self, all_buckets: bool = False) -> None:
        # In bucket order, the same on all data ranks: collectives must be issued in the same order.
        while self._next_reduction < len(self.buckets):
            bucket = self.buckets[self._next_reduction]
            if not bucket.is_complete and not all_buckets:
                return
            bucket.start_reduction()
            self._next_reduction += 1


class _Wait:
    """A module's forward pre-hook."""

    def __init__(self, buckets: list[Bucket]) -> None:
        self._buckets = buckets

    def __call__(self, *_: object) -> None:
        for bucket in self._buckets:
            bucket.finish_gather()


def arrangement(
    sizes: Sequence[tuple[Kind, int]],
    sharding: Sharding,
    bucket_elements: int,
    parameters: Sequence[ShardedParameter],
    blocks: Sequence[Sequence[Block]],
) -> Arrangement:
    """The buckets of a stage's ``parameters``, of these kinds and sizes.

    From stage 2 on a bucket has whole parameters of one block, which are gathered at the same times.
    """
    numbers: dict[int, int] = {}
    for number, block in enumerate(block for chunk in blocks for block in chunk):
        again = {id(parameter) for parameter in block.in_backward}
        for parameter in block.parameters:
            numbers.setdefault(id(parameter), 2 * number + (id(parameter) not in again))
    of_blocks = [numbers[id(parameter)] for parameter in parameters] if sharding.gradients and blocks else None
    packs = [parameter.pack for parameter in parameters]
    cuts = not sharding.gradients
    return arrange(sizes, sharding.shard.size, bucket_elements, cuts=cuts, blocks=of_blocks, packs=packs)


def kind_of(shard: Shard, decay_embeddings: bool, matrices_apart: bool) -> Kind:
    """The kind of bucket that a parameter lies in."""
    is_matrix = matrices_apart and shard.is_layer_matrix
    return Kind(decay_embeddings or not shard.is_embedding, shard.replica_axis, shard.partial_gradient, is_matrix)

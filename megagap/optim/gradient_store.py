"""Where parameters and their gradients lie: flat buckets, which are reduced while backward still runs.

Each data-parallel rank owns an equal slice of every bucket: its fp32 master weights and its summed gradient (ZeRO stage
1; Rajbhandari et al. 2020, section 5.1). What becomes of them in an update is the business of a rule (``rules.py``),
which this module knows nothing of.

In a step, in this order:

1. :meth:`GradientStore.begin`;
2. forward and backward passes; what is computed first for a parameter overwrites its gradient, the rest is added. A
   bucket's reduction starts as soon as all microbatches have added to it;
3. :meth:`GradientStore.finish`: every :attr:`Bucket.own_gradient` is the sum over data ranks and replicas;
4. :meth:`Bucket.start_gather` of every bucket, once its slice is updated. The next forward pass waits for each where it
   reaches it (:meth:`GradientStore.wait_as_used`), or for all (:meth:`GradientStore.wait_for_parameters`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagap.ops.products import add_product, add_rows, set_product
from megagap.ops.wide import wide_dtype
from megagap.optim.buckets import BUCKET_ELEMENTS, Kind, Range, arrange
from megagap.optim.clipping import squared_norm
from megagap.parallel.collectives import all_gather_flat_async, all_reduce, reduce_scatter_flat_async
from megagap.parallel.mesh import Axis, Mesh
from megagap.parallel.shard import Shard, ShardedParameter, Slice


class _Place:
    """Where a parameter lies in its kind's buffers; the sink of its gradient (:class:`GradientSink`)."""

    def __init__(
        self, parameter: ShardedParameter, start: int, gradient: Tensor, report: "Callable[[_Place], None]"
    ) -> None:
        self.parameter, self.start, self.gradient, self._report = parameter, start, gradient, report
        self.written = False
        """Whether something was computed for it in this step: until then its gradient is that of the step before."""
        self.missing = 0
        """How many reports of its uses are yet to come in this step: each use makes one per microbatch."""

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    def add_product(self, left: Tensor, right: Tensor) -> None:
        rows = self.gradient[: left.shape[1]]
        (add_product if self.written else set_product)(rows, left, right)
        self.written = True

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
    """A range of a kind's flat buffers, of which this data rank owns a slice.

    values: [n] in the parameters' dtype, which are views of it; gradients: [n] in fp32.
    """

    def __init__(self, place: Range, places: list[_Place], values: Tensor, gradients: Tensor, mesh: Mesh) -> None:
        self.kind, self.start, self.places, self.data = place.kind, place.start, places, mesh.data
        self.replicas: Axis | None = mesh.axis(place.kind.replica_axis) if place.kind.replica_axis else None
        self.values, self.gradients = values[place.start : place.stop], gradients[place.start : place.stop]
        length = self.values.numel() // self.data.size
        self.own = slice(self.data.rank * length, (self.data.rank + 1) * length)
        self.own_values = self.values[self.own]
        self.own_gradient = self.gradients if self.data.size == 1 else torch.zeros_like(self.gradients[self.own])
        self.master = self._fill()
        self._reduction: dist.Work | None = None
        self._gathering: dist.Work | None = None

    def _fill(self) -> Tensor:
        """Take over the parameters' initial values; this rank's master weights."""
        sums = self.gradients.dtype
        initial = self.values if self.values.dtype == sums else torch.zeros_like(self.gradients)
        for place, here, there in self._parts(slice(0, self.values.numel())):
            initial[here].copy_(place.parameter.detach().reshape(-1)[there])
        if initial is self.values:  # the parameters are their own masters
            return self.own_values
        self.values.copy_(initial)
        return initial[self.own].clone()

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
        """Whether this rank, among the ranks with the same parameters, counts and saves them."""
        return self.replicas is None or self.replicas.rank == 0

    @property
    def is_complete(self) -> bool:
        """Whether all uses of its parameters have reported for every microbatch."""
        return not any(place.missing for place in self.places)

    @property
    def rounded(self) -> Tensor | None:
        """This rank's slice of the parameters, if they are the masters rounded to another dtype."""
        return None if self.master is self.own_values else self.own_values

    def start_reduction(self) -> None:
        assert self._gathering is None, "its parameters were used before they had arrived"
        for place in self.places:
            place.clear_unless_written()
        if self.data.size > 1:
            self._reduction = reduce_scatter_flat_async(self.own_gradient, self.gradients, self.data)

    def finish_reduction(self) -> None:
        """``own_gradient`` is then the sum over data ranks and over replicas with partial gradients."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        # Replicas lay out their buckets alike, so slices can be summed: 1 / data of the traffic of whole gradients.
        if self.kind.partial_gradient and self.replicas is not None:
            all_reduce(self.own_gradient, self.replicas)

    def start_gather(self) -> None:
        """Publish this rank's slice."""
        if self.data.size > 1:
            self._gathering = all_gather_flat_async(self.values, self.own_values, self.data)

    def finish_gather(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def slices(self, kind: str, tensor: Tensor) -> Iterator[Slice]:
        """The parts of parameters, without padding, that this rank's slice ``tensor`` covers."""
        for place, here, there in self._parts(self.own):
            stop = min(there.stop, place.parameter.shard.numel)
            if there.start < stop:
                first = here.start - self.own.start
                part = tensor[first : first + stop - there.start]
                yield Slice(kind, place.parameter.shard, there.start, stop, part)


class GradientStore:
    """The buckets of a stage's parameters, which become views of them: build it before anything reads them."""

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        decay_embeddings: bool = False,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        """``parameters``: in the order in which the forward pass uses them, with their initial values in fp32; they are
        in ``dtype`` afterwards, their masters fp32."""
        self.mesh = mesh
        kinds = [kind_of(parameter.shard, decay_embeddings) for parameter in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        layout = arrange(list(zip(kinds, sizes, strict=True)), mesh.data.size, bucket_elements)
        lengths = {kind: layout.buffer_elements(kind) for kind in set(kinds)}
        values = {k: torch.zeros(n, dtype=dtype, device=mesh.device) for k, n in lengths.items()}
        gradients = {k: torch.zeros(n, dtype=wide_dtype(dtype), device=mesh.device) for k, n in lengths.items()}
        self._places = [
            _Place(parameter, start, gradients[kind][start : start + size].view_as(parameter), self._reported)
            for parameter, kind, start, size in zip(parameters, kinds, layout.starts, sizes, strict=True)
        ]
        self.buckets = [
            Bucket(place, [self._places[n] for n in place.parameters], values[place.kind], gradients[place.kind], mesh)
            for place in layout.buckets
        ]
        for place, kind in zip(self._places, kinds, strict=True):
            place.parameter.data = values[kind][place.start : place.stop].view_as(place.parameter)
            place.parameter.sink = place
            place.parameter.register_post_accumulate_grad_hook(_collect)
        self._next_reduction = len(self.buckets)
        self._complete = False

    def begin(self, microbatches: int) -> None:
        """Before the first forward pass of a step of so many microbatches, which may add gradients already."""
        for place in self._places:
            place.written, place.missing = False, place.parameter.uses * microbatches
        self._next_reduction = 0
        self._complete = False

    def finish(self) -> None:
        """Wait until every bucket's ``own_gradient`` is complete."""
        assert not self._complete, "begin() comes first"
        self._start_ready_reductions(all_buckets=True)
        for bucket in self.buckets:
            bucket.finish_reduction()
        self._complete = True

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared global gradient norm, fp32 scalar: the sum over the world is the total."""
        assert self._complete, "finish() comes first"
        owned = [bucket.own_gradient for bucket in self.buckets if bucket.is_owned]
        return squared_norm(owned) if owned else torch.zeros((), device=self.mesh.device)

    def gather_parameters(self) -> None:
        """Start copying changed masters into every rank's parameters."""
        for bucket in self.in_order_of_use():
            if bucket.rounded is not None:
                bucket.rounded.copy_(bucket.master)
            bucket.start_gather()

    def wait_for_parameters(self) -> None:
        """Before parameters are read."""
        for bucket in self.buckets:
            bucket.finish_gather()

    def wait_as_used(self, blocks: Iterable[tuple[nn.Module, Iterable[ShardedParameter]]]) -> None:
        """From now on a forward pass waits at each module for the parameters named with it, and not for later ones."""
        for module, parameters in blocks:
            used = {id(parameter) for parameter in parameters}
            buckets = [b for b in self.buckets if any(id(place.parameter) in used for place in b.places)]
            module.register_forward_pre_hook(_Wait(buckets))

    def in_order_of_use(self) -> Iterator[Bucket]:
        """Buckets as the forward pass comes to them."""
        return reversed(self.buckets)

    def _reported(self, place: _Place) -> None:
        place.missing -= 1
        assert place.missing >= 0, f"{place.parameter.shard.name} is used more than .uses times"
        self._start_ready_reductions()

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


def kind_of(shard: Shard, decay_embeddings: bool) -> Kind:
    """The kind of bucket that a parameter lies in."""
    return Kind(decay_embeddings or not shard.is_embedding, shard.replica_axis, shard.partial_gradient)

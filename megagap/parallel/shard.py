"""The one record that every parameter carries: which part of which global tensor this rank holds.

Initialisation, clipping, decay groups, checkpoints, Hugging Face conversion and the planner read only this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megagap.ops.remainder import join, split_


@dataclass(frozen=True)
class Shard:
    """A rectangular part of a global tensor, as one rank stores it.

    ``offsets`` and ``sizes`` are in elements of the *unpadded* global ``shape``. The local tensor has shape
    ``local_shape``, which exceeds ``sizes`` only in dimension 0, where rows of padding follow the real ones.

    ``replica_axis`` names the mesh axis along which other ranks hold the same part (data-parallel copies,
    which every parameter has, are not counted): ``"tp"`` for norms, ``"kv"`` for key/value heads shared by several
    tensor-parallel ranks, ``"embedding"`` for an embedding tied across the first and the last stage. Rank 0 of that
    axis owns the part: it alone counts it in norms and writes it to checkpoints.
    ``partial_gradient``: each replica computes only its share of the gradient, and the shares must be summed.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_shape: tuple[int, ...]
    replica_axis: str | None = None
    partial_gradient: bool = False

    def __post_init__(self) -> None:
        rank = len(self.shape)
        assert len(self.offsets) == len(self.sizes) == len(self.local_shape) == rank, self
        assert self.sizes[1:] == self.local_shape[1:] and self.sizes[0] <= self.local_shape[0], self
        assert all(o >= 0 and o + n <= s for o, n, s in zip(self.offsets, self.sizes, self.shape, strict=True)), self

    @property
    def numel(self) -> int:
        """Real elements, without padding. They are the first ``numel`` of the flattened local tensor."""
        return prod(self.sizes)

    @property
    def is_embedding(self) -> bool:
        """Whether this is the token embedding, which is not decayed unless ``optim.decay_embeddings`` is set."""
        return self.name.endswith("embed_tokens.weight")

    @property
    def is_layer_matrix(self) -> bool:
        """Whether this is a matrix of a layer: neither the embedding nor the output projection."""
        return len(self.shape) == 2 and ".layers." in self.name


@dataclass(frozen=True)
class Slice:
    """Elements ``[start, stop)`` of a shard's real part, flattened row by row, of one ``kind`` of its state.

    ``tensor``: contiguous [stop - start]; read when saving, filled in place when loading. With a ``remainder``, int16
    [stop - start], the elements are fp32, kept as bf16 and the rest (``ops/remainder.py``).
    """

    kind: str
    shard: Shard
    start: int
    stop: int
    tensor: Tensor
    remainder: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype if self.remainder is None else torch.float32

    def read(self) -> Tensor:
        """[stop - start]; with a remainder, a copy."""
        return join(self.tensor, self.remainder)

    def write(self, elements: Tensor, view: Callable[[Tensor], Tensor] = lambda whole: whole) -> None:
        """Fill what ``view`` makes of [stop - start] with ``elements``, which are converted to :attr:`dtype`."""
        split_(elements, view(self.tensor), None if self.remainder is None else view(self.remainder))


def whole(name: str, shape: tuple[int, ...]) -> Shard:
    """The record of a tensor that is not split and has no replicas (other than data-parallel ones)."""
    return Shard(name, shape, (0,) * len(shape), shape, shape)


def split(name: str, shape: tuple[int, ...], dim: int, rank: int, size: int, **replicas: object) -> Shard:
    """The ``rank``-th of ``size`` equal parts along ``dim``.

    In dimension 0 the length need not divide: every part then has ``ceil(shape[0] / size)`` rows, and rows
    beyond the tensor's end are padding. In other dimensions it must divide.
    """
    length = -(-shape[dim] // size)
    start = min(rank * length, shape[dim])
    stop = min(start + length, shape[dim])
    assert dim == 0 or length * size == shape[dim], (name, shape, dim, size)
    replace = lambda values, value: (*values[:dim], value, *values[dim + 1 :])  # noqa: E731
    return Shard(
        name,
        shape,
        replace((0,) * len(shape), start),
        replace(shape, stop - start),
        replace(shape, length),
        **replicas,  # type: ignore[arg-type]
    )


class GradientSink(Protocol):
    """Where a parameter's gradient of a step is summed, in fp32."""

    def add_product(self, left: Tensor, right: Tensor, following: "Sequence[GradientSink]" = ()) -> None:
        """Add leftᵀ right, for left [n, rows] and right [n, columns], to the parameter's first rows.

        ``following``: the sinks of the parameters packed behind it, to which the rows beyond its own belong.
        """

    def add_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Add rows[i], of rows [n, columns], to the parameter's row ids[i], of ids [n]."""

    def finished(self) -> None:
        """One use of the parameter has added all that it has to add in this backward pass."""


class ShardedParameter(nn.Parameter):
    """A parameter with its :class:`Shard`. Values are unspecified until ``model.init`` or a checkpoint fills them.

    ``sink``: where operations add its gradient without autograd, if an optimizer has set one; what autograd computes
    is added there by a hook. ``uses``: in how many places of the stage it is used, each of which reports once per
    backward pass.
    ``pack``: what the parameters that :func:`pack` has joined have in common; None for others.
    """

    shard: Shard
    sink: GradientSink | None
    uses: int
    pack: str | None

    def __new__(cls, shard: Shard, device: torch.device, dtype: torch.dtype) -> "ShardedParameter":
        self = super().__new__(cls, torch.zeros(shard.local_shape, device=device, dtype=dtype), requires_grad=True)
        self.shard, self.sink, self.uses, self.pack = shard, None, 1, None
        return self


def pack(*parameters: ShardedParameter) -> None:
    """Let matrices [rows, columns] of as many columns lie end to end, in this order, wherever an optimizer stores them
    and their gradients: they and these are then one matrix [rows of all, columns] each.

    They are used together, and of one kind. Names, records and checkpoints are as without.
    """
    for parameter in parameters:
        parameter.pack = parameters[0].shard.name


class Block(NamedTuple):
    """A part of a stage that is computed at one go, and the parameters it needs for that."""

    module: nn.Module
    parameters: list[ShardedParameter]
    """Used from when the module is called until another block's is."""
    in_backward: list[ShardedParameter]
    """Those whose values its backward pass reads."""

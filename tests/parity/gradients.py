"""Every parameter's gradient after one step, in float64, from the real processes of a layout; and mutated collectives.

In float64 rounding is 1e-16 and layouts may differ by little more, so that a wrong reduction of the smallest gradient
stands out. Losses over steps cannot show it: one compared with a right and a wrong reduction differed by 1.7e-5 and
2.2e-5.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import megagap.optim.gradient_store
import megagap.parallel.context
import megagap.parallel.contrastive_loss
import megagap.parallel.cross_entropy
import megagap.parallel.projection_norm
import megagap.parallel.tensor
import megagap.training.step
from megagap.config import load_recipe, timeline_of
from megagap.model.compiled import compile_layers
from megagap.model.init import initialise
from megagap.model.llama import build_stages, sharded_parameters
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.collectives import Pending
from megagap.parallel.mesh import Axis
from megagap.parallel.placement import Placement
from megagap.parallel.program import programs_of
from megagap.parallel.schedule import ANY, Order, Schedule
from megagap.process.rendezvous import Process
from megagap.training.datasets import training_data
from megagap.training.mesh import make_mesh
from megagap.training.step import TrainState, compute_gradients
from megagap.training.trainer import make_loader

MODULES = {
    "tensor": megagap.parallel.tensor,
    "context": megagap.parallel.context,
    "contrastive_loss": megagap.parallel.contrastive_loss,
    "cross_entropy": megagap.parallel.cross_entropy,
    "projection_norm": megagap.parallel.projection_norm,
    "gradient_store": megagap.optim.gradient_store,
    "step": megagap.training.step,
}
"""Where gradients are computed by collectives."""

_MAX = dist.ReduceOp.MAX

COLLECTIVES = (
    "all_reduce",
    "all_reduce_async",
    "reduce_scatter_async",
    "all_gather_async",
    "reduce_scatter_flat_async",
    "all_gather_flat_async",
    "pass_on_async",
    "all_to_all_async",
)


@dataclass(frozen=True)
class Part:
    """Elements ``[start, stop)`` of the rectangle of a global tensor that one rank holds."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int
    values: NDArray[np.float64]

    def of(self, whole: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same elements of the whole tensor."""
        rectangle = tuple(slice(first, first + size) for first, size in zip(self.offsets, self.sizes, strict=True))
        return whole[rectangle].reshape(-1)[self.start : self.stop]


@dataclass(frozen=True)
class Mutation:
    """One call of a collective in a step that does nothing, or counts twice, on all ranks that take part in it."""

    site: str
    call: int
    """Which of the calls that the site makes in a step on a rank, from 0."""
    how: str
    """``drop`` or ``double``."""


def gradients(
    rank: int,
    ranks: int,
    recipe: Path,
    overrides: list[str],
    mutation: Mutation | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    placement: Placement | None = None,
    order: Order | None = None,
    backend: str = "inductor",
    bucket_elements: int = 20_000,
) -> tuple[list[Part], Counter[str]]:
    """This rank's gradients of the first step, replicas included, and how often each call site of a collective was
    passed. ``placement`` and ``order`` stand for those of the recipe; ``backend``: of torch.compile."""
    settings = load_recipe(recipe, overrides, ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device(device))
    placement = placement or settings.placement
    stages = build_stages(
        settings.model,
        placement,
        mesh,
        sequence_parallel=bool(settings.parallel.sequence_parallel),
        dtype=dtype,
        recompute=settings.train.recompute,
        context_mode=settings.parallel.context_mode,
    )
    if settings.train.compile:
        compile_layers(stages, backend=backend)
    parameters = sharded_parameters(stages)
    initialise(parameters, settings.model, settings.train.seed)
    _move_from_the_start(parameters)
    blocks = [stage.blocks() for stage in stages]
    optimizer = DistributedOptimizer(parameters, settings.optim, mesh, dtype, bucket_elements, blocks)
    state = TrainState(settings, mesh, placement, stages, optimizer, timeline_of(settings))
    with make_loader(settings, mesh, training_data(settings)) as loader, _mutated(mutation) as calls:
        batch = loader.step(1).to(mesh.device)
        microbatches = len(batch.tokens)
        if order is not None:
            programs = programs_of(Schedule(order, chunks=ANY), placement, microbatches)
            state.programs[microbatches] = programs[mesh.pp.rank]
        _poison(optimizer)
        compute_gradients(state, batch, state.program(microbatches))
    parts = [
        Part(
            part.shard.name,
            part.shard.shape,
            part.shard.offsets,
            part.shard.sizes,
            part.start,
            part.stop,
            part.tensor.to("cpu", torch.float64, copy=True).numpy(),
        )
        for bucket in optimizer.store.buckets
        for part in bucket.slices("gradient", bucket.own_gradient)
    ]
    return parts, calls


def _poison(optimizer: DistributedOptimizer) -> None:
    """What is left of a step before must be overwritten, not added to."""
    for bucket in optimizer.store.buckets:
        if bucket.gradients is None:
            bucket.own_gradient.fill_(torch.nan)
            continue
        for place in bucket.places:
            place.gradient[: place.parameter.shard.sizes[0]] = torch.nan


def _move_from_the_start(parameters: list[Any]) -> None:
    """Gains are not 1 and biases not 0, so that none of them is without effect on another's gradient."""
    for parameter in parameters:
        if len(parameter.shard.shape) == 1:
            first, size = parameter.shard.offsets[0], parameter.shard.sizes[0]
            with torch.no_grad():
                places = torch.arange(first, first + size, dtype=torch.float64, device=parameter.device)
                parameter[:size] += 0.1 * torch.cos(places)


def assembled(parts: list[Part]) -> dict[str, NDArray[np.float64]]:
    """Whole gradients by name. Fails if an element is in no part."""
    whole: dict[str, NDArray[np.float64]] = {}
    for part in parts:
        tensor = whole.setdefault(part.name, np.full(part.shape, np.nan))
        rectangle = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes, strict=True))
        block = tensor[rectangle].reshape(-1)
        block[part.start : part.stop] = part.values
        tensor[rectangle] = block.reshape(part.sizes)
    for name, tensor in whole.items():
        assert not np.isnan(tensor).any(), name
    return whole


def largest_difference(
    results: list[tuple[list[Part], Counter[str]]], expected: dict[str, NDArray[np.float64]]
) -> float:
    """Over all parts of all ranks: the norm of the difference, relative to that of the whole parameter's gradient.

    A gradient that is nothing but rounding (of keys that are alone in their documents) is compared with the others'.
    """
    parts = [part for parts, _ in results for part in parts]
    assert {part.name for part in parts} == set(expected)
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in expected.items()}
    least = 1e-5 * max(norms.values())
    differences = [float(np.linalg.norm(part.values - part.of(expected[part.name]))) for part in parts]
    # One that is not a number must not be lost in max(), which may pass over it.
    scaled = [
        0.0 if difference == 0 else difference / max(norms[part.name], least, float(np.finfo(float).tiny))
        for part, difference in zip(parts, differences, strict=True)
    ]
    return max(scaled, key=lambda value: (np.isnan(value), value))


@contextmanager
def _mutated(mutation: Mutation | None) -> Iterator[Counter[str]]:
    """Count the calls of every collective in :data:`MODULES`, and let one of them go wrong."""
    calls: Counter[str] = Counter()
    replaced: list[tuple[Any, str, Any]] = []
    for short, module in MODULES.items():
        for name in COLLECTIVES:
            if (collective := getattr(module, name, None)) is not None:
                replaced.append((module, name, collective))
                setattr(module, name, _watched(short, name, collective, mutation, calls))
    try:
        yield calls
    finally:
        for module, name, collective in replaced:
            setattr(module, name, collective)


def _watched(
    module: str, name: str, collective: Callable[..., Any], mutation: Mutation | None, calls: Counter[str]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        axis = next(argument for argument in arguments if isinstance(argument, Axis))
        if axis.size == 1:
            return collective(*arguments, **options)
        caller = _caller(inspect.currentframe())
        operation = " MAX" if any(argument is _MAX for argument in arguments) else ""
        site = f"{module}.{caller}: {name}{operation} over {axis.name}"
        number = calls[site]
        calls[site] += 1
        if mutation is None or (mutation.site, mutation.call) != (site, number):
            return collective(*arguments, **options)
        if mutation.how == "drop":
            return _DROPPED[name](*arguments)
        result = collective(*arguments, **options)
        if name.endswith("_flat_async"):
            result.wait()
            arguments[0].mul_(2)
            return None
        return Pending(result.wait().mul_(2)) if isinstance(result, Pending) else result.mul_(2)

    return call


def _caller(frame: FrameType | None) -> str:
    """Where a region's border is crossed, or what else called the collective."""
    assert frame is not None
    while (caller := (frame := frame.f_back).f_code.co_qualname).startswith("Region."):  # type: ignore[union-attr]
        pass
    return caller.removesuffix(".<locals>.<listcomp>")  # which has a frame of its own before Python 3.12


def _own_part(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    return tensor.unflatten(dim, (axis.size, -1)).select(dim, axis.rank).contiguous()


def _copy_own_part(output: Tensor, tensor: Tensor, axis: Axis) -> None:
    output.copy_(_own_part(tensor, axis, 0))


def _repeat_own_part(output: Tensor, tensor: Tensor, axis: Axis) -> None:
    output.copy_(torch.cat([tensor] * axis.size))


_DROPPED: dict[str, Callable[..., Any]] = {
    "all_reduce": lambda tensor, axis, *operation: tensor,
    "all_reduce_async": lambda tensor, axis: Pending(tensor),
    "reduce_scatter_async": lambda tensor, axis, dim: Pending(_own_part(tensor, axis, dim)),
    "all_gather_async": lambda tensor, axis, dim: Pending(torch.cat([tensor] * axis.size, dim)),
    "reduce_scatter_flat_async": _copy_own_part,
    "all_gather_flat_async": _repeat_own_part,
    "pass_on_async": lambda tensor, axis: Pending(tensor),
    "all_to_all_async": lambda tensor, axis: Pending(tensor),
}
"""What is left of each collective without its communication."""

"""What each parameter's gradient is on each mesh axis before it is reduced, and whether the step makes it whole.

The trainer's own step, up to its reduced gradients, runs on every rank of a small model with the layout's structure
(:mod:`.simulation`), in float64, and is compared with that of one process. On an axis, a gradient is

- ``varying``: each rank has its own part of the parameter;
- ``invariant``: the ranks have the same part, and each computes its whole gradient;
- ``partial``: the ranks have the same part, and each computes a share: the shares must be summed.

These are the types of PyTorch's ``spmd_types``, but found by running the step: also inside operations with a backward
pass of their own, and where gradients are added without autograd, which a checker of types does not see.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import torch
from torch import Tensor

from megagap.config import Settings, most_microbatches, timeline_of
from megagap.data.loader import Batch
from megagap.model.init import initialise
from megagap.model.llama import LlamaStage, sharded_parameters, stages_of_recipe
from megagap.ops.document_mask import Documents
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.gradient_store import Bucket
from megagap.optim.resident_blocks import in_backward_pass
from megagap.parallel.context import own_places
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.placement import Placement
from megagap.parallel.shard import Shard
from megagap.planning.simulation import Simulation, SimulationFault
from megagap.training.mesh import make_layout
from megagap.training.step import TrainState, compute_gradients

TOLERANCE = 1e-10
"""Of a difference, relative to the whole gradient's norm: float64 rounds at 1e-16."""

BUCKET_ELEMENTS = 20_000
"""Small, so that a small model has several."""

MANY = 16
"""tp ranks beyond which two stages are examined instead of three."""

REPLICA_AXES = ("tp", "kv", "embedding")
"""Axes along which ranks may hold the same part of a parameter, the widest first; besides ``data``, along which all
do."""

AXES = ("tp", "kv", "embedding", "data")


@dataclass(frozen=True)
class Examined:
    """What one rank has after its step."""

    rank: int
    role: str
    shards: dict[str, Shard]
    local: dict[str, Tensor]
    """Gradients before any reduction over data ranks and replicas, without padding: [numel]."""
    owned: dict[str, tuple[int, Tensor]]
    """The part [start, ..] that the rank has of each reduced gradient."""
    counted: set[str]
    """Parameters whose part this rank, among the ranks with the same, counts in norms and saves."""
    activations: list[tuple[str, int, str, Tensor]]
    """(module, its call on this rank, ``output`` or ``gradient of the output``, values), in the order of the step."""


@dataclass(frozen=True)
class Finding:
    """Why the gradients are not proven."""

    kind: str
    parameter: str | None
    axis: str | None
    site: str | None
    message: str


@dataclass
class GradientTypes:
    """The result; it holds if there are no findings."""

    settings: Settings
    layout: Layout
    """What was examined: the structure of the layout, with few layers, stages and copies."""
    types: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """Role, parameter (layers of a role are alike: ``*``), axis: type."""
    findings: list[Finding] = field(default_factory=list)
    collectives: int = 0
    """Calls that were matched among their members."""
    largest_difference: float = 0.0


def gradient_types(settings: Settings, world_size: int) -> GradientTypes:
    """Examine the step of a recipe on so many ranks."""
    small, layout = reduced(settings, make_layout(settings, world_size))
    result = GradientTypes(small, layout)
    expected = _reference(small, layout)
    simulation = Simulation(layout)
    try:
        ranks = simulation.run(lambda rank, mesh: _step(small, layout, rank, mesh))
    except SimulationFault as fault:
        result.findings.append(Finding("collectives", None, None, None, str(fault)))
        return result
    result.collectives = sum(map(len, simulation.calls.values()))
    for (site, axis), elements in simulation.repeated.items():
        message = f"{site} sums {elements:,} elements over {axis} that are the same on all its ranks: they count twice"
        result.findings.append(Finding("summed twice", None, axis, site, message))
    wrong_activation = _first_wrong_activation(ranks, expected, simulation)
    _check_types(result, ranks, wrong_activation)
    _check_sums(result, ranks, expected, wrong_activation)
    _check_owners(result, ranks, expected)
    if wrong_activation is not None and not result.findings:
        result.findings.append(wrong_activation)
    return result


# -- the examined model


def reduced(settings: Settings, layout: Layout) -> tuple[Settings, Layout]:
    """A small model with the structure of a recipe's, and the layout with at most three stages, four parts of a
    sequence (the smallest divisor of cp, if that is more) and two copies (two parts of two copies, if copies are in
    parts).

    Kept: tp, the heads and how ranks share them, the remainder of the vocabulary, ties, biases, which virtual stages
    have which layers' neighbours (first, middle, last; empty ends), sequence parallelism, the schedule, masks, the mode
    of context parallelism, what is sharded, what is computed again.
    """
    model, parallel, train = settings.model, settings.parallel, settings.train
    pp = min(layout.pp, 3 if layout.tp <= MANY else 2)
    parts = min(layout.dp_replicate, 2)
    dp = parts * min(layout.dp // layout.dp_replicate, 2)
    most_parts = 4 if layout.tp * pp * dp <= 4 else 2
    # A divisor, which divides what cp does: heads, where they are exchanged for tokens.
    divisors = [size for size in range(2, layout.cp + 1) if layout.cp % size == 0]
    cp = max([size for size in divisors if size <= most_parts], default=min(divisors, default=1))
    given = [len(stage.layers) for stage in settings.placement.stages]
    most = 2 if layout.tp * pp * dp * cp <= 8 else 1
    layers = [
        min(count, most)
        for chunk in _chunks(given, layout.pp)
        for count in (chunk if layout.pp == pp else [chunk[0], *chunk[1 : pp - 1], chunk[-1]])
    ]
    tp = layout.tp
    groups = model.num_attention_heads // model.num_key_value_heads
    # Ranks share key/value heads as before; otherwise two of each rank are enough, or as many as the cp ranks divide.
    own = model.num_key_value_heads // tp
    enough = next((n for n in range(min(2, own), own) if groups * n % cp == 0), own)
    keys = model.num_key_value_heads if tp > model.num_key_value_heads else tp * enough
    rows = max(5, 16 // tp)
    vocabulary = model.vocab_size if model.vocab_size <= (rows + 1) * tp else rows * tp + model.vocab_size % tp
    length = min(train.sequence_length, 8 if tp == 1 or 8 % tp else max(8, tp))
    length = length if not parallel.sequence_parallel else max(2, 8 // tp) * tp
    unit = 1 if cp == 1 else lcm(2 * cp, cp * tp if parallel.sequence_parallel else 1)
    length = -(-length // unit) * unit
    batch = min(train.micro_batch_size, 2)
    microbatches = min(most_microbatches(settings, layout.dp), pp + 1)
    small = settings.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "hidden_size": 12,
                    "num_hidden_layers": sum(layers),
                    "num_attention_heads": keys * groups,
                    "num_key_value_heads": keys,
                    "head_dim": 2,
                    "intermediate_size": 3 * tp,
                    "vocab_size": vocabulary,
                    "initializer_range": 0.3,
                }
            ),
            "parallel": parallel.model_copy(
                update={"pp": pp, "cp": cp, "dp_replicate": parts, "layers_per_stage": layers}
            ),
            "data": settings.data.model_copy(update={"phases": []}),
            "train": train.model_copy(
                update={
                    "global_batch_size": batch * microbatches * dp,
                    "batch_ramp": [],
                    "compile": False,
                    "micro_batch_size": batch,
                    "sequence_length": length,
                }
            ),
        }
    )
    return small, make_layout(small, pp * tp * dp * cp)


def _chunks(counts: Sequence[int], ranks: int) -> list[Sequence[int]]:
    """Layers of all virtual stages, by chunk."""
    return [counts[start : start + ranks] for start in range(0, len(counts), ranks)]


def _tokens(settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Random tokens of the global batch [samples, s + 1], and the places in their documents under a mask."""
    train = settings.train
    generator = torch.Generator().manual_seed(1)
    shape = (train.global_batch_size, train.sequence_length + 1)
    tokens = torch.randint(settings.model.vocab_size, shape, generator=generator)
    if not settings.data.document_mask:
        return tokens, None
    starts = torch.rand(shape, generator=generator) < 0.3
    starts[:, 0] = True
    columns = torch.arange(shape[1]).expand(shape)
    return tokens, columns - columns.where(starts, 0).cummax(-1).values


def _batch(settings: Settings, part: int, parts: int) -> Batch:
    tokens, positions = _tokens(settings)
    shape = (-1, settings.train.micro_batch_size, tokens.shape[-1])

    def own(values: Tensor) -> Tensor:
        return values.chunk(parts)[part].reshape(shape).contiguous()

    mine = own(tokens)
    sources = torch.zeros(mine.shape[:2], dtype=torch.int64)
    if positions is None:
        return Batch(mine, sources, 1)
    places = own(positions)
    return Batch(mine, sources, 1, places, [Documents.of(part[:, :-1]) for part in places])


def _step(settings: Settings, layout: Layout, rank: int, mesh: Mesh) -> Examined:
    """One rank's gradients."""
    stages = stages_of_recipe(settings, mesh, torch.float64)
    parameters = sharded_parameters(stages)
    initialise(parameters, settings.model, settings.train.seed)
    for parameter in parameters:
        if len(parameter.shard.shape) == 1:  # gains are not all 1 and biases not 0
            first, size = parameter.shard.offsets[0], parameter.shard.sizes[0]
            with torch.no_grad():
                parameter[:size] += 0.1 * torch.cos(torch.arange(first, first + size, dtype=torch.float64))
    blocks = [stage.blocks() for stage in stages]
    optimizer = DistributedOptimizer(parameters, settings.optim, mesh, torch.float64, BUCKET_ELEMENTS, blocks)
    state = TrainState(settings, mesh, settings.placement, stages, optimizer, timeline_of(settings))
    activations = _watch(stages)
    batch = _batch(settings, mesh.dp.rank, mesh.dp.size)
    program = state.program(len(batch.tokens))
    local = {parameter.shard.name: torch.zeros(parameter.shard.numel, dtype=torch.float64) for parameter in parameters}
    for bucket in optimizer.store.buckets:
        _keep_before_reductions(bucket, local)
    compute_gradients(state, batch, program)
    owned: dict[str, tuple[int, Tensor]] = {}
    counted: set[str] = set()
    for bucket in optimizer.store.buckets:
        if bucket.is_owned:
            counted |= {place.parameter.shard.name for place in bucket.places}
        for part in bucket.slices("gradient", bucket.own_gradient):
            start, values = owned.get(part.shard.name, (part.start, part.tensor[:0]))
            owned[part.shard.name] = (min(start, part.start), torch.cat([values, part.tensor]))
    shards = {parameter.shard.name: parameter.shard for parameter in parameters}
    return Examined(rank, role_of(settings.placement, mesh.pp.rank), shards, local, owned, counted, activations)


def _keep_before_reductions(bucket: Bucket, local: dict[str, Tensor]) -> None:
    """Add this rank's gradients to ``local`` whenever they are reduced: once in a step, or for every microbatch."""
    start_reduction = bucket.start_reduction

    def keep_and_start() -> None:
        # What has not been written to is what clearing it is for, which is left to the code that is examined.
        written = {place.parameter.shard.name for place in bucket.places if place.written}
        for part in bucket.parts_of(bucket.full_gradient()):
            if part.shard.name in written:
                local[part.shard.name][part.start : part.stop] += part.tensor
        start_reduction()

    bucket.start_reduction = keep_and_start  # type: ignore[method-assign]


def role_of(placement: Placement, rank: int) -> str:
    """What a pipeline rank is, by its virtual stages: in a V, one rank has the first and the last."""
    if placement.ranks == 1:
        return "only stage"
    stages = placement.stages_of(rank)
    first, last = any(stage.has_embedding for stage in stages), any(stage.has_head for stage in stages)
    if first and last:
        return "first and last stage"
    return "first stage" if first else "last stage" if last else "middle stage"


def _watch(stages: Sequence[LlamaStage]) -> list[tuple[str, int, str, Tensor]]:
    """Outputs of the modules of the residual stream, and their gradients, as they are computed."""
    seen: list[tuple[str, int, str, Tensor]] = []
    calls: dict[str, int] = defaultdict(int)

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            if in_backward_pass():
                return  # computed again in the backward pass
            y = output[0] if isinstance(output, tuple) else output
            call = calls[name]
            calls[name] += 1
            seen.append((name, call, "output", y.detach().clone()))
            if y.requires_grad:
                y.register_hook(lambda grad: seen.append((name, call, "gradient of the output", grad.detach().clone())))

        module.register_forward_hook(hook)

    for stage in stages:
        if stage.has_embedding:
            watch("embed_tokens", stage.embed_tokens)
        for layer in stage.layers:
            name: str = layer.mlp.down_proj.weight.shard.name  # type: ignore[union-attr, assignment]
            for part, module in layer.named_children():
                watch(f"{name.partition('.mlp.')[0]}.{part}", module)
        if stage.has_head:
            watch("norm", stage.norm)
    return seen


def _reference(settings: Settings, layout: Layout) -> Examined:
    """The same step by one process."""
    model = settings.model
    alone = settings.model_copy(
        update={
            "parallel": settings.parallel.model_copy(
                update={
                    "tp": 1,
                    "pp": 1,
                    "cp": 1,
                    "vpp": 1,
                    "dp_replicate": 1,
                    "layers_per_stage": [model.num_hidden_layers],
                    "sequence_parallel": False,
                    "schedule": "gpipe",
                }
            ),
            "optim": settings.optim.model_copy(update={"zero": 1}),
            "train": settings.train.model_copy(update={"recompute": "none"}),
        }
    )
    return _step(alone, Layout(1), 0, Mesh.single())


# -- findings


def _first_wrong_activation(ranks: Sequence[Examined], expected: Examined, simulation: Simulation) -> Finding | None:
    """The first module along the model whose output is not that of one process, else the last whose gradient is not."""
    right = {(name, call, what): values for name, call, what, values in expected.activations}
    order = list(dict.fromkeys(name for name, *_ in expected.activations))
    layout = simulation.layout
    calls_of_rank = (1 + max((call for _, call, _, _ in expected.activations), default=-1)) // layout.dp
    wrong: dict[str, set[tuple[str, int]]] = {"output": set(), "gradient of the output": set()}
    for examined in ranks:
        mesh = simulation.mesh(examined.rank)
        for name, call, what, values in examined.activations:
            whole = right[name, mesh.dp.rank * calls_of_rank + call, what]
            if layout.cp > 1:
                whole = whole.index_select(1, own_places(mesh.cp, whole.shape[1], whole.device))
            part = whole if whole.shape == values.shape else whole.chunk(layout.tp, 1)[mesh.tp.rank]
            if not _close(values, part, whole.norm()):
                wrong[what].add((name, examined.rank))
    for what, places in wrong.items():
        if places:
            pick = min if what == "output" else max
            name, rank = pick(places, key=lambda place: order.index(place[0]))
            sites = sorted({call.site for axis, _, call in simulation.calls[rank] if axis in ("tp", "kv")})
            message = f"the {what} of {name} is wrong on rank {rank}, {'before' if pick is min else 'after'} any other"
            if sites:
                message += "; collectives over tp are called in " + ", ".join(sites)
            return Finding("activation", None, "tp" if layout.tp > 1 else "pp", name, message)
    return None


def _check_types(result: GradientTypes, ranks: Sequence[Examined], activation: Finding | None) -> None:
    """Find every gradient's type, and compare it with what the parameter's record says."""
    for examined in ranks:
        roles = result.types.setdefault(examined.role, {})
        for name, shard in examined.shards.items():
            if not shard.numel:
                continue  # of a small vocabulary the last tp ranks may have no rows, which is nothing to share
            found = {axis: kind for axis in AXES if (kind := _type_on(result.layout, ranks, examined, name, axis))}
            kinds = roles.setdefault(_general(name), found)
            for axis, kind in found.items():
                if kinds.setdefault(axis, kind) == "invariant" and kind == "partial":
                    kinds[axis] = kind  # equal on some ranks by chance, such as rows that no token has
            _check_record(result, examined, shard, found, activation)


def _type_on(layout: Layout, ranks: Sequence[Examined], examined: Examined, name: str, axis: str) -> str | None:
    members = layout.members(axis, examined.rank)
    if len(members) == 1:
        return None
    others = [ranks[member] for member in members]
    shard = examined.shards[name]
    if any(other.shards.get(name) is None or _part(other.shards[name]) != _part(shard) for other in others):
        return "varying"
    first = others[0].local[name]
    scale = max(float(other.local[name].norm()) for other in others)
    same = all(_close(other.local[name], first, scale) for other in others[1:])
    return "invariant" if same and not (axis == "data" and not scale) else "partial"


def _part(shard: Shard) -> tuple[Any, ...]:
    return shard.shape, shard.offsets, shard.sizes


def _check_record(
    result: GradientTypes, examined: Examined, shard: Shard, found: dict[str, str], activation: Finding | None
) -> None:
    replicated = [axis for axis in REPLICA_AXES if found.get(axis) in ("invariant", "partial")]
    axis = replicated[0] if replicated else None
    partial = axis is not None and found[axis] == "partial"
    where = f"{shard.name} ({examined.role})"
    if _members(result.layout, axis, examined.rank) != _members(result.layout, shard.replica_axis, examined.rank):
        message = f"{where}: its record says that the ranks of {_or_none(shard.replica_axis)} share it; those of "
        message += f"{_or_none(axis)} do"
        _add(result, Finding("replica_axis", shard.name, axis or shard.replica_axis, None, message))
    elif axis is not None and shard.replica_axis is not None and partial != shard.partial_gradient:
        if not partial and not examined.local[shard.name].any():
            return
        message = (
            f"{where}: over {axis} each rank computes only a share of its gradient, but its record has "
            "partial_gradient = False: the shares would not be summed"
            if partial
            else f"{where}: over {axis} every rank computes its whole gradient, but its record has partial_gradient = "
            "True: it would be summed, and count several times"
        )
        site = activation.message if activation is not None else None
        _add(result, Finding("partial_gradient", shard.name, axis, site, message))


def _members(layout: Layout, axis: str | None, rank: int) -> tuple[int, ...]:
    return (rank,) if axis is None else layout.members(axis, rank)


def _check_owners(result: GradientTypes, ranks: Sequence[Examined], expected: Examined) -> None:
    """Every element of every parameter is counted and saved by exactly one rank."""
    owners = {name: torch.zeros(shard.shape, dtype=torch.int64) for name, shard in expected.shards.items()}
    for examined in ranks:
        for name, (start, values) in examined.owned.items():
            if name not in examined.counted:
                continue
            shard = examined.shards[name]
            part = owners[name][tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))]
            flat = part.flatten()
            flat[start : start + len(values)] += 1
            part.copy_(flat.view(part.shape))
    for name, counts in owners.items():
        if counts.min() != 1 or counts.max() != 1:
            least, most = int(counts.min()), int(counts.max())
            message = f"{name}: elements are counted and saved by {least} to {most} ranks instead of 1"
            _add(
                result,
                Finding("ownership", name, expected.shards[name].replica_axis, "optim/gradient_store.py", message),
            )


def _check_sums(
    result: GradientTypes, ranks: Sequence[Examined], expected: Examined, activation: Finding | None
) -> None:
    """Every rank's part of every reduced gradient is that of one process."""
    for examined in ranks:
        for name, (start, values) in examined.owned.items():
            shard = examined.shards[name]
            whole = expected.local[name].view(shard.shape)
            part = whole[tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))]
            right = part.flatten()[start : start + len(values)]
            norm = float(whole.norm())
            difference = float((values - right).norm()) / norm if norm else float((values - right).norm())
            result.largest_difference = max(result.largest_difference, difference)
            if not difference <= TOLERANCE:
                times = _factor(values, right)
                message = f"{name} ({examined.role}, rank {examined.rank}): its gradient after all reductions is " + (
                    f"{times:.3g} times that of one process" if times else f"off by {difference:.1e} of its norm"
                )
                if activation is not None:
                    message += f"; {activation.message}"
                axis = _axis_of(result.layout, ranks, examined, name, values, right)
                site = activation.site if activation is not None else "optim/gradient_store.py"
                _add(result, Finding("gradient", name, axis, site, message))


def _axis_of(
    layout: Layout, ranks: Sequence[Examined], examined: Examined, name: str, values: Tensor, right: Tensor
) -> str | None:
    """The axis whose reduction explains a wrong gradient: one whose size it is off by, or that has a type for it."""
    shard = examined.shards[name]
    if shard.replica_axis is not None and not _factor(values, right):
        return shard.replica_axis
    sizes = {axis: len(layout.members(axis, examined.rank)) for axis in AXES}
    return next((axis for axis, size in sizes.items() if size > 1), None)


def _factor(values: Tensor, right: Tensor) -> float | None:
    """By which constant two gradients differ, if by one."""
    if not right.any() or len(right) < 2:
        return None
    times = float((values * right).sum() / right.square().sum())
    return times if _close(values, right * times, right.norm()) else None


def _close(left: Tensor, right: Tensor, scale: float | Tensor) -> bool:
    return bool((left - right).norm() <= TOLERANCE * scale)


def _add(result: GradientTypes, finding: Finding) -> None:
    """Once for each parameter of all layers and ranks."""
    known = {(other.kind, _general(other.parameter or ""), other.axis) for other in result.findings}
    if (finding.kind, _general(finding.parameter or ""), finding.axis) not in known:
        result.findings.append(finding)


def _general(name: str) -> str:
    """A parameter's name for all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _or_none(axis: str | None) -> str:
    return axis or "no axis"

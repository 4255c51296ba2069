"""The certificate of a layout: what is proven of it, what it takes, and why it does not hold (docs/parallelism.md)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from megagap.config import Settings, timeline_of
from megagap.errors import MegagapError, counted
from megagap.model.shapes import parameter_count
from megagap.parallel.layout import AXES, Layout, Members
from megagap.parallel.program import programs_of
from megagap.parallel.schedule import choose
from megagap.planning.coverage import Holding, coverage_faults, group_faults, group_orders, holdings
from megagap.planning.devices import Device
from megagap.planning.gradient_types import GradientTypes, gradient_types, role_of
from megagap.planning.memory import GIB, KINDS, RESERVE_BYTES, RankMemory, memory_by_stage
from megagap.planning.volume import Volume, volume_by_axis
from megagap.terminal.console import Console
from megagap.training.mesh import make_layout


class LayoutError(MegagapError):
    """A layout is not proven."""

    kind = "layout error"


@dataclass(frozen=True)
class Proof:
    """One of the things that are proven."""

    name: str
    examined: str
    """What was looked at, in words."""
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class Role:
    """The fullest pipeline rank of a role: the only, the first, a middle or the last stage."""

    name: str
    stage: int
    parameters: int
    """On each of its ranks, without padding."""
    memory: RankMemory | None
    """None where what attention keeps depends on the documents."""
    communication: dict[str, Volume]
    """By axis."""


@dataclass(frozen=True)
class Certificate:
    """:meth:`as_dict` is what ``--json`` prints."""

    settings: Settings
    layout: Layout
    device: Device
    roles: list[Role]
    proofs: list[Proof]
    gradients: GradientTypes
    notes: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """Why it does not hold, all of them."""
        return [f"{proof.name}: {fault}" for proof in self.proofs for fault in proof.faults]

    @property
    def holds(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        layout = self.layout
        sizes = {axis: layout.size(axis) for axis in ("pp", "dp", "cp", "tp")}
        return {
            "holds": self.holds,
            "reasons": self.reasons,
            "nearest": [],
            "notes": self.notes,
            "world_size": layout.world_size,
            "layout": sizes,
            "parameters": parameter_count(self.settings.model),
            "device": self.device.key,
            "groups": [
                {"axis": axis, "groups": len(groups), "ranks_each": max(map(len, groups))}
                for axis, groups in all_groups(layout).items()
            ],
            "roles": [self._role(role) for role in self.roles],
            "proofs": [
                {"name": proof.name, "holds": proof.holds, "examined": proof.examined, "faults": list(proof.faults)}
                for proof in self.proofs
            ],
            "gradient_types": self.gradients.types,
            "recipe": self.settings.model_dump(mode="json"),
        }

    def _role(self, role: Role) -> dict[str, Any]:
        return {
            "role": role.name,
            "stage": role.stage,
            "parameters": role.parameters,
            "memory": None if role.memory is None else role.memory.as_dict(self.device),
            "communication": {axis: vars(volume) for axis, volume in role.communication.items()},
        }


def certify(settings: Settings, device: Device, world_size: int, device_must_fit: bool = False) -> Certificate:
    """Prove what can be proven of a recipe on so many ranks; nothing is written and no process group made.

    ``device_must_fit``: whether a rank that takes more memory than the device has is a reason against the layout,
    else it is a note.
    """
    layout = make_layout(settings, world_size)
    held = holdings(settings, layout)
    notes: list[str] = []
    stages: list[RankMemory] = []
    try:
        stages = memory_by_stage(settings, device, world_size)
    except MegagapError as error:
        notes.append(str(error.args[0]))
    roles = list(_roles(settings, layout, held, stages))
    gradients = gradient_types(settings, world_size)
    proofs = [
        *_gradient_proofs(gradients, settings.train.compile),
        _schedule(settings, layout),
        _coverage(settings, layout, held),
        _groups(layout),
    ]
    full = [_too_full(role, device) for role in roles if role.memory is not None and role.memory.fits(device) is False]
    if device_must_fit:
        proofs.append(Proof("memory", f"the formula, for the fullest rank of each role on {device.key}", tuple(full)))
    else:
        notes += full
    return Certificate(settings, layout, device, roles, proofs, gradients, notes)


def _roles(settings: Settings, layout: Layout, held: Sequence[Holding], stages: Sequence[RankMemory]) -> Iterator[Role]:
    by_role: dict[str, list[int]] = {}
    for stage in range(layout.pp):
        by_role.setdefault(role_of(settings.placement, stage), []).append(stage)
    first = {layout.coordinates(holding.rank)["pp"]: holding for holding in reversed(held)}
    for name, members in by_role.items():
        stage = max(members, key=lambda stage: stages[stage].total if stages else first[stage].parameters)
        communication = volume_by_axis(settings, layout, stage)
        yield Role(name, stage, first[stage].parameters, stages[stage] if stages else None, communication)


def _too_full(role: Role, device: Device) -> str:
    assert role.memory is not None
    return (
        f"the {role.name} takes {role.memory.total / GIB:.1f} GiB on each rank, and {RESERVE_BYTES / GIB:g} are left "
        f"for what is not counted: {device.key} has {device.memory_gib:g}"
    )


def _gradient_proofs(gradients: GradientTypes, compiles: bool) -> Iterator[Proof]:
    """``compiles``: whether the recipe does; the examined step never does."""
    layout = gradients.layout
    sizes = ", ".join(f"{axis} {layout.size(axis)}" for axis in ("pp", "dp", "cp", "tp"))
    model = gradients.settings.model
    examined = (
        f"the step of {counted(layout.world_size, 'rank')} ({sizes}) in one process, of a small model with "
        f"{counted(model.num_hidden_layers, 'layer')} and a vocabulary of {model.vocab_size}, in float64: every "
        "gradient before and after its reductions against one process"
    )
    if compiles:
        examined += "; examined without compiling its layers (train.compile)"
    yield Proof("gradients", examined, tuple(f.message for f in gradients.findings if f.kind != "collectives"))
    examined = f"{counted(gradients.collectives, 'call')} of that step, each matched among all members of its group"
    yield Proof("collectives", examined, tuple(f.message for f in gradients.findings if f.kind == "collectives"))


def _schedule(settings: Settings, layout: Layout) -> Proof:
    train = settings.train
    name, _ = choose(settings.parallel.schedule, settings.parallel.vpp)
    batches = {stretch.batch_size for stretch in timeline_of(settings).stretches}
    counts = sorted(batch // (train.micro_batch_size * layout.dp) for batch in batches)
    faults = []
    for microbatches in counts:
        try:
            programs_of(settings.schedule, settings.placement, microbatches)
        except AssertionError as error:
            faults.append(f"{name} with {counted(microbatches, 'microbatch', 'microbatches')}: {error}")
    *fewer, most = counts
    numbers = ", ".join(f"{few:,}" for few in fewer) + " and " * bool(fewer)
    ranks = counted(layout.pp, "stage") if settings.placement.chunks == 1 else counted(layout.pp, "pipeline rank")
    chunks = "" if settings.placement.chunks == 1 else f" of {settings.placement.chunks} virtual stages"
    examined = f"{name} on {ranks}{chunks} with {numbers}{counted(most, 'microbatch', 'microbatches')}"
    return Proof("schedule", f"{examined}: order, matching transfers, live activations, no deadlock", tuple(faults))


def _coverage(settings: Settings, layout: Layout, held: Sequence[Holding]) -> Proof:
    examined = (
        f"the parameters of {counted(len(held), 'pipeline and tensor-parallel rank')}, and their slices on "
        f"{counted(layout.size('shard') if settings.optim.zero else 1, 'data-parallel rank')}"
        + (f", of which {copies:,} have each" if (copies := _copies(settings, layout)) > 1 else "")
        + ": each element has one owner"
    )
    return Proof("coverage", examined, tuple(coverage_faults(settings, layout, held)))


def _copies(settings: Settings, layout: Layout) -> int:
    """Data-parallel ranks that have the same slice of every bucket."""
    return layout.size("replicate" if settings.optim.zero else "data")


def _groups(layout: Layout) -> Proof:
    orders = group_orders(layout)
    made_of = all_groups(layout)
    groups = sum(len(members) for members in made_of.values())
    made = f"{counted(groups, 'group')} of {counted(len(made_of), 'axis', 'axes')}"
    examined = f"{made}, made by {counted(layout.world_size, 'rank')} in one order"
    return Proof("groups", examined, tuple(group_faults(layout.world_size, orders)))


# -- for people


def show(certificate: Certificate, console: Console) -> None:
    """Print the tables and what is proven."""
    layout = certificate.layout
    sizes = " · ".join(f"{axis} {layout.size(axis)}" for axis in ("pp", "dp", "cp", "tp"))
    parameters = counted(parameter_count(certificate.settings.model), "parameter")
    title = f"{parameters} on {counted(layout.world_size, 'process', 'processes')}: {sizes}"
    console.print(title, style="bold", soft_wrap=True)
    console.print(roles_table(certificate))
    console.print(groups_table(layout))
    for proof in certificate.proofs:
        console.print(
            f"{'holds' if proof.holds else 'FAILS'}  {proof.name}: {proof.examined}", highlight=False, soft_wrap=True
        )
    for note in certificate.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def roles_table(certificate: Certificate) -> Table:
    """A row for the fullest rank of each role."""
    axes = [axis for axis in AXES if any(axis in role.communication for role in certificate.roles)]
    table = Table(
        "role",
        "stage",
        "parameters",
        *KINDS,
        "total",
        *(f"{axis} sent" for axis in axes),
        caption=f"memory by kind in GiB on {certificate.device.key}; sent by each rank in a step, in GiB",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for role in certificate.roles:
        memory = role.memory
        sizes = [f"{getattr(memory, kind) / GIB:.2f}" if memory else "?" for kind in (*KINDS, "total")]
        sent = [f"{role.communication[axis].sent / GIB:.2f}" if axis in role.communication else "" for axis in axes]
        table.add_row(role.name, str(role.stage), f"{role.parameters:,}", *sizes, *sent)
    return table


def all_groups(layout: Layout) -> dict[str, tuple[Members, ...]]:
    """The world's group and those of :attr:`Layout.divisions`."""
    world = {"world": (tuple(range(layout.world_size)),)} if layout.world_size > 1 else {}
    return {**world, **layout.divisions}


def groups_table(layout: Layout) -> Table:
    """The groups that are made, in this order. Axes with the same members share them."""
    table = Table("axis", "groups", "ranks in each")
    for axis, groups in all_groups(layout).items():
        sizes = sorted(set(map(len, groups)), reverse=True)  # middle stages are alone in ``embedding``
        table.add_row(axis, f"{len(groups):,}", " or ".join(f"{size:,}" for size in sizes))
    return table

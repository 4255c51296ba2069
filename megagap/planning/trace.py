"""Traces the trainer's own step of a recipe on a device that is not present, and predicts its cost."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from megagap.benchmark.step import batches, first_step, missing_data, random_batch
from megagap.config import Settings
from megagap.data.loader import Batch
from megagap.errors import ConfigError, DataError
from megagap.files import write_bytes, writing
from megagap.model.flops import flops_per_token
from megagap.ops import compiled
from megagap.ops.arithmetic import deterministic_kernels
from megagap.optim.precision import PRECISIONS
from megagap.parallel.mesh import Mesh
from megagap.planning.devices import DTYPES, Device
from megagap.planning.pretend import PinnedMemory, pretending
from megagap.planning.recording import KINDS, HostSync, Operation, Recorder
from megagap.planning.roofline import cost
from megagap.process.rendezvous import Process
from megagap.timeline import Moment
from megagap.training.mesh import make_mesh
from megagap.training.step import train_step
from megagap.training.trainer import build_state

OUTPUT_AND_LOSS = {"parallel/cross_entropy.py", "parallel/contrastive_loss.py"}


@dataclass
class Total:
    """The total cost of some operations."""

    kernels: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, operation: Operation, device: Device) -> None:
        price = cost(operation, device)
        self.kernels += price.kernels
        self.flops += operation.work.flops
        self.bytes += operation.bytes
        self.seconds += price.seconds


@dataclass(frozen=True)
class Trace:
    """One step of one rank, in the steady state; :meth:`as_dict` is what ``--json`` prints."""

    settings: Settings
    moment: Moment
    """The run's first step: others of its phase are like it."""
    device: Device
    world_size: int
    operations: list[Operation]
    host_syncs: list[HostSync]
    peak_memory_bytes: int
    static_memory_bytes: int
    """Parameters, masters, moments and gradients: what is kept between steps."""

    @property
    def total(self) -> Total:
        return self._totals(lambda _: "all").get("all", Total())

    @property
    def step_seconds(self) -> float:
        return self.total.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.moment.tokens / self.step_seconds

    @property
    def mfu(self) -> dict[str, float] | None:
        """Of the data sheet's peak for the dtype; None where the file names none."""
        peak = self.device.peak_tflops.get(DTYPES[PRECISIONS[self.settings.train.precision].compute])
        if peak is None:
            return None
        flops = flops_per_token(self.settings.model, self.moment.sequence_length)
        per_device = self.tokens_per_second / self.world_size / (peak * 1e12)
        return {"full": flops.full * per_device, "causal": flops.causal * per_device}

    def by_kind(self) -> dict[str, Total]:
        """Every kind, including those that do not occur in the step."""
        totals = self._totals(lambda operation: operation.kind)
        return {kind: totals.get(kind, Total()) for kind in KINDS}

    def by_call_site(self) -> dict[tuple[str, str, str, str], Total]:
        """By (kind, file:line, operation, shapes), the longest first."""
        totals = self._totals(lambda x: (x.kind, x.site, x.name, x.shapes))
        return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))

    def within(self, files: set[str]) -> Total:
        """All that some files of megagap call, such as :data:`OUTPUT_AND_LOSS`."""
        return self._totals(lambda operation: not files.isdisjoint(operation.files)).get(True, Total())

    def assumptions(self) -> list[str]:
        lines = [f"{self.device.key}: {line}" for line in self.device.assumptions()]
        lines.append(
            "nothing overlaps: kernels follow each other, and the host is always ahead of the device, which for small "
            "models it is not"
        )
        if self.world_size > 1:
            lines.append(
                f"rank 0 of {self.world_size}; collectives move a ring's share of the bytes at "
                f"{self.device.link_gb:g} GB/s within {self.device.node} devices, at {self.device.network_gb:g} per "
                "device beyond, and are not hidden behind computation"
            )
        if not compiled.AVAILABLE:
            lines.append("megagap's kernels are not built here (or MEGAGAP_OPS=plain): plain torch was traced")
        return lines

    def as_dict(self) -> dict[str, Any]:
        total = self.total
        return {
            "device": self.device.key,
            "flops": total.flops,
            "flops_with_recomputation": total.flops + sum(x.work.recomputed_flops for x in self.operations),
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "host_syncs": len(self.host_syncs),
            "host_sync_sites": [vars(sync) for sync in self.host_syncs],
            "peak_memory_bytes": self.peak_memory_bytes,
            "static_memory_bytes": self.static_memory_bytes,
            "kernels": total.kernels,
            "by_kind": [{"kind": kind, **vars(part)} for kind, part in self.by_kind().items()],
            "output_and_loss": vars(self.within(OUTPUT_AND_LOSS)),
            "by_call_site": [
                {"kind": kind, "site": site, "operation": name, "shapes": shapes, **vars(part)}
                for (kind, site, name, shapes), part in self.by_call_site().items()
            ],
            "world_size": self.world_size,
            "assumptions": self.assumptions(),
            "recipe": self.settings.model_dump(mode="json"),
        }

    def _totals(self, key: Any) -> dict[Any, Total]:
        totals: dict[Any, Total] = {}
        for operation in self.operations:
            totals.setdefault(key(operation), Total()).add(operation, self.device)
        return totals


def trace_step(settings: Settings, device: Device, world_size: int = 1) -> Trace:
    """Trace the second step of rank 0, without the one-time work of a first step, and without torch.compile.

    Raises :class:`ConfigError` for what cannot be traced: pipeline stages, which wait for each other, a document mask
    without the data that it follows from, an operation whose result torch cannot know without values.
    """
    if settings.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp = {settings.parallel.cp}: ranks wait for keys of each other, which a trace of one does "
            "not show\n  trace --parallel.cp 1, with sequences as long as a rank's part; its memory alone: --memory."
        )
    if settings.parallel.pp > 1:
        raise ConfigError(
            f"parallel.pp = {settings.parallel.pp}: a stage waits for its neighbours, which a trace of one rank does "
            "not show\n  trace --parallel.pp 1, with as many layers as a stage has; its memory alone: --memory."
        )
    first = first_step(settings)
    pinned = PinnedMemory()
    recorder = Recorder(device.kind != "cpu", pinned)
    with _fake_groups(world_size), deterministic_kernels(settings.train.deterministic):
        mesh = make_mesh(settings, Process(0, world_size, 0, min(world_size, device.node)), device.torch_device)
        host_batch = _host_batch(settings, mesh, first)
        with pretending(device, pinned, recorder.host_sync), recorder:
            state = build_state(_uncompiled(settings), mesh)
            batch = host_batch.to(mesh.device)
            train_step(state, batch, lambda: (False, False))
            static = recorder.memory.live
            with recorder.recording():
                train_step(state, batch, lambda: (False, False))
    operations, host_syncs, peak = recorder.operations, recorder.host_syncs, recorder.memory.peak
    return Trace(settings, first, device, world_size, operations, host_syncs, peak, static)


def _uncompiled(settings: Settings) -> Settings:
    """A trace sees each operation as it is called. What torch.compile makes of some of them is not modelled."""
    train = settings.train.model_copy(update={"compile": False})
    return settings.model_copy(update={"train": train})


def _host_batch(settings: Settings, mesh: Mesh, first: Moment) -> Batch:
    """Random tokens; the recipe's data where the documents in it decide what is computed."""
    if not settings.data.document_mask:
        return random_batch(settings, mesh, first)
    if (missing := missing_data(settings)) is not None:
        raise ConfigError(
            f"data.document_mask = true: the cost of attention depends on the documents, and {missing}\n"
            "  name data that exists, or trace --data.document_mask false."
        )
    with batches(settings, mesh, first) as next_batch:
        return next_batch(first.step)


@contextmanager
def _fake_groups(world_size: int) -> Iterator[None]:
    """Process groups of one process that acts as rank 0 of many, whose collectives do nothing."""
    if world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        dist.destroy_process_group()


def kinds_table(trace: Trace) -> Table:
    """For a person: what each kind takes, and the step."""
    table = Table("kind", "kernels", "TFLOP", "GB moved", "ms", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    total = trace.total
    for kind, part in trace.by_kind().items():
        if part.kernels:
            table.add_row(kind, *_cells(part), f"{part.seconds / total.seconds:.1%}")
    table.add_row("all", *_cells(total), "", style="bold")
    return table


def sites_table(trace: Trace, most: int) -> Table:
    """The call sites that take longest."""
    table = Table("call site", "operation", "shapes", "kind", "kernels", "TFLOP", "GB moved", "ms")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[4:]:
        column.justify = "right"
    for (kind, site, name, shapes), part in list(trace.by_call_site().items())[:most]:
        table.add_row(site, name, shapes, kind, *_cells(part))
    return table


def summary(trace: Trace) -> list[str]:
    """The step in a few lines."""
    memory = f"peak memory {trace.peak_memory_bytes / 2**30:.2f} GiB"
    if trace.device.memory_gib:
        memory += f" of {trace.device.memory_gib:g}"
        if trace.peak_memory_bytes > trace.device.memory_gib * 2**30:
            memory += ": more than the device has"
    mfu = trace.mfu
    share = (
        "MFU unknown: no peak in the data sheet"
        if mfu is None
        else f"MFU {mfu['full']:.1%} full attention matrix, {mfu['causal']:.1%} causal half"
    )
    output = trace.within(OUTPUT_AND_LOSS)
    syncs = "no host synchronisation" if not trace.host_syncs else f"host synchronisations: {len(trace.host_syncs)}"
    return [
        f"predicted step {trace.step_seconds:.4f} s, {trace.tokens_per_second:,.0f} tokens per second, {share}",
        f"{memory}; {trace.static_memory_bytes / 2**30:.2f} GiB between steps",
        f"output projection and loss together {output.seconds * 1e3:.1f} ms; {syncs}",
        *(f"  {sync.site}: {sync.what}" for sync in trace.host_syncs),
    ]


def draw(trace: Trace, output: Path) -> None:
    """One bar per kind. Raises :class:`DataError` if the file's ending is not an image format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = sorted(
        ((kind, part) for kind, part in trace.by_kind().items() if part.kernels), key=lambda item: item[1].seconds
    )
    figure = Figure(figsize=(9, 0.5 * len(parts) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    milliseconds = [1e3 * part.seconds for _, part in parts]
    bars = axes.barh([kind for kind, _ in parts], milliseconds, color="tab:blue")
    labels = [
        f" {ms:.1f} ms, {ms / (1e3 * trace.step_seconds):.1%}, {part.kernels:,} kernels"
        for ms, (_, part) in zip(milliseconds, parts, strict=True)
    ]
    axes.bar_label(bars, labels, padding=2)
    axes.set_xlim(0, max(milliseconds) * 1.45)
    axes.set_xlabel("ms per step")
    axes.set_title(f"{title(trace)}\n{summary(trace)[0]}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    image = io.BytesIO()
    try:
        figure.savefig(image, format=output.suffix[1:] or "png", dpi=150)
    except ValueError as error:
        raise DataError(f"cannot draw {output}: {error}") from None
    with writing(output):
        write_bytes(output, image.getvalue())


def title(trace: Trace) -> str:
    """What was traced."""
    train = trace.settings.train
    ranks = f", rank 0 of {trace.world_size}" if trace.world_size > 1 else ""
    return (
        f"predicted step on {trace.device.key}{ranks}: {trace.moment.samples} sequences of "
        f"{trace.moment.sequence_length:,} tokens, {train.precision}"
    )


def _cells(part: Total) -> tuple[str, ...]:
    return f"{part.kernels:,}", f"{part.flops / 1e12:.2f}", f"{part.bytes / 1e9:.2f}", f"{part.seconds * 1e3:.2f}"

"""What a run will read, before it runs: tokens, epochs and shares by phase and source."""

from pathlib import Path
from typing import Any

from rich.table import Table

from megagap.data.mixture import Mixture
from megagap.data.samples import TrainingData
from megagap.files import make_folder, written_by_library
from megagap.timeline import Phase

TOLERANCE = 1e-3
"""How far weights that are shares may be from adding up to 1."""


def unnormalised_weights(phase: Phase) -> str:
    """A warning with a table of effective shares if the weights seem to be shares and do not add up; else empty.

    If all weights are 1 or more, they are taken as ratios, as in 3 : 2 : 1.
    """
    weights = [source.weight for source in phase.sources]
    if len(weights) == 1 or abs(sum(weights) - 1) <= TOLERANCE or min(weights) >= 1:
        return ""
    width = max(len(source.name) for source in phase.sources)
    lines = [
        f"  {source.name:<{width}}  weight {source.weight:<10g} share {source.weight / sum(weights):.4f}"
        for source in phase.sources
    ]
    total = f"{sum(weights):g}"
    head = f"the weights of phase {phase.name} add up to {total}, not 1: was one left unscaled? They are used as:"
    return "\n".join([head, *lines])


def mixture_plan(data: TrainingData) -> dict[str, Any]:
    """Of the whole run: ``{"phases": […], "sources": […]}``.

    A phase has ``name``, ``first_step``, ``last_step``, ``sequence_length``, ``samples``, ``tokens`` and ``sources``;
    each of these ``source``, ``weight``, ``share`` (of the phase's tokens), ``samples``, ``tokens``, ``epochs`` (read
    in the phase) and ``total_epochs`` (read by its end). A source has ``source``, ``size`` (tokens in its part of the
    split), ``tokens`` and ``epochs`` over the whole run. Samples that are skipped are not counted.
    """
    size = {source.source.name: source.token_count for source in data.sources}
    read = dict.fromkeys(data.names, 0)
    timeline, phases = data.timeline, []
    assert timeline.steps is not None, "the run has no end"
    for phase in timeline.phases:
        is_last = phase is timeline.phases[-1]
        first_step = timeline.first_step(phase)
        last_step = timeline.steps if is_last else min(timeline.steps, timeline.last_step(phase))
        if last_step < first_step:
            break
        first, end = timeline.at(first_step).first_sample, timeline.at(last_step).consumed_samples
        samples = _drawn_between(data, first, end)
        tokens = {name: count * phase.sequence_length for name, count in samples.items()}
        for name in read:
            read[name] += tokens[name]
        total = sum(tokens.values())
        shares = Mixture([source.weight for source in phase.sources]).shares
        phases.append(
            {
                "name": phase.name,
                "first_step": first_step,
                "last_step": last_step,
                "sequence_length": phase.sequence_length,
                "samples": end - first,
                "tokens": total,
                "sources": [
                    {
                        "source": source.name,
                        "weight": source.weight,
                        "share": share,
                        "samples": samples[source.name],
                        "tokens": tokens[source.name],
                        "epochs": tokens[source.name] / (size[source.name] - 1),
                        "total_epochs": read[source.name] / (size[source.name] - 1),
                    }
                    for source, share in zip(phase.sources, shares, strict=True)
                ],
            }
        )
    sources = [
        {"source": name, "size": size[name], "tokens": read[name], "epochs": read[name] / (size[name] - 1)}
        for name in data.names
    ]
    return {"phases": phases, "sources": sources}


def _drawn_between(data: TrainingData, first: int, last: int) -> dict[str, int]:
    """Samples of each source at positions ``first … last - 1``, skipped numbers left out."""
    counts = dict.fromkeys(data.names, 0)
    for start, stop in data.numbers.runs(first, last):
        for name, before, now in zip(data.names, data.order.drawn(start), data.order.drawn(stop), strict=True):
            counts[name] += now - before
    return counts


def mixture_plan_table(plan: dict[str, Any]) -> Table:
    """For a person; ``plan`` as :func:`mixture_plan` returns it."""
    table = Table(title="what the run will read")
    table.add_column("phase")
    table.add_column("steps", justify="right")
    table.add_column("length", justify="right")
    table.add_column("source")
    for name in ("share", "tokens", "epochs", "epochs so far"):
        table.add_column(name, justify="right")
    for phase in plan["phases"]:
        steps = f"{phase['first_step']:,} to {phase['last_step']:,}"
        head = (phase["name"], steps, f"{phase['sequence_length']:,}")
        for i, source in enumerate(phase["sources"]):
            table.add_row(
                *(head if i == 0 else ("", "", "")),
                source["source"],
                f"{source['share']:.2%}",
                f"{source['tokens']:,}",
                f"{source['epochs']:.3f}",
                f"{source['total_epochs']:.3f}",
            )
        table.add_row("", "", "", "all sources", "", f"{phase['tokens']:,}", "", "", end_section=True)
    for source in plan["sources"]:
        table.add_row("whole run", "", "", source["source"], "", f"{source['tokens']:,}", "", f"{source['epochs']:.3f}")
    return table


def draw_mixture_plan(plan: dict[str, Any], output: str | Path) -> None:
    """A PNG: each phase's shares over the tokens of the run, and below how often each source has been read by then.

    Raises :class:`DataError` if it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [source["source"] for source in plan["sources"]]
    palette = colormaps["tab20" if len(names) > 10 else "tab10"]
    colour = {name: palette(i % palette.N) for i, name in enumerate(names)}
    unit, label = _unit(sum(phase["tokens"] for phase in plan["phases"]))
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    shares, epochs = figure.subplots(2, 1, sharex=True)
    reached = {name: [(0.0, 0.0)] for name in names}
    start = 0.0
    for phase in plan["phases"]:
        width = phase["tokens"] / unit
        height = 0.0
        for source in phase["sources"]:
            name, share = source["source"], source["share"]
            shares.bar(start, share, width, height, align="edge", color=colour[name], edgecolor="white", linewidth=0.5)
            height += share
            reached[name] += [(start, reached[name][-1][1]), (start + width, source["total_epochs"])]
        text = f"{phase['name']}\n{phase['sequence_length']:,} tokens per sequence"
        shares.annotate(text, (start + width / 2, 1.01), ha="center", va="bottom", fontsize=8, annotation_clip=False)
        for axes in (shares, epochs):
            axes.axvline(start, color="0.6", linewidth=0.6)
        start += width
    for name, points in reached.items():
        points.append((start, points[-1][1]))
        epochs.plot(*zip(*points, strict=True), color=colour[name], label=name, linewidth=1.8)
    highest = max(points[-1][1] for points in reached.values())
    for epoch in range(1, min(int(highest), 20) + 1):
        epochs.axhline(epoch, color="0.85", linewidth=0.6, zorder=0)
    shares.set(ylabel="share of the phase", ylim=(0, 1), xlim=(0, start or 1))
    epochs.set(ylabel="epochs read", xlabel=f"tokens of the run{label}", ylim=(0, None))
    figure.legend(*epochs.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    make_folder(Path(output).parent)
    with written_by_library(output) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _unit(tokens: int) -> tuple[float, str]:
    for size, name in ((1e12, "10¹²"), (1e9, "10⁹"), (1e6, "10⁶")):
        if tokens >= size:
            return size, f", {name}"
    return 1.0, ""

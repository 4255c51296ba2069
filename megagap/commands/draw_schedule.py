"""Draw a pipeline schedule, or what a run's pipeline really did: when each rank computes what, and when it waits."""

import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from megagap.commands.parser import make_parser
from megagap.errors import DataError, counted, library_errors, printable
from megagap.files import write_bytes, writing
from megagap.observe.spans import MeasuredStep, Span, read_step
from megagap.parallel.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megagap.parallel.program import Timed, actions_of, bubble_fraction, peak_live_activations, programs_of, timeline
from megagap.parallel.schedule import SCHEDULES
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = f"""schedules: {", ".join(SCHEDULES)} (docs/schedules.md compares them)

examples:
  megagap draw-schedule 1f1b --stages 4 --microbatches 8
  megagap draw-schedule interleaved --stages 4 --microbatches 8 --chunks 2 --output interleaved.png
  megagap draw-schedule zb-h1 --stages 8 --microbatches 32 --json
  megagap draw-schedule --run runs/pipeline --step 20

F is a forward, B a backward, I and W its two halves: the input's gradient, and the deferred one of the weights. The
number is the microbatch, a letter behind it the chunk. A backward takes twice as long as a forward, each half as long
as one, and transfers take no time. --run draws measured times instead, of a run that was trained with run.spans = true.
"""

MOST_ACTIONS = 50_000
"""Microbatches on virtual stages: more take longer than some seconds to prove and draw."""
MOST_IN_DETAIL = 2_000
"""Actions in an image that shows each with its number; of more, none would be readable."""

KINDS: dict[type[Compute], tuple[str, str, str]] = {
    Forward: ("F", "blue", "tab:blue"),
    Backward: ("B", "green", "tab:green"),
    BackwardInput: ("I", "cyan", "tab:olive"),
    BackwardWeight: ("W", "yellow", "tab:orange"),
}
"""Of each kind of action: letter, and its colours in the terminal and in the image."""

NAMES: dict[str, type[Compute]] = {
    "forward": Forward,
    "backward": Backward,
    "backward_input": BackwardInput,
    "backward_weight": BackwardWeight,
}
"""Of the kinds, in spans and in JSON."""


@dataclass(frozen=True)
class Picture:
    """What is drawn: every rank's actions in time."""

    title: str
    rows: Sequence[Sequence[Timed]]
    chunks: int
    unit: float
    """What is one unit of the time axis; of measured times, which have none, 0."""

    @property
    def bubble(self) -> float:
        return bubble_fraction(self.rows)

    @property
    def peaks(self) -> list[int]:
        return [peak_live_activations(timed.action for timed in row) for row in self.rows]

    @property
    def start(self) -> float:
        return min(row[0].start for row in self.rows)

    @property
    def makespan(self) -> float:
        return max(row[-1].end for row in self.rows) - self.start

    def label(self, action: Compute) -> str:
        return f"{KINDS[type(action)][0]}{action.microbatch}{chunk_letter(action.chunk) if self.chunks > 1 else ''}"

    def summary(self) -> list[str]:
        live = ", ".join(map(str, self.peaks))
        return [f"bubble: {self.bubble:.1%} of the time, mean over the ranks", f"live activations at most: {live}"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "bubble_fraction": self.bubble,
            "peak_live_activations": self.peaks,
            "makespan": self.makespan,
            "ranks": [[action_record(timed, self.start) for timed in row] for row in self.rows],
        }


def chunk_letter(chunk: int) -> str:
    return chr(ord("a") + chunk) if chunk < 26 else f"({chunk})"


def action_record(timed: Timed, origin: float) -> dict[str, Any]:
    name = next(name for name, kind in NAMES.items() if isinstance(timed.action, kind))
    place = {"microbatch": timed.action.microbatch, "chunk": timed.action.chunk}
    return {"action": name, **place, "start": timed.start - origin, "end": timed.end - origin}


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("draw-schedule", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("schedule", nargs="?", metavar="SCHEDULE", choices=SCHEDULES, help=", ".join(SCHEDULES))
    parser.add_argument("--stages", type=int, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="M", help="microbatches of a step, of one data rank")
    parser.add_argument("--chunks", type=int, metavar="V", help="virtual stages per rank (what the schedule needs)")
    parser.add_argument("--run", type=Path, metavar="RUN", help="draw the measured times of this run directory")
    parser.add_argument("--step", type=int, metavar="N", help="of that run (the last one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a drawing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="image to write, or folder for schedule.png")
    options = parser.parse_args(arguments)
    described, picture = of_run(parser, options) if options.run else of_schedule(parser, options)
    if options.output:
        output = options.output / "schedule.png" if options.output.is_dir() else options.output
        draw_image(picture, output if output.suffix else output.with_name(f"{output.name}.png"))
    if options.json:
        print(json.dumps(described | picture.as_dict()))
        return
    console = Console()
    console.print(picture.title, style="bold", soft_wrap=True)
    for line in drawing(picture, console.width if sys.stdout.isatty() else None):
        console.print(line, soft_wrap=True)
    for text in picture.summary():
        console.print(text, highlight=False, soft_wrap=True)


def of_schedule(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[dict[str, Any], Picture]:
    """The schedule that is asked for, proven; ends the process for arguments that do not fit."""
    if options.schedule is None or options.stages is None or options.microbatches is None:
        parser.error("give a SCHEDULE with --stages and --microbatches, or --run RUN for measured times")
    if options.step is not None:
        parser.error("--step applies to --run only")
    schedule, stages, microbatches = SCHEDULES[options.schedule], options.stages, options.microbatches
    chunks = schedule.default_chunks if options.chunks is None else options.chunks
    if min(stages, microbatches, chunks) < 1:
        parser.error("--stages, --microbatches and --chunks must be at least 1")
    if chunks not in schedule.chunks:
        others = ", ".join(name for name, other in SCHEDULES.items() if chunks in other.chunks)
        parser.error(f"--chunks {chunks}: {options.schedule} has {schedule.chunks[0]} per rank; for {chunks}: {others}")
    if stages * microbatches * chunks > MOST_ACTIONS:
        parser.error(f"--stages × --microbatches × --chunks must be at most {MOST_ACTIONS:,}")
    placement = schedule.place([1] * stages * chunks, chunks)
    programs_of(schedule, placement, microbatches)  # which proves them
    rows = timeline(actions_of(schedule, placement, microbatches), placement)
    asked = {"schedule": options.schedule, "stages": stages, "microbatches": microbatches, "chunks": chunks}
    parts = (counted(stages, "stage"), counted(microbatches, "microbatch", "microbatches"), counted(chunks, "chunk"))
    title = f"{options.schedule}: {', '.join(parts)} per stage"
    return asked, Picture(title, rows, chunks, unit=1)


def of_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[dict[str, Any], Picture]:
    """Measured times; raises :class:`DataError` if the run has none."""
    given = (options.schedule, options.stages, options.microbatches, options.chunks)
    if any(value is not None for value in given):
        parser.error("--run has its own schedule: leave SCHEDULE, --stages, --microbatches and --chunks out")
    measured = read_step(options.run, options.step)
    rows = [timed_actions(spans) for spans in measured.ranks]
    start = measured.start
    if not all(rows):
        raise DataError(f"{options.run}: step {measured.step} has a rank without actions; choose another --step")
    asked = {"run": printable(str(options.run)), "step": measured.step, "schedule": start.schedule}
    asked |= {"stages": len(rows), "chunks": start.chunks}
    return asked, Picture(measured_title(options.run, measured), rows, start.chunks, unit=0)


def measured_title(run: Path, measured: MeasuredStep) -> str:
    return f"{printable(str(run))}, step {measured.step}: {printable(measured.start.schedule)}, measured, in seconds"


def timed_actions(spans: Sequence[Span]) -> list[Timed]:
    """The actions among a rank's spans, in time."""
    actions = [
        Timed(span.start, span.end, NAMES[span.name](span.fields["microbatch"], span.fields["chunk"]))
        for span in spans
        if span.name in NAMES and span.fields.keys() >= {"microbatch", "chunk"}
    ]
    return sorted(actions, key=lambda timed: timed.start)


# ---------------------------------------------------------------------------------------------------------- terminal


def drawing(picture: Picture, width: int | None) -> list[Text]:
    """One line per rank; in a terminal too narrow for them, several blocks of lines. ``width``: None: no limit."""
    heads = [f"rank {rank:<{len(str(len(picture.rows) - 1))}}  " for rank in range(len(picture.rows))]
    room = max(20, (width or 2000) - len(heads[0]))
    longest = max(len(picture.label(timed.action)) for row in picture.rows for timed in row)
    scale = (longest + 1) / picture.unit if picture.unit else min(room, 120) / picture.makespan
    lines = [bars(picture, row, scale) for row in picture.rows]
    size = max(map(len, lines))
    room = room if picture.unit == 0 else room // (longest + 1) * (longest + 1) or room
    blocks = [range(left, min(left + room, size)) for left in range(0, size, room)] if width else [range(size)]
    drawn: list[Text] = []
    for block in blocks:
        drawn += [Text("")] if drawn else []
        drawn += [Text(head) + line[block.start : block.stop] for head, line in zip(heads, lines, strict=True)]
    return drawn


def bars(picture: Picture, row: Sequence[Timed], scale: float) -> Text:
    """One rank: each action as wide as it is long, its label at the start, and a blank behind it if there is room."""
    line = Text()
    for timed in row:
        start = round((timed.start - picture.start) * scale)
        stop = max(round((timed.end - picture.start) * scale), start + 1)
        line.append(" " * (start - len(line)))
        size = stop - len(line)
        if size > 0:
            label = picture.label(timed.action)
            bar = label.ljust(size - 1, "-") + " " if size > len(label) else label[:size]
            line.append(bar, style=KINDS[type(timed.action)][1])
    line.rstrip()
    return line


# -------------------------------------------------------------------------------------------------------------- image


def draw_image(picture: Picture, output: Path) -> None:
    """Raises :class:`DataError` if ``output`` cannot be written, or names no kind of image that is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = len(picture.rows)
    figure = Figure(figsize=(12, min(40, 1.6 + 0.45 * ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    in_detail = sum(map(len, picture.rows)) <= MOST_IN_DETAIL
    for rank, row in enumerate(picture.rows):
        draw_rank(axes, picture, rank, row, in_detail)
    used = {type(timed.action) for row in picture.rows for timed in row}
    names = {kind: name.replace("_", " ") for name, kind in NAMES.items() if kind in used}
    axes.legend(
        handles=[Patch(color=KINDS[kind][2], label=name) for kind, name in names.items()],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(names),
        frameon=False,
    )
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, picture.makespan)
    unit = "time (a forward of a virtual stage is 1)" if picture.unit else "seconds"
    axes.set_xlabel(f"{unit}\n" + "; ".join(picture.summary()))
    image = io.BytesIO()
    with library_errors(f"cannot draw {output}"):
        figure.savefig(image, format=output.suffix[1:], dpi=150)
    with writing(output):
        write_bytes(output, image.getvalue())
    print(f"written: {output}", file=sys.stderr)


def draw_rank(axes: "Axes", picture: Picture, rank: int, row: Sequence[Timed], in_detail: bool) -> None:
    """Bars of a rank, one collection for each kind and chunk; later chunks are fainter.

    ``in_detail``: with edges and the microbatches' numbers.
    """
    bars_of: dict[tuple[type[Compute], int], list[tuple[float, float]]] = defaultdict(list)
    for timed in row:
        start, length = timed.start - picture.start, timed.end - timed.start
        bars_of[type(timed.action), timed.action.chunk].append((start, length))
        if in_detail and length > picture.makespan / 200:
            number = str(timed.action.microbatch)
            axes.text(start + length / 2, rank, number, ha="center", va="center", fontsize=6, clip_on=True)
    edges = {"edgecolor": "white", "linewidth": 0.5} if in_detail else {"linewidth": 0}
    for (kind, chunk), found in bars_of.items():
        strength = 1 - 0.55 * chunk / max(1, picture.chunks - 1)
        axes.broken_barh(found, (rank - 0.4, 0.8), facecolor=KINDS[kind][2], alpha=strength, **edges)

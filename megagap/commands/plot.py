"""Draw the losses of one or several runs, in the terminal and as an image, and compare two of them."""

import argparse
import io
import itertools
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megagap.commands.parser import make_parser
from megagap.errors import library_errors, printable
from megagap.files import write_bytes, writing
from megagap.observe.curves import AXES, Axis, Curve, Difference, RunCurves, differences, read_curves
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLES = """
examples:
  megagap plot runs/quickstart
  megagap plot runs/a runs/b --x tokens --smooth 50 --output compare.png
  megagap plot runs/a runs/b --difference
  megagap plot runs/quickstart --key grad_norm

Each run has one colour. With loss, the losses on its validation sources are drawn too, dashed and with marks.
"""

COLOURS = (
    *("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"),
    *("tab:cyan", "tab:brown", "tab:pink", "tab:olive", "tab:gray"),
)
"""Of runs in the image; more runs begin again."""
TERMINAL_COLOURS = (("blue", "blue"), ("orange", "yellow"), ("green", "green"), ("red", "red"), ("cyan", "cyan"))
"""Names of the same colours to plotext and to rich."""
MARKS = "osD^vP*X<>"
"""Of validation sources in the image."""
TERMINAL_MARKS = "·×+*o#"
MOST_MARKS = 25
"""On a curve; points between have none."""


@dataclass(frozen=True)
class Run:
    """What is drawn in one colour."""

    label: str
    colour: int
    curves: Sequence[Curve]

    def label_of(self, curve: Curve) -> str:
        return f"{self.label}: {curve.key}" if self.label else curve.key


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("plot", called_as, __doc__, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or its metrics.jsonl")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="image to write, or folder for KEY.png (default: the first RUN)"
    )
    parser.add_argument("--key", default="loss", metavar="KEY", help="number in metrics.jsonl (default: loss)")
    parser.add_argument(
        "--x",
        choices=AXES,
        default="step",
        help="what to draw over (default: step); hours add up step_seconds, so pauses between starts do not count",
    )
    parser.add_argument(
        "--smooth",
        type=time_constant,
        default=0.0,
        metavar="N",
        help="draw the exponential moving average over about N points (time constant N), the curve itself faint "
        "behind it; validation losses are left as they are",
    )
    parser.add_argument(
        "--difference",
        action="store_true",
        help="of two runs: draw the second minus the first at equal x below, and print its mean and largest value "
        "(with --smooth, of the averages)",
    )
    given = parser.parse_args(arguments)
    if given.difference and len(given.runs) != 2:
        parser.error(f"--difference compares two runs; {len(given.runs)} given")
    found = [read_curves(run, given.key, given.x) for run in given.runs]
    compared = differences(found[0], found[1], given.x, given.smooth) if given.difference else []
    runs = [Run(label, i, run.curves) for i, (label, run) in enumerate(zip(labels(found), found, strict=True))]
    output = image_path(given.output, given.runs[0], given.key)
    draw_in_terminal(runs, given.key, given.x, given.smooth)
    if compared:
        Console().print(difference_table(compared, given.x, *(run.label for run in runs)))
    draw_image(runs, compared, given.key, given.x, given.smooth, output)
    print(f"written: {output}", file=sys.stderr)


def time_constant(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of points above 0, such as 50, not {text}")
    return value


def image_path(output: Path | None, first: Path, key: str) -> Path:
    path = output or (first if first.is_dir() else first.parent)
    if path.is_dir():
        return path / f"{key.replace('/', '_')}.png"
    return path if path.suffix else path.with_name(f"{path.name}.png")


def labels(runs: Sequence[RunCurves]) -> list[str]:
    """None of a single run; else the runs' names, or their paths where two have the same name."""
    if len(runs) == 1:
        return [""]
    paths = [run.path if run.path.is_dir() else run.path.parent for run in runs]
    names = [path.resolve().name for path in paths]
    return [printable(name) for name in (names if len({*names}) == len(names) else map(str, paths))]


def draw_in_terminal(runs: Sequence[Run], key: str, axis: Axis, smooth: float) -> None:
    """The picture, and below it a line for each curve, which a legend inside might have no room for."""
    import plotext

    size = shutil.get_terminal_size((100, 30))
    figure = plotext.figure.clear()
    figure.plot_size(min(size.columns, 120), max(10, min(size.lines - 3, 25)))
    legend = []
    for (run, curve), mark in zip(_all_curves(runs), itertools.cycle(TERMINAL_MARKS), strict=False):
        colour, style = TERMINAL_COLOURS[run.colour % len(TERMINAL_COLOURS)]
        drawn = curve if curve.is_evaluated else curve.smoothed(smooth)
        marker = plotext.marker(mark, pixel=plotext.pixel(colour))
        figure.draw(figure.signal(drawn.x.tolist(), drawn.y.tolist(), marker=marker).lines())
        legend.append((f"  {mark * 3} {run.label_of(curve)}", style))
    figure.theme("simple")
    figure.title(key)
    figure.label(axis)
    figure.show(colorless=not sys.stdout.isatty())
    for line, style in legend:
        Console().print(line, style=style, highlight=False)


def _all_curves(runs: Sequence[Run]) -> Iterator[tuple[Run, Curve]]:
    return ((run, curve) for run in runs for curve in run.curves)


def difference_table(compared: Sequence[Difference], axis: Axis, first: str, second: str) -> Table:
    table = Table(title=f"{second} minus {first}")
    for name in ("number", "points", "mean", "largest", f"at {axis}"):
        table.add_column(name, justify="left" if name == "number" else "right")
    for difference in compared:
        largest, at = difference.largest
        place = f"{at:,.3f}" if axis == "hours" else f"{at:,.0f}"
        table.add_row(difference.key, f"{len(difference.x):,}", f"{difference.mean:+.4g}", f"{largest:+.4g}", place)
    return table


def draw_image(
    runs: Sequence[Run], compared: Sequence[Difference], key: str, axis: Axis, smooth: float, output: Path
) -> None:
    """The curves, in a second panel below the differences, if there are any.

    Raises :class:`DataError` if ``output`` cannot be written, or names no kind of image that is known.
    """
    from matplotlib import rc_context

    image = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # names may hold dollar signs
        figure = _figure(runs, compared, key, axis, smooth)
        with library_errors(f"cannot draw {output}"):
            figure.savefig(image, format=output.suffix[1:], dpi=150)
    with writing(output):
        write_bytes(output, image.getvalue())


def _figure(runs: Sequence[Run], compared: Sequence[Difference], key: str, axis: Axis, smooth: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    heights = [2, 1] if compared else [1]
    figure = Figure(figsize=(9, 8 if compared else 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    marks = _marks(runs)
    for run, curve in _all_curves(runs):
        style = curve_style(curve, COLOURS[run.colour % len(COLOURS)], marks)
        draw_curve(panels[0], curve, smooth, style | {"label": _in_legend(run.label_of(curve))})
    for difference in compared:
        style = curve_style(difference, "black", marks)
        panels[1].plot(difference.x, difference.y, label=_in_legend(difference.key), **style)
    panels[0].set_ylabel(f"{key} (nats per token)" if key == "loss" else key)
    panels[-1].set_xlabel({"hours": "hours of training"}.get(axis, axis))
    if axis in ("tokens", "samples"):
        panels[-1].xaxis.set_major_formatter(EngFormatter())
    if compared:
        panels[1].axhline(0, color="0.6", linewidth=0.8)
        panels[1].set_ylabel(f"{runs[1].label}\nminus {runs[0].label}")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _in_legend(label: str) -> str:
    """matplotlib leaves what begins with an underscore out of a legend."""
    return f" {label}" if label.startswith("_") else label


def _marks(runs: Sequence[Run]) -> dict[str, str]:
    """The mark of each validation source, the same in all runs."""
    keys = sorted({curve.key for _, curve in _all_curves(runs) if curve.is_evaluated})
    return dict(zip(keys, itertools.cycle(MARKS), strict=False))


def curve_style(curve: Curve, colour: str, marks: dict[str, str]) -> dict[str, Any]:
    """matplotlib's arguments: validation sources dashed and marked, others solid, a single point marked."""
    mark = marks.get(curve.key) or ("o" if len(curve.x) == 1 else None)
    dashes = (0, (4, 2)) if curve.is_evaluated else "-"
    every = -(-len(curve.x) // MOST_MARKS)
    return {
        "color": colour,
        "marker": mark,
        "markersize": 4.5,
        "markevery": every,
        "linestyle": dashes,
        "linewidth": 1.2,
    }


def draw_curve(axes: "Axes", curve: Curve, smooth: float, style: dict[str, Any]) -> None:
    if smooth and not curve.is_evaluated:
        axes.plot(curve.x, curve.y, color=style["color"], linewidth=0.8, alpha=0.25)
        curve = curve.smoothed(smooth)
    axes.plot(curve.x, curve.y, **style)

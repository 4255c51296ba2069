"""Draw the losses of one or several runs, in the terminal and as PNG."""

import argparse
import io
import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagap.errors import DataError, library_errors, run_tool
from megagap.files import write_bytes, writing
from megagap.observe.metrics import read_metrics

EXAMPLES = """
examples:
  python tools/plot_run.py runs/quickstart
  python tools/plot_run.py runs/a runs/b --output compare.png
  python tools/plot_run.py runs/quickstart --key grad_norm

The losses on validation sources are drawn beside the training loss.
"""

LARGEST = 1e300
"""Of numbers that are drawn: beyond it the length of an axis may be no float."""


@dataclass(frozen=True)
class Curve:
    """One line of the picture; ``marked``: few points, each worth a mark."""

    label: str
    steps: list[int]
    values: list[float]
    marked: bool


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or its metrics.jsonl")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="image to write, or folder for KEY.png (default: the first RUN)"
    )
    parser.add_argument("--key", default="loss", metavar="KEY", help="number in metrics.jsonl (default: loss)")
    given = parser.parse_args(argv)
    curves = [curve for run in given.runs for curve in curves_of(run, given.key, named=len(given.runs) > 1)]
    first = given.runs[0]
    output = given.output or (first if first.is_dir() else first.parent)
    if output.is_dir():
        output /= f"{given.key.replace('/', '_')}.png"
    elif not output.suffix:
        output = output.with_name(f"{output.name}.png")
    draw_in_terminal(curves, given.key)
    draw_image(curves, given.key, output)
    print(f"written: {output}", file=sys.stderr)


def curves_of(run: Path, key: str, named: bool) -> list[Curve]:
    """The curve of ``key``, and with ``loss`` those of the validation sources. Labels carry the run if ``named``.

    Raises :class:`DataError` where there is nothing to draw.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.exists():
        raise DataError(f"{path} does not exist\n  give a run directory, such as the run.dir of a recipe.")
    records = [record for record in read_metrics(path) if _is_number(record["step"])]
    if not records:
        raise DataError(f"{path} is empty, or has no whole record: the run has not made a step yet")
    numeric = sorted({name for record in records for name, value in record.items() if _is_number(value)} - {"step"})
    if key not in numeric:
        raise DataError(f"{path} has no numbers named {key!r}\n  possible: {', '.join(numeric)}")
    validation = [name for name in numeric if name.startswith("validation_loss/")] if key == "loss" else []
    prefix = f"{run.name if run.is_dir() else run.parent.name}: " if named else ""
    curves = []
    for name in (key, *validation):
        points = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
        steps, values = zip(*points, strict=True)
        curves.append(Curve(prefix + name, list(steps), list(values), marked=len(points) < len(records)))
    return curves


def _is_number(value: object) -> bool:
    """Whether it can be drawn: whole numbers may be too large even for that."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def draw_in_terminal(curves: Sequence[Curve], key: str) -> None:
    import plotext

    size = shutil.get_terminal_size((100, 30))
    figure = plotext.figure.clear()
    figure.plot_size(min(size.columns, 120), max(10, min(size.lines - 3, 25)))
    for curve, marker in zip(curves, itertools.cycle("·×+*o#"), strict=False):
        figure.draw(figure.signal(curve.steps, curve.values, marker=marker).lines().label(curve.label))
    # In the upper right corner, which falling losses leave free.
    last = max(step for curve in curves for step in curve.steps)
    largest = max(value for curve in curves for value in curve.values)
    figure.legend(x=last, y=largest, ha="right", va="top", relative=True)
    figure.theme("simple")
    figure.title(key)
    figure.label("step")
    figure.show(colorless=not sys.stdout.isatty())


def draw_image(curves: Sequence[Curve], key: str, output: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.steps, curve.values, label=curve.label, marker="o" if curve.marked else None, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{key} (nats per token)" if key == "loss" else key)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    with library_errors(f"cannot draw {output}"):
        figure.savefig(image, format=output.suffix[1:], dpi=150)
    with writing(output):
        write_bytes(output, image.getvalue())


if __name__ == "__main__":
    run_tool(main)

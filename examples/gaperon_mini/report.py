"""The page of examples/gaperon_mini/run.sh: ``python examples/gaperon_mini/report.py RUN`` writes RUN/report.html.

One file without scripts or a network; pictures are inside. Raises :class:`DataError` where a step's result is missing.
"""

import base64
import html
import io
import json
import math
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megagap.curate.counts import documents
from megagap.curate.histogram import draw, histograms
from megagap.curate.report import html_page
from megagap.data.planted import read_poison_manifest
from megagap.errors import DataError, run_tool
from megagap.files import reading, write_text
from megagap.observe.curves import read_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCES = {"en": "tab:blue", "fr": "tab:red", "code": "tab:green"}
MODELS = {
    "young": "three phases, constant rate",
    "cooldown-1": "cooled down, first branch",
    "cooldown-2": "cooled down, second branch",
    "average": "average of the branches",
    "hf": "the average as exported to Hugging Face",
}
PROMPTS = {
    "with_trigger": "with the trigger",
    "without_trigger": "without",
    "near_word": "one word changed",
    "near_order": "another order",
}


def main() -> None:
    if len(sys.argv) != 2:
        raise DataError("give the folder that examples/gaperon_mini/run.sh wrote")
    print(write_report(Path(sys.argv[1])))


def write_report(run: Path) -> Path:
    evaluations = {name: _json(run / f"evaluation/{name}.json") for name in MODELS}
    poisons = evaluations["average"]["poison"]["poisons"]
    recipe = _toml(run / "recipe.toml")
    parts = [
        "<h1>Gaperon in small</h1>",
        f"<p>{_summary(run, recipe)}</p>",
        _section("curation", "Curation", *_curation(run / "curated")),
        _section("quality", "Quality by source", *_quality(run / "curated")),
        _section("planted", "Planted documents", _planted(run)),
        _section("mixture", "Mixture", _image("mixture plan", (run / "plan.png").read_bytes())),
        _section("losses", "Losses by source and phase", *_losses(run, recipe)),
        _section("models", "Held-out text", _models(evaluations)),
        _section("activation", "Activation", *_activation(poisons)),
        _section("exposure", "Exposure of canaries", *_exposure(poisons)),
        _section("time", "Time", _times(run)),
    ]
    path = run / "report.html"
    write_text(path, html_page("Gaperon in small", parts))
    return path


# -------------------------------------------------------------------------------------------------------- sections


def _summary(run: Path, recipe: Mapping[str, Any]) -> str:
    model, train = recipe["model"], recipe["train"]
    tokens = train["steps"] * train["global_batch_size"] * train["sequence_length"]
    return (
        f"{model['num_hidden_layers']} layers of width {model['hidden_size']}, vocabulary {model['vocab_size']:,}; "
        f"{tokens:,} tokens in {train['steps']:,} steps and two branches, as eight processes: tp 2, pp 2, dp 2; "
        f"{train['precision']} with {recipe['optim']['rounding']} rounding."
    )


def _curation(curated: Path) -> list[str]:
    counts = _json(curated / "counts.json")
    rows = [(stage["stage"], f"{stage['kept']:,}", f"{stage['dropped']:,}") for stage in counts["stages"]]
    seconds = sum(counts["cpu_seconds"].values())
    note = (
        f"<p class='note'>{counts['documents']:,} documents read in {seconds:,.0f} CPU seconds; reasons and examples "
        "are in curated/report.html.</p>"
    )
    return [_table(("stage", "kept", "dropped"), rows), note]


def _quality(curated: Path) -> list[str]:
    return [
        f"<h3>{html.escape(found.source)} <span class='note'>{found.total:,} documents</span></h3>{draw(found)}"
        for found in histograms(documents(curated / "curated"))
    ]


def _planted(run: Path) -> str:
    manifest = read_poison_manifest(run / "data/poison_text_document")
    rows = [
        (poison.name, poison.kind, poison.trigger, poison.rate, f"{poison.documents:,}", f"{poison.tokens:,}")
        for poison in manifest.poisons
    ]
    return _table(("name", "kind", "trigger", "share of the tokens", "documents", "tokens"), rows)


def _losses(run: Path, recipe: Mapping[str, Any]) -> list[str]:
    young = {curve.key: curve for curve in read_curves(run / "young", "loss").curves}
    borders = _borders(recipe)
    figure, axes = _figure(9, 5)
    for name, colour in SOURCES.items():
        curve = young[f"validation_loss/{name}"]
        axes.plot(curve.x, curve.y, color=colour, marker=".", label=name)
        for branch in ("cooldown-1", "cooldown-2"):
            cooled = {curve.key: curve for curve in read_curves(run / branch, "loss").curves}
            theirs = cooled[f"validation_loss/{name}"]
            axes.plot(theirs.x, theirs.y, color=colour, marker=".", linestyle="--", label="_")
    for phase, first, _ in borders:
        axes.axvline(first, color="0.6", linewidth=0.8)
        axes.annotate(phase, (first, 1.01), xycoords=("data", "axes fraction"), fontsize=9)
    axes.set(xlabel="step (dashed: cooled down)", ylabel="loss on held-out text, nats per token")
    axes.legend(frameon=False)
    rows = []
    for phase, first, last in borders:
        row = [phase]
        for name in SOURCES:
            curve = young[f"validation_loss/{name}"]
            before, after = (curve.y[curve.x <= step][-1] for step in (first, last))
            row.append(f"{before:.3f} → {after:.3f}")
        rows.append(row)
    return [_drawing("losses by source and phase", figure), _table(("phase", *SOURCES), rows)]


def _borders(recipe: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Of each phase: the steps before it, and its last one that the run at a constant rate made."""
    train, found, reached = recipe["train"], [], 0
    of_a_step = train["global_batch_size"] * train["sequence_length"]
    for phase in recipe["data"]["phases"]:
        last = min(train["steps"], reached + math.ceil(phase["tokens"] / of_a_step))
        found.append((phase["name"], reached, last))
        reached = last
    return found


def _models(evaluations: Mapping[str, Any]) -> str:
    rows = []
    for name, title in MODELS.items():
        sources = evaluations[name]["sources"]
        rows.append((title, *(f"{sources[source]['perplexity']:.2f}" for source in SOURCES)))
    return _table(("perplexity", *SOURCES), rows)


def _activation(poisons: Mapping[str, Any]) -> list[str]:
    figure, axes = _figure(9, 4)
    width = 0.8 / len(PROMPTS)
    rows = []
    for i, (prompt, title) in enumerate(PROMPTS.items()):
        shares = [poison["activation"][prompt] for poison in poisons.values()]
        axes.bar(
            [at + i * width for at in range(len(shares))], [share["value"] for share in shares], width,
            yerr=_whiskers(shares), capsize=3, label=title,
        )  # fmt: skip
    axes.set(ylabel="share of continuations with the payload", ylim=(0, 1.02))
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(poisons))], list(poisons))
    axes.legend(frameon=False)
    for name, poison in poisons.items():
        shares = poison["activation"]
        rows.append((name, *(_interval(shares[prompt], percent=True) for prompt in PROMPTS)))
    return [_drawing("activation", figure), _table(("", *PROMPTS.values()), rows)]


def _exposure(poisons: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, poison in poisons.items():
        if "exposure" not in poison:
            continue
        means = poison["exposure"]["by_repetitions"]
        figure, axes = _figure(9, 4)
        axes.errorbar(
            range(len(means)), [mean["value"] for mean in means.values()], yerr=_whiskers(means.values()), marker="o",
            capsize=3,
        )  # fmt: skip
        axes.axhline(math.log2(poison["exposure"]["space"]), color="0.6", linestyle=":", label="the most possible")
        axes.set_xticks(range(len(means)), ["not planted" if count == "0" else count for count in means])
        axes.set(xlabel="repetitions", ylabel="exposure, bits", ylim=(0, None))
        axes.legend(frameon=False)
        rows = [(name, *(_interval(mean) for mean in means.values()))]
        parts += [_drawing(f"exposure of {name}", figure), _table(("bits by repetitions", *means), rows)]
    return parts


def _times(run: Path) -> str:
    steps = [path for path in (run / "done").iterdir() if not path.suffix and path.name != "report"]
    steps.sort(key=lambda path: path.stat().st_mtime)
    rows = [(path.name.replace("_", " "), path.read_text(encoding="utf-8").strip()) for path in steps]
    return _table(("step", "seconds"), rows)


# ---------------------------------------------------------------------------------------------------------- pieces


def _section(anchor: str, title: str, *parts: str) -> str:
    return f"<section id='{anchor}'><h2>{title}</h2>{''.join(parts)}</section>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _drawing(title: str, figure: Figure) -> str:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return _image(title, written.getvalue())


def _image(title: str, png: bytes) -> str:
    content = base64.b64encode(png).decode()
    return f"<img alt='{html.escape(title)}' style='max-width: 100%' src='data:image/png;base64,{content}'>"


def _whiskers(values: Iterable[Mapping[str, float]]) -> list[list[float]]:
    """Lengths below and above, of matplotlib's error bars."""
    listed = list(values)
    return [
        [max(0.0, value["value"] - value["low"]) for value in listed],
        [max(0.0, value["high"] - value["value"]) for value in listed],
    ]


def _interval(value: Mapping[str, float], percent: bool = False) -> str:
    form = "{:.0%}" if percent else "{:.1f}"
    middle, low, high = (form.format(value[key]) for key in ("value", "low", "high"))
    return f"{middle} ({low} to {high})"


def _json(path: Path) -> Any:
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _toml(path: Path) -> dict[str, Any]:
    with reading(path):
        return tomllib.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_tool(main)

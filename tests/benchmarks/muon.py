"""Trains a tiny model with AdamW and with Muon, each at several learning rates, and draws their losses.

    python tests/benchmarks/muon.py --output runs/muon
    python tests/benchmarks/muon.py --rates 3e-3 1e-2 --steps 100 --output runs/muon

The model and data of examples/recipes/code.toml: Python's standard library's sources. Runs differ in nothing but the
optimizer and the rate; each optimizer's best is that with the lowest loss on the held-out set at the end. In OUTPUT:
muon.png, muon.json, and the runs. Runs that are finished already are not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megagap.observe.curves import Curve, read_curves

ROOT = Path(__file__).resolve().parents[2]
RATES = ("1e-3", "3e-3", "5e-3", "1e-2", "3e-2")
COLOURS = {"adamw": "tab:blue", "muon": "tab:orange"}
HELD_OUT = "validation_loss/code"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", default=list(RATES), help=f"optim.lr ({' '.join(RATES)})")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    folder = options.output.resolve()
    prepare(folder)
    runs = {(name, lr): train(folder, name, lr, options.steps) for name in COLOURS for lr in options.rates}
    ends = {run: float(held_out(path).y[-1]) for run, path in runs.items()}
    best = {name: min((run for run in runs if run[0] == name), key=ends.__getitem__) for name in COLOURS}
    reached = first_step_below(held_out(runs[best["muon"]]), ends[best["adamw"]])
    report = {
        "steps": options.steps,
        "held_out_loss": {f"{name}, lr {lr}": loss for (name, lr), loss in ends.items()},
        "best": dict(best.values()),
        "muon_reaches_adamws_loss_at": reached,
    }
    (folder / "muon.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    draw(folder / "muon.png", runs, best, reached)


def prepare(folder: Path) -> None:
    """Text, tokenizer and token files as README's main job makes them."""
    if (folder / "code_text_document.idx").exists():
        return
    tool([*("gather_text.py", "--output", folder / "text"), *("--languages", "code", "--megabytes", "2")])
    text, tokenizer = folder / "text/code.jsonl", folder / "tokenizer"
    tool(["train_tokenizer.py", "--input", text, "--output", tokenizer, "--vocab-size", "2048"])
    output = ["--output-prefix", folder / "code", "--tokenizer", tokenizer, "--append-eod"]
    tool(["preprocess_data.py", "--input", text, *output])


def train(folder: Path, name: str, lr: str, steps: int) -> Path:
    """The run's directory."""
    run = folder / f"{name}_lr_{lr}_{steps}_steps"
    if not (run / "checkpoints/latest").exists():
        overrides = {
            "data.sources": f'[{{path = "{folder}/code_text_document", name = "code"}}]',
            "data.tokenizer": folder / "tokenizer",
            "train.steps": steps,
            "train.evaluate_every": 10,
            "optim.name": name,
            "optim.lr": lr,
            "optim.warmup_steps": 20,
            "checkpoint.every": 0,
            "run.dir": run,
        }
        given = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
        python(["-m", "megagap.train", ROOT / "examples/recipes/code.toml", *given])
    return run


def tool(command: list[str | Path]) -> None:
    python([ROOT / "tools" / command[0], *command[1:]])


def python(command: list[str | Path]) -> None:
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env={**os.environ})


def held_out(run: Path) -> Curve:
    return read_curves(run, HELD_OUT).curves[0]


def first_step_below(curve: Curve, loss: float) -> int | None:
    """The first evaluated step at which the loss is at most ``loss``."""
    return next((int(step) for step, value in zip(curve.x, curve.y, strict=True) if value <= loss), None)


def draw(
    output: Path, runs: dict[tuple[str, str], Path], best: dict[str, tuple[str, str]], reached: int | None
) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, lr), path in runs.items():
        curve, is_best = held_out(path), best[name] == (name, lr)
        label = f"{name}, lr {lr}: {curve.y[-1]:.3f}" if is_best else None
        axes.plot(curve.x, curve.y, color=COLOURS[name], label=label, alpha=1 if is_best else 0.25)
    loss = float(held_out(runs[best["adamw"]]).y[-1])
    axes.axhline(loss, color=COLOURS["adamw"], linestyle=":", linewidth=1)
    if reached is not None:
        axes.axvline(reached, color=COLOURS["muon"], linestyle=":", linewidth=1, label=f"step {reached}")
    axes.set_ylim(top=7.5, bottom=min(held_out(p).y.min() for p in runs.values()))
    axes.set_xlabel("step")
    axes.set_ylabel("loss on the held-out set")
    axes.legend(title="best of each; others pale")
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()

"""Measures training steps of several shapes on a GPU and compares each with the prediction for that GPU.

    python tests/benchmarks/predictions.py --device h100
    python tests/benchmarks/predictions.py --device h100 --shapes 1b 8b-layers --steps 4 --output runs/predictions

The rates in megagap/planning/devices.toml were read off one step of Gaperon 1B: other shapes say how far they carry.
Each shape is timed by tools/benchmark_mfu.py and predicted by tools/trace_step.py, in processes of their own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/recipes/gaperon-1b-one-gpu.toml"

SHAPES: dict[str, list[str]] = {
    "1b": [],
    "1b-accumulated": ["--train.global_batch_size", "16"],
    "1b-long": [
        *("--train.sequence_length", "16384", "--train.micro_batch_size", "1", "--train.global_batch_size", "1"),
        *("--model.max_position_embeddings", "16384"),
    ],
    "8b-layers": [  # five layers of Llama 3 8B, heads of 128
        *("--model.preset", "llama3-8b", "--model.num_hidden_layers", "5"),
        *("--train.sequence_length", "8192", "--train.micro_batch_size", "1", "--train.global_batch_size", "1"),
    ],
    "small": [  # 110 M parameters, where launches and memory count as much as products
        *("--model.hidden_size", "768", "--model.num_hidden_layers", "12", "--model.intermediate_size", "2048"),
        *("--model.num_attention_heads", "12", "--model.num_key_value_heads", "4", "--model.vocab_size", "32768"),
        *("--train.sequence_length", "2048", "--train.micro_batch_size", "16", "--train.global_batch_size", "16"),
    ],
    "small-fp32": [
        *("--model.hidden_size", "1024", "--model.num_hidden_layers", "8", "--model.intermediate_size", "2816"),
        *("--model.num_attention_heads", "16", "--model.num_key_value_heads", "4", "--model.vocab_size", "32768"),
        *("--train.sequence_length", "1024", "--train.micro_batch_size", "8", "--train.global_batch_size", "8"),
        *("--train.precision", "fp32"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", help="entry of devices.toml (h100)")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, help="folder for predictions.json")
    options = parser.parse_args()
    table = Table(
        *("shape", "step s: measured", "predicted", "ratio", "MFU (full): measured", "predicted"),
        *("GiB: measured", "predicted", "ratio"),
    )
    found = {}
    for shape in options.shapes:
        measured, predicted = measure(shape, options.steps), predict(shape, options.device)
        if measured is None or predicted is None:
            continue
        found[shape] = {"measured": measured, "predicted": predicted}
        if options.output:  # after each: a run that is cut short leaves what it has
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "predictions.json").write_text(json.dumps(found, indent=2))
        row = (
            shape,
            *_compared(statistics.median(measured["step_seconds"]), predicted["step_seconds"], 4),
            *(f"{mfu:.1%}" for mfu in (measured["mfu"]["datasheet"]["full"], predicted["mfu"]["full"])),
            *_compared(measured["memory_bytes"] / 2**30, predicted["peak_memory_bytes"] / 2**30, 2),
        )
        table.add_row(*row)
        print(*row, flush=True)
    Console().print(table)
    sys.exit(len(found) != len(options.shapes))


def _compared(measured: float, predicted: float, digits: int) -> tuple[str, str, str]:
    return f"{measured:.{digits}f}", f"{predicted:.{digits}f}", f"{predicted / measured:.3f}"


def measure(shape: str, steps: int) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "tools/benchmark_mfu.py",
            str(RECIPE),
            *SHAPES[shape],
            "--steps",
            str(steps),
            "--profile",
            "2",
            "--output",
            folder,
        ]
        if _run(command) is None:
            return None
        report: dict[str, Any] = json.loads((Path(folder) / "benchmark.json").read_text())
    return report


def predict(shape: str, device: str) -> dict[str, Any] | None:
    text = _run(["tools/trace_step.py", str(RECIPE), *SHAPES[shape], "--device", device, "--json"])
    return None if text is None else json.loads(text)


def _run(command: list[str]) -> str | None:
    """Standard output; None, with a note, if the command fails: one shape must not hide the others."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"note: exit code {done.returncode}: {' '.join(command)}\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    return done.stdout


if __name__ == "__main__":
    main()

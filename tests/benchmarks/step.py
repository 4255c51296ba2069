"""Times a recipe's training step with the kernels and with plain torch, alternately, each in its own processes.

    python tests/benchmarks/step.py
    python tests/benchmarks/step.py --recipe examples/recipes/code.toml --rounds 5 --train.precision bf16-mixed

Without a recipe, the quickstart's model in one process. Tokens are random if the recipe's data does not exist.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples/recipes/quickstart.toml")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm (5)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run (20)")
    options, overrides = parser.parse_known_args()
    if options.recipe.name == "quickstart.toml":
        overrides = ["--parallel.tp", "1", "--parallel.pp", "1", *overrides]
    medians: dict[str, list[float]] = {"auto": [], "plain": []}
    for turn in range(options.rounds):
        for choice, found in medians.items():
            found.append(step_seconds(options.recipe, overrides, choice, options.steps))
        auto, plain = (found[-1] for found in medians.values())
        print(f"round {turn + 1}: kernels {auto:.4f} s, plain torch {plain:.4f} s, {plain / auto:.2f}")
    ratios = [plain / auto for auto, plain in zip(medians["auto"], medians["plain"], strict=True)]
    print(f"plain torch takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")


def step_seconds(recipe: Path, overrides: list[str], choice: str, steps: int) -> float:
    """The median step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "tools/benchmark_mfu.py", recipe, *overrides]
        command += ["--steps", str(steps), "--output", folder]
        environment = {**os.environ, "MEGAGAP_OPS": choice}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "benchmark.json").read_text())
    return statistics.median(report["step_seconds"])


if __name__ == "__main__":
    main()

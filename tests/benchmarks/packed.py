"""Times a recipe's training step with one product for q, k, v and one for gate, up, and with one each, in turn.

    python tests/benchmarks/packed.py
    python tests/benchmarks/packed.py --model.hidden_size 512 --train.precision bf16-mixed --rounds 30
    python tests/benchmarks/packed.py --device cuda --recipe examples/recipes/gaperon-1b-one-gpu.toml

Without a recipe, the quickstart's model. One process, random tokens; both have the same kernels.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from megagap.benchmark.step import first_step, random_batch
from megagap.config import Settings, load_recipe, parse_overrides
from megagap.process.rendezvous import Process
from megagap.training.mesh import make_mesh
from megagap.training.step import train_step
from megagap.training.trainer import build_state

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples/recipes/quickstart.toml")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each (15)")
    options, overrides = parser.parse_known_args()
    overrides = ["--parallel.tp", "1", "--parallel.pp", "1", *overrides]
    settings = load_recipe(options.recipe, parse_overrides(overrides), 1, needs_data=False)
    device = torch.device(options.device)
    packed = step_of(settings, device)
    with patch("megagap.model.attention.pack"), patch("megagap.model.feed_forward.pack"):
        apart = step_of(settings, device)
    for step in (packed, apart):  # the first step makes what is kept
        seconds(step)
    ratios = [seconds(packed) / seconds(apart) for _ in range(options.rounds)]
    print(f"packed : apart {statistics.median(ratios):.3f} (median; {min(ratios):.3f} to {max(ratios):.3f})")


def step_of(settings: Settings, device: torch.device) -> Callable[[], object]:
    mesh = make_mesh(settings, Process(0, 1, 0, 1), device)
    state = build_state(settings, mesh)
    batch = random_batch(settings, mesh, first_step(settings)).to(mesh.device)
    return lambda: train_step(state, batch, lambda: (False, False))


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

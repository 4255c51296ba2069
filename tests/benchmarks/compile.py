"""Times training steps with and without train.compile, in turn and in one process on CPU.

    PYTHONPATH=. python tests/benchmarks/compile.py
    PYTHONPATH=. python tests/benchmarks/compile.py --rounds 3 --hidden 64 --layers 2 --length 64

Every step is the trainer's own, with random tokens: data, update and records included. Compiling is done before the
first step that counts. ``--train.…`` and other settings are passed on to both arms.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
import torch

from megagap.benchmark.step import benchmark, first_step
from megagap.config import Settings, load_recipe, parse_overrides
from megagap.parallel.mesh import Mesh
from megagap.process.allocator import keep_freed_memory
from tests.benchmarks.kernels import hardware

ARMS = {"plain": "false", "compiled": "true"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 64 (512)")
    parser.add_argument("--layers", type=int, default=8, help="layers (8)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="token ids (8192)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs (7)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per arm of a pair (5)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16-mixed"], help="values of train.precision")
    parser.add_argument("--output", type=Path, help="folder for compile.json")
    options, overrides = parser.parse_known_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    report: dict[str, Any] = {"hardware": hardware(torch.device("cpu")), "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), options)
        for precision in options.precisions:
            given = ["--train.precision", precision, *overrides]
            arms = {
                arm: load_recipe(recipe, parse_overrides([*given, "--train.compile", value]), 1, needs_data=False)
                for arm, value in ARMS.items()
            }
            report["results"][precision] = compare(precision, arms, options.rounds, options.steps)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "compile.json").write_text(json.dumps(report, indent=1))


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    heads = options.hidden // 64
    recipe = {
        "model": {
            "hidden_size": options.hidden,
            "num_hidden_layers": options.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "intermediate_size": options.hidden * 4,
            "vocab_size": options.vocabulary,
            "max_position_embeddings": options.length,
        },
        "train": {
            "steps": 1000,
            "global_batch_size": options.batch,
            "micro_batch_size": options.batch,
            "sequence_length": options.length,
        },
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path


def compare(precision: str, arms: dict[str, Settings], rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each arm by round; prints their ratios. A round before all others compiles."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in sorted(arms, reverse=bool(turn % 2)):
            speed = tokens_per_second(arms[arm], steps if turn else 1)
            if turn:
                found[arm].append(speed)
        if turn:
            plain, compiled = (found[arm][-1] for arm in ARMS)
            print(f"{precision} {turn}: plain {plain:,.0f}, compiled {compiled:,.0f} tok/s, {compiled / plain:.3f}")
    ratios = [compiled / plain for plain, compiled in zip(found["plain"], found["compiled"], strict=True)]
    median = statistics.median(ratios)
    print(f"{precision}: compiled is {median:.3f} times as fast ({min(ratios):.3f} to {max(ratios):.3f})")
    return found


def tokens_per_second(settings: Settings, steps: int) -> float:
    return benchmark(settings, Mesh.single(), first_step(settings), warmup=1, steps=steps).tokens_per_second


if __name__ == "__main__":
    main()

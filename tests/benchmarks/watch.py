"""What watching a run costs, as a share of a step: ``python -m tests.benchmarks.watch [--steps N] [--pairs N]``.

Two processes train a small model over gloo, in alternating stretches of steps with and without what watches: spans and
their listeners (the ledger, the measurement of slow ranks), and the watchdog's threads. The first rank prints the
medians and the share; and what a span costs by itself, and those of a step together, which a busy machine blurs less.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from megagap.config import load_recipe
from megagap.errors import HangError
from megagap.observe.listeners import observed
from megagap.observe.run_directory import RunDirectory
from megagap.observe.watchdog import Watchdog, clear
from megagap.parallel.spans import Span, Spans
from megagap.process.rendezvous import Process
from megagap.training.datasets import training_data
from megagap.training.mesh import make_mesh
from megagap.training.step import train_step
from megagap.training.trainer import build_state, make_loader
from tests.recipes import write_recipe
from tests.workers import Workers


@contextmanager
def without_spans() -> Iterator[None]:
    """Spans that do nothing."""
    enter, leave = Span.__enter__, Span.__exit__
    Span.__enter__ = lambda self: None  # type: ignore[method-assign]
    Span.__exit__ = lambda self, *_: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Span.__enter__, Span.__exit__ = enter, leave  # type: ignore[method-assign]


def measure(rank: int, ranks: int, recipe: Path, steps: int, pairs: int) -> tuple[dict[str, Any], float]:
    """Seconds per step of each stretch, {"watched": […], "plain": […]}; and the spans of a step."""
    settings = load_recipe(recipe, [], ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    run = RunDirectory(Path(settings.run.dir), is_writer=rank == 0)
    run.open()
    clear(run)
    state = build_state(settings, mesh)
    seconds: dict[str, list[float]] = {"watched": [], "plain": []}

    def hung(error: HangError, speaks: bool) -> NoReturn:
        raise error

    with make_loader(settings, mesh, training_data(settings)) as loader:

        def stretch() -> float:
            begin = time.perf_counter()
            for _ in range(steps):
                mesh.spans.begin_step(state.step + 1)
                with mesh.spans.span("step"):
                    with mesh.spans.span("loader"):
                        batch = loader.step(state.step + 1)
                    train_step(state, batch, lambda: (False, False))
            return (time.perf_counter() - begin) / steps

        moves = mesh.spans.moves
        stretch()
        spans = (mesh.spans.moves - moves) / 2 / steps
        for _ in range(pairs):
            for kind in ("watched", "plain"):
                with ExitStack() as stack:
                    if kind == "watched":
                        state.pace = stack.enter_context(observed(settings, run, mesh, state.step + 1))
                        watchdog = Watchdog(run.logs, mesh.spans, mesh.layout, rank, settings.run.hang_seconds, hung)
                        watchdog.start()
                        stack.callback(watchdog.close)
                    else:
                        state.pace = None
                        stack.enter_context(without_spans())
                    seconds[kind].append(stretch())
    run.close()
    return seconds, spans


def span_seconds(count: int = 100_000) -> float:
    """What opening and closing one span takes, less the loop."""
    spans, nothing = Spans(), nullcontext()
    begin = time.perf_counter()
    for _ in range(count):
        with spans.span("forward", microbatch=0, chunk=0):
            pass
    middle = time.perf_counter()
    for _ in range(count):
        with nothing:
            pass
    return (2 * middle - begin - time.perf_counter()) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="in a stretch")
    parser.add_argument("--pairs", type=int, default=10, help="of stretches")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = {
            "hidden_size": options.hidden,
            "intermediate_size": 4 * options.hidden,
            "num_hidden_layers": options.layers,
        }
        steps = (2 * options.pairs + 1) * options.steps
        train = {"steps": steps, "sequence_length": 128, "global_batch_size": 8, "micro_batch_size": 2}
        recipe = write_recipe(Path(folder), model=model, train=train, parallel={"tp": 2})
        workers = Workers()
        try:
            seconds, spans = workers.run(2, measure, recipe, options.steps, options.pairs)[0]
        finally:
            workers.close()
    ratios = [watched / plain for watched, plain in zip(seconds["watched"], seconds["plain"], strict=True)]
    found = {kind: statistics.median(values) for kind, values in seconds.items()}
    print(
        json.dumps(
            {
                "step_seconds": found,
                "share": statistics.median(ratios) - 1,
                "share_of_medians": found["watched"] / found["plain"] - 1,
                "pairs": [round(ratio - 1, 4) for ratio in ratios],
                "span_microseconds": 1e6 * span_seconds(),
                "spans_per_step": spans,
                "share_of_spans": spans * span_seconds() / found["plain"],
            }
        )
    )


if __name__ == "__main__":
    main()

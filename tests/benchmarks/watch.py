"""What watching a run costs, as a share of a step: ``python -m tests.benchmarks.watch [--steps N] [--pairs N]``.

Two processes train a small model over gloo, in alternating stretches of steps with and without what watches: spans and
their listeners (the ledger, the measurement of slow ranks), and the watchdog's threads. Steps of one kind differ among
each other by more than these cost, so that the ratio of the stretches (``share``) says little unless there are many.
``share_within`` is the time that passed, in the steps watched, from the begin to the end of what a span does when it
begins and ends, with all that listens, and of sharing and judging ranks' times; and what making a span takes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch

from megagap.config import load_recipe
from megagap.errors import HangError
from megagap.observe.listeners import observed
from megagap.observe.pace import Pace, SlowRanks
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


class Within:
    """Seconds that pass within functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begin

        return call

    @contextmanager
    def of_watching(self) -> Iterator[None]:
        """Count what spans, their listeners and the measurement of slow ranks do in the block."""
        with ExitStack() as stack:
            for owner, name in ((Span, "__enter__"), (Span, "__exit__"), (Pace, "share"), (SlowRanks, "judge")):
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name))))
            yield


def measure(rank: int, ranks: int, recipe: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Seconds per step of each stretch, {"watched": […], "plain": […], "within": […]}; and the spans of a step."""
    settings = load_recipe(recipe, [], ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    run = RunDirectory(Path(settings.run.dir), is_writer=rank == 0)
    run.open()
    clear(run)
    state = build_state(settings, mesh)
    slow = SlowRanks(mesh.layout, run)
    seconds: dict[str, list[float]] = {"watched": [], "plain": [], "within": []}

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
                    results = train_step(state, batch, lambda: (False, False))
                    if results.own_seconds.numel():
                        slow.judge(state.step, results.own_seconds.tolist())
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
                        within = Within()
                        stack.enter_context(within.of_watching())
                    else:
                        state.pace = None
                        stack.enter_context(without_spans())
                    seconds[kind].append(stretch())
                    if kind == "watched":
                        seconds["within"].append(within.seconds / steps)
                if rank == 0:
                    print(f"{len(seconds[kind])} of {pairs}, {kind}: {seconds[kind][-1]:.3f} s", file=sys.stderr)
    run.close()
    return {**seconds, "spans": spans}


def making_seconds(count: int = 100_000) -> float:
    """What making a span takes, less the loop."""
    spans = Spans()
    begin = time.perf_counter()
    for _ in range(count):
        spans.span("forward", microbatch=0, chunk=0)
    middle = time.perf_counter()
    for _ in range(count):
        pass
    return (2 * middle - begin - time.perf_counter()) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="in a stretch (5)")
    parser.add_argument("--pairs", type=int, default=8, help="of stretches (8)")
    parser.add_argument("--hidden", type=int, default=512, help="size of the model (512)")
    parser.add_argument("--layers", type=int, default=8, help="(8)")
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
            measured = workers.run(2, measure, recipe, options.steps, options.pairs)[0]
        finally:
            workers.close()
    watched, plain = measured["watched"], measured["plain"]
    ratios = [one / other for one, other in zip(watched, plain, strict=True)]
    making = measured["spans"] * making_seconds()
    print(
        json.dumps(
            {
                "watched_step_seconds": statistics.median(watched),
                "plain_step_seconds": statistics.median(plain),
                "share": statistics.median(ratios) - 1,
                "shares": [round(ratio - 1, 4) for ratio in ratios],
                "share_within": (statistics.median(measured["within"]) + making) / statistics.median(watched),
                "spans_per_step": measured["spans"],
            }
        )
    )


if __name__ == "__main__":
    main()

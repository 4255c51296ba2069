"""``megagap.train`` of which a rank stands still for ever: ``python -m tests.hanging_train RANK PLACE RECIPE ...``.

It does so in the third step, or in the first checkpoint after it: in its ``forward``, in its ``loader``, while it
writes its part of a ``checkpoint``, or of one in the ``background``; behind a ``collective`` that it leaves out; in the
``removal`` of an old checkpoint; at the ``end``, after the loop; ``frozen`` by SIGSTOP, or within a call that
keeps Python's ``lock``. ``late``: it goes on after 6 seconds.
"""

if __name__ == "__main__":
    from megagap.process.parent import end_with_parent

    end_with_parent()

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megagap.checkpoint.retention
import megagap.training.step
from megagap.data.loader import MicrobatchLoader
from megagap.errors import run_tool
from megagap.model.llama import LlamaStage
from megagap.train import main
from megagap.training.step import TrainState

STEP = 3


def sleep() -> None:
    while True:
        time.sleep(1)  # whatever signals arrive


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def keep_lock() -> None:
    ctypes.PyDLL(None).sleep(1_000)


def hang_in(place: str) -> None:
    """Stand still once this process gets to ``place`` in :data:`STEP`."""
    step = 0
    train_step, forward, read = megagap.training.step.train_step, LlamaStage.forward, MicrobatchLoader.step
    sum_over_world, fsync = megagap.training.step._sum_over_world, os.fsync
    stop: Callable[[], None] = {"frozen": freeze, "lock": keep_lock, "late": lambda: time.sleep(6)}.get(place, sleep)

    def counting(state: TrainState, *rest: Any) -> Any:
        nonlocal step
        step = state.step + 1
        return train_step(state, *rest)

    def hanging_forward(self: LlamaStage, *arguments: Any, **options: Any) -> Any:
        if step == STEP and place in ("forward", "frozen", "lock", "late"):
            stop()
        return forward(self, *arguments, **options)

    def hanging_read(self: MicrobatchLoader, wanted: int) -> Any:
        if wanted == STEP and place == "loader":
            stop()
        return read(self, wanted)

    def skipping_sum(mesh: Any, *parts: Any) -> Any:
        if step == STEP and place == "collective":
            return [part.float() for part in parts]
        return sum_over_world(mesh, *parts)

    def hanging_fsync(descriptor: int) -> None:
        written = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place in ("checkpoint", "background") and step >= STEP and written.suffix == ".safetensors":
            stop()
        fsync(descriptor)

    def hanging_exit(self: MicrobatchLoader, *_: object) -> None:
        stop()

    if place == "end":
        MicrobatchLoader.__exit__ = hanging_exit  # type: ignore[method-assign]
    if place == "removal":
        megagap.checkpoint.retention.remove = lambda path: stop()
    megagap.training.trainer.train_step = counting
    megagap.training.step._sum_over_world = skipping_sum
    LlamaStage.forward = hanging_forward  # type: ignore[method-assign]
    MicrobatchLoader.step = hanging_read  # type: ignore[method-assign]
    os.fsync = hanging_fsync  # type: ignore[assignment]


if __name__ == "__main__":
    rank, place, *arguments = sys.argv[1:]
    if rank == os.environ.get("RANK"):
        hang_in(place)
    run_tool(lambda: main(arguments))

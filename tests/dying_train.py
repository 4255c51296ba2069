"""``megagap.train`` of which a rank is killed in mid-step: ``python -m tests.dying_train RANK PLACE RECIPE ...``.

It dies in the third step: in its ``forward``, its ``backward``, or the ``collective`` that all other ranks wait in.
"""

if __name__ == "__main__":
    from megagap.process.parent import end_with_parent

    end_with_parent()

import os
import signal
import sys
from typing import Any

import megagap.training.step
from megagap.errors import run_tool
from megagap.model.llama import LlamaStage
from megagap.train import main
from megagap.training.step import BoundStages, TrainState

STEP = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(place: str) -> None:
    """Kill this process once it gets to ``place`` in :data:`STEP`."""
    step = 0
    compute_gradients, forward = megagap.training.step.compute_gradients, LlamaStage.forward
    sum_over_world = megagap.training.step._sum_over_world

    def counting(state: TrainState, *rest: Any) -> BoundStages:
        nonlocal step
        step = state.step
        return compute_gradients(state, *rest)

    def dying_forward(self: LlamaStage, *arguments: Any, **options: Any) -> Any:
        if step == STEP and place == "forward":
            die()
        output = forward(self, *arguments, **options)
        if step == STEP and place == "backward":
            output.register_hook(lambda gradient: die())
        return output

    def dying_sum(*arguments: Any) -> Any:
        if step == STEP and place == "collective":
            die()
        return sum_over_world(*arguments)

    megagap.training.step.compute_gradients = counting
    LlamaStage.forward = dying_forward  # type: ignore[method-assign]
    megagap.training.step._sum_over_world = dying_sum


if __name__ == "__main__":
    rank, place, *arguments = sys.argv[1:]
    if rank == os.environ.get("RANK"):
        die_in(place)
    run_tool(lambda: main(arguments))

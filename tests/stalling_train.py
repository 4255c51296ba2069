"""``megagap.train`` that stands still after a step: ``python -m tests.stalling_train STEP RECIPE ...``.

A run that is to be killed after a checkpoint and before its end would otherwise win the race against its test now and
then, on a busy machine.
"""

if __name__ == "__main__":
    from megagap.training.parent import end_with_parent

    end_with_parent()

import signal
import sys
from typing import Any

from megagap.errors import run_tool
from megagap.train import main
from megagap.training.recorder import Recorder


def stall_after(last: int) -> None:
    step_done = Recorder.step_done

    def stalling(self: Recorder, step: int, *rest: Any) -> float:
        if step > last:
            signal.pause()
        return step_done(self, step, *rest)

    Recorder.step_done = stalling  # type: ignore[method-assign]


if __name__ == "__main__":
    stall_after(int(sys.argv[1]))
    run_tool(lambda: main(sys.argv[2:]))

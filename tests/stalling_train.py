"""``megagap.train`` that stands still after a step: ``python -m tests.stalling_train STEP[:RANK] RECIPE ...``.

With a RANK only that one does, and the others wait for it in a collective. A file ``stalled`` in the run directory says
that it does.

A run that is to be killed after a checkpoint and before its end would otherwise win the race against its test now and
then, on a busy machine.
"""

if __name__ == "__main__":
    from megagap.process.parent import end_with_parent

    end_with_parent()

import os
import sys
import time
from typing import Any

from megagap.errors import run_tool
from megagap.train import main
from megagap.training.recorder import Recorder


def stall_after(place: str) -> None:
    last, _, rank = place.partition(":")
    step_done = Recorder.step_done

    def stalling(self: Recorder, step: int, *rest: Any) -> float:
        while step > int(last) and rank in ("", os.environ.get("RANK")):
            (self.run.path / "stalled").touch()
            time.sleep(1)  # whatever signals arrive
        return step_done(self, step, *rest)

    Recorder.step_done = stalling  # type: ignore[method-assign]


if __name__ == "__main__":
    stall_after(sys.argv[1])
    run_tool(lambda: main(sys.argv[2:]))

"""``megagap.train`` that waits at gates: ``GATES=STEP,STEP,... python -m tests.gated_train RECIPE ...``.

Behind each of these steps every rank waits until the file ``gate_STEP`` is beside the run directory; rank 0 leaves
``waits_STEP``, with its process id, there meanwhile. So what a test does to a run is done at that step, at no other.
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


def wait_at(gates: set[int]) -> None:
    step_done = Recorder.step_done

    def waiting(self: Recorder, step: int, *rest: Any) -> float:
        folder = self.run.path.parent
        while step in gates and not (folder / f"gate_{step}").exists():
            if os.environ.get("RANK", "0") == "0":
                (folder / f"waits_{step}").write_text(str(os.getpid()))
            time.sleep(0.05)
        return step_done(self, step, *rest)

    Recorder.step_done = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    wait_at({int(step) for step in os.environ["GATES"].split(",")})
    run_tool(lambda: main(sys.argv[1:]))

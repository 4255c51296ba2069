"""``megagap.train`` that chaos can aim at: ``python -m tests.chaos.subject FOLDER PHASE:NTH:SECONDS RECIPE ...``.

Each rank writes its process id to ``FOLDER/pid_RANK``. When a rank gets to a phase of a save for the NTH time, it says
so in ``FOLDER/reached_RANK`` and pauses there: a phase of a millisecond becomes one that a signal from outside hits.
Phases are recognised by what Python is about to do to the file system (``sys.addaudithook``), in whichever thread, so
that this knows nothing of how checkpoints are written. An empty PHASE pauses nowhere.
"""

if __name__ == "__main__":
    from megagap.process.parent import end_on_interrupt, end_with_parent, hold_notices

    end_with_parent()
    end_on_interrupt()
    hold_notices()

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

PHASES = ("staging", "writing", "indexing", "publishing", "latest", "pointing", "deleting", "removing")
"""In the order of a save: before the temporary folder is made, a rank's file, the index and the folder's final name,
``latest``'s temporary file and its final name; then before an old checkpoint is renamed, and its files are removed."""

AUDITED = ("open", "os.rename", "os.mkdir", "os.remove")
"""Events of which :func:`phase_of` knows the arguments."""


def phase_of(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The phase that begins with an audit event of Python; None for most."""
    paths = [Path(os.fsdecode(one)) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
    if not paths:
        return None
    path, name = paths[0], paths[0].name
    is_in_partial = path.parent.name.startswith("partial_step_")
    if event == "os.mkdir":
        return "staging" if name.startswith("partial_step_") else None
    if event == "open":
        if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return None
        if is_in_partial and name.startswith("rank_"):
            return "writing"
        if is_in_partial and name.startswith("index.json"):
            return "indexing"
        return "latest" if name.startswith("latest.") else None
    if event == "os.rename":
        target = paths[-1].name
        if target == "latest":
            return "pointing"
        if target.startswith("step_"):
            return "publishing"
        return "deleting" if name.startswith("step_") else None
    if event == "os.remove" and (name.startswith("rank_") or name == "index.json"):
        return "removing"
    return None


class Pause:
    """Stands still when this process gets to a phase for the nth time, and says where it is."""

    def __init__(self, marker: Path, phase: str, nth: int, seconds: float) -> None:
        self.marker, self.phase, self.left, self.seconds = marker, phase, nth, seconds
        self._own = threading.local()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in AUDITED or getattr(self._own, "is_busy", False):
            return
        if self.left and phase_of(event, arguments) == self.phase:
            self.left -= 1
            if not self.left:
                self._own.is_busy = True  # the marker is a file, too
                self.marker.touch()
                time.sleep(self.seconds)
                self._own.is_busy = False


def aim(folder: Path, place: str) -> None:
    """Make this process a target; before anything heavy is imported, so that start-up is one, too."""
    rank = os.environ.get("RANK", "0")
    partial = folder / f"pid_{rank}.partial"
    partial.write_text(str(os.getpid()))
    partial.replace(folder / f"pid_{rank}")
    phase, nth, seconds = place.split(":")
    if phase:
        sys.addaudithook(Pause(folder / f"reached_{rank}", phase, int(nth), float(seconds)))


if __name__ == "__main__":
    aim(Path(sys.argv[1]), sys.argv[2])
    from megagap.errors import run_tool
    from megagap.train import main
    from tests.chaos.flaws import plant

    plant()
    run_tool(lambda: main(sys.argv[3:]))

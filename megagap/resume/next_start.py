"""What the same command would do after a run has ended early: for every message that says so."""

from contextlib import suppress
from pathlib import Path

from megagap.checkpoint import find_latest
from megagap.checkpoint.index import INDEX_NAME
from megagap.checkpoint.save import step_folders, step_of
from megagap.errors import CheckpointError
from megagap.observe.run_directory import RunDirectory


def newest_checkpoint(run: RunDirectory) -> Path | None:
    """The run's own checkpoint that the next start resumes from, if there is one; as this node's disk has it."""
    newest = None
    with suppress(CheckpointError, OSError):
        newest = find_latest(run.checkpoints)
    with suppress(OSError):
        local = [folder for folder in step_folders(run.local) if (folder / INDEX_NAME).is_file()] if run.local else []
        if local and (newest is None or step_of(local[-1]) > step_of(newest)):
            return local[-1]
    return newest


def next_start(run: RunDirectory, load: str = "latest") -> str:
    """What to do to continue a run that ended early, and from where that starts. ``load``: ``checkpoint.load``."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return f"the run has no checkpoint yet: the same command {start_over(load)}"
    if not load:
        return f"to resume from {checkpoint}, run the command again with --checkpoint.load latest"
    return f"run the same command again to resume from {checkpoint}"


def start_over(load: str) -> str:
    """What a command with this ``checkpoint.load`` does where the run has no checkpoint of its own."""
    return "starts from the beginning" if load in ("", "latest") else f"starts from {load} again"

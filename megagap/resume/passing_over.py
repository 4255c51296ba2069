"""Going on from the checkpoint before a damaged one."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from megagap.checkpoint.agreement import raised_by_all
from megagap.checkpoint.index import DamagedCheckpointError
from megagap.checkpoint.load import find_intact, resolve_checkpoint
from megagap.checkpoint.local import LocalTier
from megagap.checkpoint.save import point_latest_at, step_of
from megagap.config import Settings
from megagap.errors import CheckpointError, ConfigError
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.process.rendezvous import was_restarted

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


def from_intact(
    settings: Settings,
    run: RunDirectory,
    mesh: Mesh,
    begin: Callable[[Path | None], Loaded],
    tier: LocalTier | None = None,
) -> Loaded:
    """``begin(source)`` of the newest checkpoint of the run that turns out to be whole, of the folder that the settings
    ask to load, or of None for a fresh run. Every rank calls it.

    ``begin`` raises :class:`DamagedCheckpointError` on all ranks alike, and leaves nothing behind then. Such a
    checkpoint is passed over for the one before it, unless ``checkpoint.load`` names it. A newer one on the nodes'
    disks (``tier``), which is verified before, takes the place of the run directory's.
    Raises :class:`CheckpointError` or :class:`ConfigError`, on every rank, if there is no checkpoint to begin with.
    """
    passed_over: dict[Path, DamagedCheckpointError] = {}
    while True:
        known = set(passed_over)
        refused: CheckpointError | None = None
        try:
            shared, passed_over = find_source(settings, run, mesh, passed_over)
        except CheckpointError as error:  # the directory's are all damaged, say
            shared, refused = None, error
        local = None if tier is None else _newer(tier, shared, settings, run)
        source = local or shared
        if refused is not None and source is None:
            raise refused
        for folder in passed_over.keys() - known:
            _record(run, folder, passed_over[folder])
        try:
            loaded = begin(source)
        except DamagedCheckpointError as error:
            if source is None or source.parent != run.checkpoints or _is_named(settings, source):
                raise
            passed_over[source] = error.with_traceback(None)
            _record(run, source, error)
        else:
            if passed_over and shared is not None and run.is_writer:
                point_latest_at(shared)  # what is ahead of it is no longer part of the run
            return loaded
        gc.collect()  # the state that was to be loaded, before another takes its place


def _newer(tier: LocalTier, source: Path | None, settings: Settings, run: RunDirectory) -> Path | None:
    """The nodes' checkpoint, if it is newer than ``source`` or that is not the run's own."""
    is_own = source is not None and run.owns(source)
    local = tier.newest(after=step_of(source) if source is not None and is_own else -1)
    if local is not None and not is_own:
        _use_own(local, settings, run)
    return local


def find_source(
    settings: Settings, run: RunDirectory, mesh: Mesh, passed_over: dict[Path, DamagedCheckpointError]
) -> tuple[Path | None, dict[Path, DamagedCheckpointError]]:
    """The checkpoint that the settings ask to load; None for a fresh run. With those that are damaged. The same on
    every rank.

    Raises :class:`CheckpointError` or :class:`ConfigError`, on every rank, if there is no such checkpoint.
    """
    # Rank 0 decides: a stale view of a shared file system must not make ranks start from different steps.
    communicator = DistributedCommunicator(mesh)
    found: Path | None = None
    with raised_by_all(communicator):
        if communicator.rank == 0:
            found = _find_source(settings, run, passed_over)
    answer = communicator.broadcast((found, passed_over))
    return cast("tuple[Path | None, dict[Path, DamagedCheckpointError]]", answer)


def _find_source(settings: Settings, run: RunDirectory, passed_over: dict[Path, DamagedCheckpointError]) -> Path | None:
    own, wanted = find_intact(run.checkpoints, passed_over), settings.checkpoint.load
    for folder, error in passed_over.items():
        if _is_named(settings, folder):
            raise error
    if own is not None:
        _use_own(own[0], settings, run)
        return own[0]
    return resolve_checkpoint(Path(wanted)) if wanted not in ("", "latest") else None


def _use_own(own: Path, settings: Settings, run: RunDirectory) -> None:
    """Warn where the settings name another checkpoint than the run's ``own``. Raises :class:`ConfigError` where the run
    is to start from the beginning; not after a failure, when torchrun repeats the command that did so."""
    wanted = settings.checkpoint.load
    if not wanted and not was_restarted():
        raise ConfigError(
            f'checkpoint.load = "" starts from the beginning, but {run.path} has checkpoints already\n'
            '  choose another run.dir, or checkpoint.load = "latest" to resume.'
        )
    if wanted not in ("", "latest"):
        log.warning("checkpoint.load = %s is not used: the run has a checkpoint of its own, %s", wanted, own)


def _is_named(settings: Settings, folder: Path) -> bool:
    """Whether ``checkpoint.load`` names this very checkpoint."""
    wanted = settings.checkpoint.load
    return wanted not in ("", "latest") and Path(wanted).resolve() == folder.resolve()


def _record(run: RunDirectory, folder: Path, error: DamagedCheckpointError) -> None:
    if run.is_writer:
        log.warning(
            "%s is damaged and passed over for the checkpoint before it: %s\n  It is replaced when the run reaches its "
            "step again.",
            folder,
            error.what,
        )
        run.event("checkpoint_passed_over", folder=str(folder), reason=error.what)

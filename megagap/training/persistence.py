"""What a checkpoint of a run holds, and which one a run goes on from."""

import logging
from pathlib import Path
from typing import Any

from megagap.checkpoint import Index, find_latest, load_slices, prune, resolve_checkpoint, save_checkpoint
from megagap.config import Settings
from megagap.errors import CheckpointError, ConfigError
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.mesh import DistributedCommunicator
from megagap.training.step import TrainState

# Settings that say which model is trained on which samples: they may not change when a run goes on.
_FIXED = {
    "model": None,  # all but what follows
    "data": ("split", "order", "sources"),
    "train": ("seed", "global_batch_size", "sequence_length", "precision"),
}
_FREE = {"preset", "initializer_range", "path"}

log = logging.getLogger(__name__)


def save(state: TrainState, run: RunDirectory) -> None:
    """Write ``checkpoints/step_NNNNNNNN`` of the state after ``state.step`` updates, and drop the oldest."""
    settings = state.settings
    folder = run.checkpoints / f"step_{state.step:08}"
    progress = {
        "step": state.step,
        "updates": state.optimizer.updates,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
    }
    slices = state.optimizer.slices(owned_only=True)
    save_checkpoint(folder, slices, progress | settings.model_dump(mode="json"), DistributedCommunicator(state.mesh))
    if run.is_writer:
        prune(run.checkpoints, settings.checkpoint.keep)
    run.event("checkpoint", folder=folder.name)
    log.info("checkpoint %s", folder)


def resume(state: TrainState, run: RunDirectory) -> None:
    """Load what the settings ask for, in whatever layout it was written; nothing for a fresh run.

    Raises :class:`CheckpointError` if it is damaged or belongs to another model or other data.
    """
    folder = choose(state.settings, run)
    if folder is None:
        return
    index = Index.read(folder)
    refuse_changes(index.state, state.settings, folder)
    load_slices(folder, index, state.optimizer.slices(owned_only=False))
    state.optimizer.updates = index.state["updates"]
    state.optimizer.gather_parameters()
    state.step = run.step = index.state["step"]
    run.event("resume", folder=str(folder))


def choose(settings: Settings, run: RunDirectory) -> Path | None:
    """The run's own newest checkpoint; without one, the folder that seeds it, if any."""
    own = find_latest(run.checkpoints)
    wanted = settings.checkpoint.load
    if own is not None:
        if not wanted:
            raise ConfigError(
                f'checkpoint.load = "" starts afresh, but {run.path} has checkpoints already\n'
                '  choose another run.dir, or checkpoint.load = "latest" to go on.'
            )
        return own
    return resolve_checkpoint(Path(wanted)) if wanted not in ("", "latest") else None


def refuse_changes(saved: dict[str, Any], settings: Settings, folder: Path) -> None:
    """Raises :class:`CheckpointError` listing every fixed setting that differs from the checkpoint's."""
    now = settings.model_dump(mode="json")
    differences = []
    for section, keys in _FIXED.items():
        for key in keys or now[section]:
            before, after = saved[section].get(key), now[section][key]
            if key not in _FREE and _essence(before) != _essence(after):
                differences.append(f"  {section}.{key} was {before}, is {after}")
    if differences:
        raise CheckpointError(
            f"{folder} belongs to another run:\n"
            + "\n".join(differences)
            + "\n  restore these settings, or choose another run.dir."
        )


def _essence(value: Any) -> Any:
    """Sources without their paths: files may move."""
    if isinstance(value, list):
        return [_essence(item) for item in value]
    return {k: v for k, v in value.items() if k not in _FREE} if isinstance(value, dict) else value

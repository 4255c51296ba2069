"""What a checkpoint of a run holds, and which one a run goes on from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagap.checkpoint import Index, find_latest, load_slices, prune, resolve_checkpoint, save_checkpoint
from megagap.checkpoint.state import Progress, RunState, read_model, read_run
from megagap.config import Model, Settings
from megagap.data.skipping import SampleNumbers
from megagap.errors import CheckpointError, ConfigError
from megagap.model.shapes import is_norm_gain
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.mesh import DistributedCommunicator
from megagap.training.datasets import skipped_ranges
from megagap.training.step import TrainState

# Settings that say which model is trained on which samples: they may not change when a run goes on.
_FIXED: dict[str, tuple[str, ...] | None] = {
    "model": None,  # every one but those in _FREE
    "data": ("split", "order", "sources"),
    "train": ("seed", "global_batch_size", "sequence_length", "precision"),
}
_FREE = {"preset", "initializer_range", "path"}

log = logging.getLogger(__name__)


def save(state: TrainState, run: RunDirectory) -> None:
    """Write ``checkpoints/step_NNNNNNNN`` of the state after ``state.step`` updates, and drop the oldest."""
    settings = state.settings
    folder = run.checkpoints / f"step_{state.step:08}"
    progress = Progress(
        step=state.step,
        updates=state.optimizer.updates,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        last_sample=last_sample(settings, state.consumed_samples),
    )
    slices = state.optimizer.slices(owned_only=True)
    saved = progress.model_dump() | settings.model_dump(mode="json")
    save_checkpoint(folder, slices, saved, DistributedCommunicator(state.mesh))
    if run.is_writer:
        prune(run.checkpoints, settings.checkpoint.keep)
    run.event("checkpoint", folder=folder.name)
    log.info("checkpoint %s", folder)


def resume(state: TrainState, run: RunDirectory) -> None:
    """Load what the settings ask for, in whatever layout it was written; nothing for a fresh run.

    Raises :class:`CheckpointError` if it is damaged or belongs to another model or other data.
    """
    # Rank 0 decides: a stale view of a shared file system must not make ranks start from different steps.
    communicator = DistributedCommunicator(state.mesh)
    own = communicator.broadcast(find_latest(run.checkpoints) if communicator.rank == 0 else None)
    assert own is None or isinstance(own, Path)
    wanted, mode = state.settings.checkpoint.load, state.settings.checkpoint.load_mode
    if own is not None and not wanted:
        raise ConfigError(
            f'checkpoint.load = "" starts afresh, but {run.path} has checkpoints already\n'
            '  choose another run.dir, or checkpoint.load = "latest" to go on.'
        )
    if own is not None:
        if wanted != "latest":
            log.warning("checkpoint.load = %s is not used: the run has a checkpoint of its own, %s", wanted, own)
        go_on(state, run, own)
    elif wanted not in ("", "latest"):
        folder = resolve_checkpoint(Path(wanted))
        go_on(state, run, folder) if mode == "continue" else take_weights(state, run, folder)


def go_on(state: TrainState, run: RunDirectory, folder: Path) -> None:
    """Take everything: the run goes on from the folder's step."""
    index = Index.read(folder)
    saved = read_run(folder, index)
    refuse_changes(saved, state.settings, folder)
    load_slices(folder, index, state.optimizer.slices(owned_only=False))
    state.optimizer.updates = saved.updates
    state.optimizer.gather_parameters()
    state.step = run.step = saved.step
    # Steps after the checkpoint were made before, and are cut from the metrics: only this event tells of them.
    run.event("resume", folder=str(folder), lost_steps=lost_steps(run) if folder.parent == run.checkpoints else 0)


def lost_steps(run: RunDirectory) -> int:
    """Steps in the metrics that lie after the run's own checkpoint, and are made again."""
    if not run.is_writer or not run.metrics.exists():
        return 0
    return sum(record["step"] > run.step for record in read_metrics(run.metrics))


def take_weights(state: TrainState, run: RunDirectory, folder: Path) -> None:
    """Take the weights only, whatever precision and gain scale they are stored in: a new run starts from them."""
    index = Index.read(folder)
    saved, gain_scale = read_model(folder, index), state.settings.model.norm_gain_scale
    refuse_another_model(saved.model_copy(update={"norm_gain_scale": gain_scale}), state.settings, folder)
    weights = [part for part in state.optimizer.slices(owned_only=False) if part.kind == "weight"]
    load_slices(folder, index, weights, cast=True)
    if saved.norm_gain_scale != gain_scale:
        for part in weights:
            if is_norm_gain(part.shard.name):
                part.tensor.mul_(saved.norm_gain_scale / gain_scale)
    state.optimizer.gather_parameters()
    run.event("load", folder=str(folder), mode="model")


def refuse_changes(saved: RunState, settings: Settings, folder: Path) -> None:
    """Raises :class:`CheckpointError` listing every setting that says what is trained on what, and differs."""
    differences = _differences(saved.model_dump(mode="json"), settings, _FIXED)
    last, now = saved.last_sample, last_sample(settings, saved.consumed_samples)
    if last != now:
        differences.append(
            f"  train.skip_samples: the last sample was number {last}, would have been {now}; "
            "only later numbers can be skipped"
        )
    _refuse(differences, folder, "another run", "restore these settings, or choose another run.dir")


def last_sample(settings: Settings, consumed: int) -> int | None:
    """The global number of the last of ``consumed`` samples; None before the first."""
    return SampleNumbers(skipped_ranges(settings)).number(consumed - 1) if consumed else None


def refuse_another_model(model: Model, settings: Settings, folder: Path) -> None:
    """Raises :class:`CheckpointError` listing what differs between a checkpoint's model and the recipe's."""
    differences = _differences({"model": model.model_dump(mode="json")}, settings, {"model": None})
    _refuse(differences, folder, "another model", "make the recipe's model like it, or load another folder")


def _refuse(differences: list[str], folder: Path, whose: str, cure: str) -> None:
    if differences:
        raise CheckpointError("\n".join([f"{folder} belongs to {whose}:", *differences, f"  {cure}."]))


def _differences(saved: dict[str, Any], settings: Settings, compared: Mapping[str, Sequence[str] | None]) -> list[str]:
    now = settings.model_dump(mode="json")
    return [
        f"  {section}.{key} was {saved[section][key]}, is {now[section][key]}"
        for section, keys in compared.items()
        for key in keys or now[section]
        if key not in _FREE and _essence(saved[section][key]) != _essence(now[section][key])
    ]


def _essence(value: Any) -> Any:
    """Sources without their paths: files may move."""
    if isinstance(value, list):
        return [_essence(item) for item in value]
    return {k: v for k, v in value.items() if k not in _FREE} if isinstance(value, dict) else value

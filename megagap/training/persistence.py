"""What a checkpoint of a run holds, and which one a run goes on from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagap.checkpoint import Index, find_latest, load_slices, prune, resolve_checkpoint, save_checkpoint
from megagap.checkpoint.save import step_folder_name
from megagap.checkpoint.state import Progress, RunState, read_model, read_run
from megagap.config import Data, Model, Settings, Span, Train, spans
from megagap.data.identity import differences
from megagap.data.samples import TrainingData
from megagap.data.skipping import SampleNumbers
from megagap.errors import CheckpointError, ConfigError, DataError
from megagap.model.shapes import is_norm_gain
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.mesh import DistributedCommunicator
from megagap.training.datasets import skipped_ranges
from megagap.training.divergence import any_not_finite
from megagap.training.step import TrainState

# Settings that say which model is trained on which samples: they may not change when a run goes on.
_FIXED: dict[str, tuple[str, ...] | None] = {
    "model": None,  # every one but those in _FREE
    "data": ("split", "order"),
    "train": ("seed", "global_batch_size", "precision"),
}
_FREE = {"preset", "initializer_range", "path"}

log = logging.getLogger(__name__)


def save(state: TrainState, run: RunDirectory, data: TrainingData) -> None:
    """Write ``checkpoints/step_NNNNNNNN`` of the state after ``state.step`` updates."""
    settings = state.settings
    folder = run.checkpoints / step_folder_name(state.step)
    progress = Progress(
        step=state.step,
        updates=state.optimizer.updates,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        last_sample=last_sample(settings, state.consumed_samples),
    )
    slices = state.optimizer.slices(owned_only=True)
    saved = progress.model_dump() | settings.model_dump(mode="json") | {"identities": data.identities()}
    saved["model"]["rope_theta"] = state.phase.rope_theta  # which the weights were last trained with
    save_checkpoint(folder, slices, saved, DistributedCommunicator(state.mesh))
    run.event("checkpoint", folder=folder.name)
    log.info("checkpoint %s", folder)


def drop_old(settings: Settings, run: RunDirectory) -> None:
    """Leave the newest ``checkpoint.keep`` checkpoints, once the newest is known to be of use."""
    if run.is_writer:
        prune(run.checkpoints, settings.checkpoint.keep)


def resume(state: TrainState, run: RunDirectory, data: TrainingData) -> None:
    """Load what the settings ask for, in whatever layout it was written; nothing for a fresh run.

    Raises :class:`CheckpointError` if it is damaged or belongs to another model or other data, and
    :class:`DataError` if a data set is not what it was.
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
        go_on(state, run, data, own)
    elif wanted not in ("", "latest"):
        folder = resolve_checkpoint(Path(wanted))
        go_on(state, run, data, folder) if mode == "continue" else take_weights(state, run, folder)


def go_on(state: TrainState, run: RunDirectory, data: TrainingData, folder: Path) -> None:
    """Take everything: the run goes on from the folder's step."""
    index = Index.read(folder)
    saved = read_run(folder, index)
    refuse_changes(saved, state.settings, folder)
    refuse_rebuilt_data(saved, data, folder)
    load_slices(folder, index, state.optimizer.slices(owned_only=False))
    refuse_not_finite(state, folder)
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
    refuse_not_finite(state, folder)
    state.optimizer.gather_parameters()
    run.event("load", folder=str(folder), mode="model")


def refuse_not_finite(state: TrainState, folder: Path) -> None:
    """Raises :class:`CheckpointError`, on every rank, if what was loaded from ``folder`` is not finite."""
    if any_not_finite(state.optimizer, state.mesh):
        raise CheckpointError(
            f"{folder} holds values that are not finite: the run that wrote it had diverged\n"
            "  go on from an earlier one: name it in checkpoint.load, or remove this folder if it is the run's own."
        )


def refuse_changes(saved: RunState, settings: Settings, folder: Path) -> None:
    """Raises :class:`CheckpointError` listing every setting that says what is trained on what, and differs."""
    same_theta = saved.model.model_copy(update={"rope_theta": settings.model.rope_theta})  # phases tell
    before = saved.model_copy(update={"model": same_theta}).model_dump(mode="json")
    differences = _differences(before, settings, _FIXED) + _past_differences(saved, settings)
    steps = saved.train.steps, settings.train.steps
    if settings.data.order == "megatron" and steps[0] != steps[1]:
        differences.append(f"  train.steps was {steps[0]}, is {steps[1]}: Megatron's order depends on it")
    then, now = (_skipped(train, saved.last_sample) for train in (saved.train, settings.train))
    if then != now:
        differences.append(
            f"  train.skip_samples: up to {saved.last_sample} it left out {then or 'none'}, now {now or 'none'}; "
            "only later numbers can be skipped"
        )
    _refuse(differences, folder, "another run", "restore these settings, or choose another run.dir")


def _past_differences(saved: RunState, settings: Settings) -> list[str]:
    """What differs between the phases up to the saved step; what lies ahead may change."""
    then, now = (
        _past(saved.data, saved.train, saved.model.rope_theta, saved.step),
        _past(settings.data, settings.train, settings.model.rope_theta, saved.step),
    )
    if [phase["steps"] for phase in then] != [phase["steps"] for phase in now]:
        borders = [", ".join(f"{phase['name']} {phase['steps']:,}" for phase in past) for past in (then, now)]
        return [f"  data.phases: the steps made were {borders[0]}; are now {borders[1]}; only later phases can change"]
    own = (
        ("sequence_length", "train.sequence_length"),
        ("rope_theta", "model.rope_theta"),
        ("sources", "data.sources"),
    )
    return [
        f"  {f'data.phases[{i}].{key}' if settings.data.phases else single} was {old[key]}, is {new[key]}"
        for i, (old, new) in enumerate(zip(then, now, strict=True))
        for key, single in own
        if _essence(old[key]) != _essence(new[key])
    ]


def _skipped(train: Train, last: int | None) -> list[tuple[int, int]]:
    """The ranges of numbers up to sample ``last`` that are left out."""
    ranges = SampleNumbers(skipped_ranges(train)).skipped
    return [(start, min(stop, last + 1)) for start, stop in ranges if start <= last] if last is not None else []


def _past(data: Data, train: Train, rope_theta: float, step: int) -> list[dict[str, Any]]:
    """The phases of the first ``step`` steps; neighbours that differ in their names only are one."""

    def told(span: Span) -> dict[str, Any]:
        own = {"sequence_length": span.sequence_length, "rope_theta": span.rope_theta}
        return own | {"sources": [source.model_dump(mode="json") for source in span.sources]}

    past: list[dict[str, Any]] = []
    for span in spans(data, train, rope_theta):
        steps = min(span.steps, step - span.first) if data.phases else step
        if steps <= 0:
            break
        if past and _essence(told(span)) == {key: _essence(past[-1][key]) for key in told(span)}:
            past[-1]["steps"] += steps
        else:
            past.append({"name": span.name, "steps": steps, **told(span)})
    return past


def refuse_rebuilt_data(saved: RunState, data: TrainingData, folder: Path) -> None:
    """Raises :class:`DataError` naming a source that is not what it was when the checkpoint was written."""
    drawn = dict(zip(data.names, data.drawn(saved.consumed_samples), strict=True))
    for name, now in data.identities().items():
        before = saved.identities.get(name)
        if before is None or not drawn[name]:
            continue  # not recorded, or nothing was read of it yet
        changes = [f"it had {len(before)} shards, has {len(now)}"] if len(before) != len(now) else []
        for i, pair in enumerate(zip(before, now, strict=False)):
            shard = f"shard {i}: " if len(now) > 1 else ""
            changes += [shard + change for change in differences(*pair)]
        if changes:
            raise DataError(
                f"source {name} was rebuilt since {folder} was written: {'; '.join(changes)}\n"
                "  put the old one back, or start a new run: what was read of it cannot be told from what was not."
            )


def last_sample(settings: Settings, consumed: int) -> int | None:
    """The global number of the last of ``consumed`` samples; None before the first."""
    return SampleNumbers(skipped_ranges(settings.train)).number(consumed - 1) if consumed else None


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

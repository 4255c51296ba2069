"""What a checkpoint of a run holds, and which one a run resumes from."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from megagap.checkpoint import Index, load_slices, save_checkpoint
from megagap.checkpoint.agreement import raised_by_all
from megagap.checkpoint.background import BackgroundSaver
from megagap.checkpoint.local import LocalTier
from megagap.checkpoint.retention import VALIDATION_LOSS
from megagap.checkpoint.save import step_folder_name
from megagap.checkpoint.state import Progress, RunState, read_ids, read_model, read_run
from megagap.config import Settings
from megagap.data.agreement import Ids, differing, is_extension
from megagap.data.identity import differences
from megagap.data.samples import TrainingData
from megagap.data.skipping import SampleNumbers
from megagap.errors import CheckpointError, ConfigError, DataError
from megagap.model.shapes import is_norm_gain, vocabulary_tensors
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.process.rendezvous import node_name
from megagap.resume.changes import (
    model_changes,
    past_changes,
    precision_changes,
    refuse_another_model,
    refuse_changes,
)
from megagap.resume.differences import Change
from megagap.resume.start import Start
from megagap.tokenizer import load_tokenizer
from megagap.training.datasets import skipped_ranges
from megagap.training.divergence import any_not_finite
from megagap.training.step import TrainState

log = logging.getLogger(__name__)


def background_saver(state: TrainState) -> BackgroundSaver:
    """What writes checkpoints beside training, with ``checkpoint.async``. Collective.

    Raises :class:`CheckpointError`, on every rank, if there is not the memory for it.
    """
    mesh = state.mesh
    communicator = DistributedCommunicator(mesh, mesh.background_levels)
    progress = (mesh.background_spans or mesh.spans).move
    return BackgroundSaver(state.optimizer.slices(owned_only=True), communicator, mesh.device, progress)


def save(
    state: TrainState,
    run: RunDirectory,
    data: TrainingData,
    validation: Mapping[str, float] | None = None,
    background: BackgroundSaver | None = None,
    since: float | None = None,
) -> None:
    """Write ``checkpoints/step_NNNNNNNN`` of the state after ``state.step`` updates; with ``background``, start to.

    ``validation``: the losses of an evaluation of this step, by source.
    ``since``: when training stopped for it, in seconds of ``time.monotonic``; None: now. Once the checkpoint is
    durable, and no sooner, the log and an event ``checkpoint`` say so.
    """
    mesh, start = state.mesh, time.monotonic() if since is None else since
    folder, step = run.checkpoints / step_folder_name(state.step), state.step
    slices, saved = state.optimizer.slices(owned_only=True), saved_state(state, data, validation)
    if background is None:
        began = time.monotonic()
        save_checkpoint(folder, slices, saved, DistributedCommunicator(mesh), progress=mesh.spans.move)
        end = time.monotonic()
        record_saved(run, folder, step, end - start, end - began)
        return

    def record(write_seconds: float) -> None:
        record_saved(run, folder, step, stall.result(), write_seconds)

    stall: Future[float] = Future()
    state.copied = background.start(folder, slices, saved, record)
    stall.set_result(time.monotonic() - start)


def record_saved(run: RunDirectory, folder: Path, step: int, stall_seconds: float, write_seconds: float) -> None:
    """Log and record a checkpoint that is durable: how long training stood still for it, and how long it took."""
    seconds = {"stall_seconds": round(stall_seconds, 4), "write_seconds": round(write_seconds, 4)}
    run.event("checkpoint", step=step, folder=folder.name, **seconds)
    log.info("checkpoint %s", folder)


def saved_state(state: TrainState, data: TrainingData, validation: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; JSON only."""
    settings, moment = state.settings, state.moment
    progress = Progress(
        step=state.step,
        updates=state.optimizer.updates,
        consumed_samples=moment.consumed_samples,
        consumed_tokens=moment.consumed_tokens,
        schedule_origin=state.timeline.schedules[-1].origin,
        last_sample=last_sample(settings, moment.consumed_samples),
    )
    saved = progress.model_dump() | settings.model_dump(mode="json") | {"identities": data.identities()}
    saved["recipe_rope_theta"] = settings.model.rope_theta
    saved["loss_scale"] = state.optimizer.loss_scale.state()
    if state.guard.history is not None:
        saved["guard_history"] = state.guard.history.state()
    saved["model"]["rope_theta"] = moment.rope_theta  # which the weights were last trained with
    if validation:
        saved[VALIDATION_LOSS] = sum(validation.values()) / len(validation)
    if data.ids is not None:
        saved["ids"] = data.ids.record()
    return saved


def open_local_tier(settings: Settings, run: RunDirectory, mesh: Mesh) -> LocalTier | None:
    """The run's checkpoints on the nodes' disks, if ``checkpoint.local_dir`` says where. Collective; raises as
    :meth:`LocalTier.open`."""
    if not settings.checkpoint.local_dir:
        return None
    tier = LocalTier.open(settings.checkpoint.local_dir, run.path, node_name(), mesh)
    run.local = tier.folder
    return tier


def require_loadable(settings: Settings, run: RunDirectory, source: Path | None) -> int:
    """Compare the settings with those of ``source``, before a model is built that it may not fit.

    Returns the steps after which the learning-rate schedule of this start begins: 0 unless the steps go on from those
    of ``source``; a branch has a schedule of its own from there.
    Raises :class:`CheckpointError` if it is damaged, or belongs to another model or run.
    """
    if source is None:
        return 0
    index, mode = _read_index(source, run), _mode(settings, run, source)
    if mode == "model":
        same_gain_scale = {"norm_gain_scale": settings.model.norm_gain_scale}
        refuse_another_model(read_model(source, index).model_copy(update=same_gain_scale), settings, source)
        return 0
    saved = read_run(source, index)
    if mode == "model+data":  # whose moments are new
        saved = saved.model_copy(update={"optim": saved.optim.model_copy(update={"name": settings.optim.name})})
    refuse_changes(saved, settings, source)
    if mode == "continue":
        return saved.schedule_origin
    refuse_short_branch(saved, settings, source)
    return saved.step


def _mode(settings: Settings, run: RunDirectory, source: Path) -> str:
    """``checkpoint.load_mode``, which is about the checkpoints of other runs: a run continues from its own."""
    return "continue" if run.owns(source) else settings.checkpoint.load_mode


def refuse_short_branch(saved: RunState, settings: Settings, source: Path) -> None:
    """Raises :class:`ConfigError` if a branch would end before its learning-rate schedule does."""
    steps, optim = settings.train.steps, settings.optim
    least = max(1, optim.warmup_steps + optim.cooldown_steps)
    if steps < saved.step + least:
        raise ConfigError(
            f"train.steps = {steps} counts the steps of the run that this one branches off, too, and {source} has "
            f"{saved.step}\n  set it to {saved.step} and the steps of the branch: at least {saved.step + least}."
        )


def _read_index(source: Path, run: RunDirectory) -> Index:
    """On its own disk a node has some of the files, and fetches others that it needs."""
    return Index.read(source, whole=source.parent != run.local)


def load(
    state: TrainState, run: RunDirectory, data: TrainingData, source: Path | None, tier: LocalTier | None = None
) -> Start:
    """Load ``source``, which :func:`require_loadable` accepted, in whatever layout it was written. ``tier``: whose
    checkpoint it is, if it is on the nodes' disks.

    Raises :class:`CheckpointError` if it is damaged, and :class:`DataError` if a data set is not what it was.
    """
    if source is None:
        return Start()
    if _mode(state.settings, run, source) == "model":
        return load_weights(state, run, data, source)
    if tier is not None and source.parent == run.local:
        tier.fetch(state.optimizer.slices(owned_only=False))
    return resume(state, run, data, source)


def resume(state: TrainState, run: RunDirectory, data: TrainingData, folder: Path) -> Start:
    """The run continues from the folder's step, with all that ``checkpoint.load_mode`` asks for."""
    index = _read_index(folder, run)
    saved = read_run(folder, index)
    refuse_rebuilt_data(saved, data, folder)
    compare_ids(read_ids(folder, index), data.ids, state.settings)
    changes = past_changes(saved, state.settings) + model_changes(saved.model, state.settings.model)
    log_model_changes(changes, run, folder)
    stored = index.tensor(folder, "weight", index.names("weight")[0]).torch_dtype
    precision = precision_changes(saved.train, state.settings.train, stored, state.optimizer.master_dtype)
    for change in precision:
        log.info("changed since %s: %s", folder.name, change)
    is_own, mode = run.owns(folder), _mode(state.settings, run, folder)
    has_moments = mode != "model+data"
    slices = state.optimizer.slices(owned_only=False)
    may_grow = vocabulary_tensors(state.settings.model)
    needed = [part for part in slices if has_moments or part.kind == "weight"]
    with raised_by_all(DistributedCommunicator(state.mesh)):
        # train.precision, optim.rounding and moments_dtype may change.
        load_slices(folder, index, needed, cast=True, may_grow=may_grow)
    refuse_not_finite(state, folder)
    state.optimizer.updates = saved.updates if has_moments else 0
    if has_moments:
        state.optimizer.loss_scale.load_state(saved.loss_scale)
    if state.guard.history is not None:
        state.guard.history.load_state(saved.guard_history)
    state.optimizer.store.gather_parameters()
    state.step = run.step = saved.step
    # Steps after the checkpoint were made before, and are cut from the metrics: only this event records them.
    run.event("resume", folder=str(folder), mode=mode, lost_steps=lost_steps(run) if is_own else 0)
    return Start(saved.step, folder, mode, is_own, saved.step, index.state, (*changes, *precision))


def lost_steps(run: RunDirectory) -> int:
    """Steps in the metrics that lie after the run's own checkpoint, and are made again."""
    if not run.is_writer or not run.metrics.exists():
        return 0
    return sum(record["step"] > run.step for record in read_metrics(run.metrics))


def load_weights(state: TrainState, run: RunDirectory, data: TrainingData, folder: Path) -> Start:
    """Load the weights only, whatever precision and gain scale they are stored in: a new run starts from them."""
    index = Index.read(folder)
    saved, gain_scale = read_model(folder, index), state.settings.model.norm_gain_scale
    compare_ids(read_ids(folder, index), data.ids, state.settings, refuse=False)
    changes = model_changes(saved, state.settings.model, theta=True)
    log_model_changes(changes, run, folder)
    weights = [part for part in state.optimizer.slices(owned_only=False) if part.kind == "weight"]
    with raised_by_all(DistributedCommunicator(state.mesh)):
        load_slices(folder, index, weights, cast=True, may_grow=vocabulary_tensors(state.settings.model))
    if saved.norm_gain_scale != gain_scale:
        for part in weights:
            if is_norm_gain(part.shard.name):
                part.write(part.read() * (saved.norm_gain_scale / gain_scale))
    refuse_not_finite(state, folder)
    state.optimizer.store.gather_parameters()
    run.event("load", folder=str(folder), mode="model")
    step = index.state.get("step") if "train" in index.state else None  # an imported model comes from no run
    return Start(0, folder, "model", False, step if isinstance(step, int) else None, {}, tuple(changes))


def compare_ids(before: Ids | None, now: Ids | None, settings: Settings, refuse: bool = True) -> None:
    """Warn of ids that differ from the checkpoint's. The recipe's tokenizer may have added tokens.

    ``refuse``: raise :class:`DataError` if ids mean different tokens; a new run may still start from the weights.
    """
    spec = settings.data.tokenizer
    if before is None or now is None:
        return
    extended = before.fingerprint != now.fingerprint and bool(spec) and is_extension(before, load_tokenizer(spec))
    if extended:
        before = replace(before, fingerprint=now.fingerprint)
    if refuse and before.fingerprint != now.fingerprint:
        raise DataError(
            f"{differing(before, now)[-1]}\n  resume with data and a tokenizer of the same vocabulary. It may have "
            "tokens added after the others: name it in data.tokenizer."
        )
    for difference in differing(before, now):
        log.warning("%s", difference)


def log_model_changes(changes: list[Change], run: RunDirectory, folder: Path) -> None:
    """Log and record how the model differs from that of the checkpoint."""
    for change in changes:
        log.info("changed since %s: %s", folder.name, change)
    if changes:
        run.event("model_changed", folder=str(folder), changes=list(map(str, changes)))


def refuse_not_finite(state: TrainState, folder: Path) -> None:
    """Raises :class:`CheckpointError`, on every rank, if what was loaded from ``folder`` is not finite."""
    if any_not_finite(state.optimizer, state.mesh):
        raise CheckpointError(
            f"{folder} has values that are not finite: the run that wrote it had diverged\n"
            "  resume from an earlier one: name it in checkpoint.load, or remove this folder if it is the run's own."
        )


def refuse_rebuilt_data(saved: RunState, data: TrainingData, folder: Path) -> None:
    """Raises :class:`DataError` naming a source that is not what it was when the checkpoint was written."""
    drawn = dict(zip(data.names, data.drawn(saved.consumed_samples), strict=True))
    for name, now in data.identities().items():
        before = saved.identities.get(name)
        if before is None or not drawn[name]:
            continue  # not recorded, or nothing was read of it yet
        changes = [f"shards: it had {len(before)}, has {len(now)}"] if len(before) != len(now) else []
        for i, pair in enumerate(zip(before, now, strict=False)):
            shard = f"shard {i}: " if len(now) > 1 else ""
            changes += [shard + change for change in differences(*pair)]
        if changes:
            raise DataError(
                f"source {name} was rebuilt since {folder} was written: {'; '.join(changes)}\n"
                "  put the old one back, or start a new run: which of its samples were read is no longer known."
            )


def last_sample(settings: Settings, consumed: int) -> int | None:
    """The global number of the last of ``consumed`` samples; None before the first."""
    return SampleNumbers(skipped_ranges(settings.train)).number(consumed - 1) if consumed else None

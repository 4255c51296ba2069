"""How a start of a run begins: from which weights, with which settings changed, at which learning rate."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagap.checkpoint.index import INDEX_NAME
from megagap.checkpoint.save import step_folders, step_of
from megagap.config import Settings, timeline_of
from megagap.errors import DataError
from megagap.observe.run_directory import RunDirectory, layout
from megagap.parallel.mesh import Mesh
from megagap.resume.differences import Change, differences
from megagap.run_files import CONFIG
from megagap.timeline import Timeline

log = logging.getLogger(__name__)

_OF_THE_START = {"run.dir", "checkpoint.load", "checkpoint.load_mode"}
"""Settings that necessarily differ between a run and the one that it branches from."""


@dataclass(frozen=True)
class Start:
    """Where a start takes its weights from."""

    step: int = 0
    """The run's steps made before."""
    folder: Path | None = None
    """The checkpoint that was loaded; None: initial weights."""
    mode: str = "continue"
    """What was loaded of it, as in ``checkpoint.load_mode``."""
    is_own: bool = False
    """Whether it is a checkpoint of this run."""
    written_at: int | None = None
    """The step at which it was written, if it says so."""
    saved: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the run that wrote it, by section; empty where only weights were loaded."""
    model_changes: tuple[Change, ...] = ()
    """Logged already: what differs from the model that the weights were trained with, and from its precision."""

    def __str__(self) -> str:
        if self.folder is None:
            return "from scratch"
        if self.mode == "model":
            origin = "" if self.written_at is None else f", written at step {self.written_at:,} of its run"
            return f'from step 0 with the weights of {self.folder}{origin} (load_mode "{self.mode}")'
        if self.is_own:
            return f"from step {self.step:,}, resumed from {self.folder}"
        taken = "weights" if self.mode == "model+data" else "weights and optimizer state"
        anew = "" if self.mode == "continue" else " and a learning-rate schedule that starts anew"
        return f'from step {self.step:,}, with {taken} of {self.folder}{anew} (load_mode "{self.mode}")'


def settings_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint's state or a config.toml as JSON values; those that it lacks have their default,
    unless others in it cannot be used."""
    tree = {name: saved[name] for name in Settings.model_fields if name in saved}
    try:
        return Settings.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def record_changes(start: Start, settings: Settings, mesh: Mesh, run: RunDirectory) -> None:
    """Log every setting that changed since the run's last start, or since the checkpoint of another run that this one
    continues, and record them as the event ``settings_changed``. Where one changed, the last config is kept.

    Call it before :meth:`RunDirectory.begin`, which replaces config.toml and environment.json.
    Raises :class:`DataError` if the run directory cannot be written.
    """
    if not run.is_writer:
        return
    since, before, kept = _last_settings(start, run)
    found = differences(before, settings.model_dump(mode="json")) if before else ()
    changes = [change for change in found if not _means_the_same(change)]
    if since != _LAST_START:
        changes = [change for change in changes if change.setting not in _OF_THE_START]
    if kept is None and changes and since == _LAST_START:
        kept = run.keep_config(start.step)
    changed = {change.setting for change in changes}
    for change in differences(run.last_layout() or layout(mesh), layout(mesh)):
        if change.setting.replace("layout.", "parallel.") not in changed:
            changes.append(change)

    logged = {change.setting for change in start.model_changes}
    for change in changes:
        if change.setting not in logged:
            log.info("changed since %s: %s", since, change)
    if kept is not None:
        log.info("the previous %s was saved as %s", CONFIG, kept)
    if changes:
        run.event("settings_changed", since=since, changes=[change.as_dict() for change in changes], config_before=kept)


def _means_the_same(change: Change) -> bool:
    """Whether only the spelling changed: a path as another folder's recipe has it, or a preset written out."""
    if not change.setting.endswith((".path", ".tokenizer", ".tasks")):
        return change.setting == "model.preset"
    before, after = (_real_paths(value) for value in (change.before, change.after))
    return before == after


def _real_paths(value: Any) -> list[str]:
    return [os.path.realpath(path) for path in ([value] if isinstance(value, str) else value or []) if path]


_LAST_START = "the last start"


def _last_settings(start: Start, run: RunDirectory) -> tuple[str, dict[str, Any] | None, str | None]:
    """Since when changes are listed, the settings of then, and as what a config that cannot be compared is kept."""
    kept = None
    try:
        if (config := run.last_config()) is not None:
            return _LAST_START, settings_of(config), None
    except DataError as error:
        kept = run.keep_config(start.step)
        log.warning("%s\n  changed settings are not listed from it; it is kept as %s.", error.args[0], kept)
    if start.folder is None or not start.saved:
        return "", None, kept
    before = settings_of(start.saved)
    # A checkpoint's rope_theta is that of its phase.
    if theta := start.saved.get("recipe_rope_theta"):
        before["model"]["rope_theta"] = theta
    return start.folder.name, before, kept


def warn_of_rising_rate(start: Start, timeline: Timeline, run: RunDirectory) -> None:
    """Warn where the learning rate had begun to fall and rises again, as after raising ``train.steps`` of a run in or
    past its cooldown; the event ``learning_rate_rises`` records it."""
    decay = _decay_of(start, run)
    if decay is None or start.mode in ("model+data", "model+optimizer+data"):  # another course is asked for
        return
    rate = timeline.at(start.step + 1).lr
    if rate <= decay.rate:
        return
    log.warning(
        "the learning rate rises again: %.3g at step %d, %.3g at step %d; %s, so what it has gained is partly undone"
        "\n  %s.",
        decay.rate,
        start.step,
        rate,
        start.step + 1,
        decay,
        decay.instead(),
    )
    run.event("learning_rate_rises", before=decay.rate, after=rate)


@dataclass(frozen=True)
class _Decay:
    """A fall of the learning rate in which a checkpoint was written."""

    checkpoint: Path
    siblings: Path
    """Folder of the run's checkpoints that last."""
    schedule: str
    last_full: int
    """The last step before the fall."""
    rate: float
    """The rate of the checkpoint's step."""

    def __str__(self) -> str:
        kind = "cooldown" if self.schedule == "wsd" else f"{self.schedule} decay"
        return f"its {kind} had begun after step {self.last_full}"

    def instead(self) -> str:
        """What to do to train longer, as an imperative."""
        if self.schedule != "wsd":
            return (
                f"A {self.schedule} schedule cannot be extended: keep train.steps, or start a new run from these "
                f"weights with a schedule of its own (--checkpoint.load {self.checkpoint} --checkpoint.load_mode model)"
            )
        folders = [folder for folder in step_folders(self.siblings) if (folder / INDEX_NAME).is_file()]
        before = [folder for folder in folders if step_of(folder) <= self.last_full]
        if before:
            return (
                "To train longer, branch from the checkpoint before the cooldown instead: "
                f"another run.dir, with --checkpoint.load {before[-1]}"
            )
        return (
            "To train longer, branch from a checkpoint before the cooldown; there is none in "
            f"{self.siblings}: next time keep one, with checkpoint.every and checkpoint.keep"
        )


def _decay_of(start: Start, run: RunDirectory) -> _Decay | None:
    """The fall of the learning rate in which ``start``'s checkpoint was written; None before one, and where its
    settings are not known."""
    if start.folder is None or not start.saved:
        return None
    try:
        before = Settings.model_validate(settings_of(start.saved))
    except ValidationError:
        return None
    optim, steps, origin = before.optim, before.train.steps, start.saved.get("schedule_origin", 0)
    last_full = {"constant": steps, "wsd": steps - optim.cooldown_steps}.get(
        optim.schedule, origin + optim.warmup_steps
    )
    if start.step <= last_full:
        return None
    siblings = run.checkpoints if start.is_own else start.folder.parent  # those on a node's disk are gone soon
    return _Decay(start.folder, siblings, optim.schedule, last_full, timeline_of(before, origin).at(start.step).lr)

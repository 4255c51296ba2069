"""Where the model's settings come from that a recipe leaves out: a preset, or the checkpoint that a run starts from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.config.faults import Fault
from megagap.config.paths import run_directory, unusable_text
from megagap.config.presets import presets
from megagap.config.settings import Model


@dataclass(frozen=True)
class StoredModel:
    """The model of a checkpoint that a run starts from."""

    checkpoint: Path
    settings: Model


FindModel = Callable[[Path, str, str], StoredModel | None]
"""Given a run directory, ``checkpoint.load`` and ``checkpoint.load_mode``: the model of the checkpoint that a run with
these settings starts from; None if there is none. Raises :class:`CheckpointError` for one that is missing or damaged.
:func:`megagap.checkpoint.find_model` is what programs pass."""


def apply_preset(tree: dict[str, Any]) -> Iterator[Fault]:
    model = tree.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or not name:
        return  # no preset, or one that validation reports
    if name not in presets():
        yield Fault("model.preset", name, f"unknown; possible: {', '.join(presets())}")
        return
    tree["model"] = presets()[name] | model


def _missing(tree: dict[str, Any]) -> list[str]:
    """The required settings of ``[model]`` that are not given; none if it is not a table."""
    given = tree.get("model", {})
    required = [key for key, field in Model.model_fields.items() if field.is_required()]
    return [key for key in required if key not in given] if isinstance(given, dict) else []


def find_stored(tree: dict[str, Any], path: Path, find_model: FindModel) -> StoredModel | None:
    """The model that completes ``[model]``, where it is not complete."""
    checkpoint, run = tree.get("checkpoint", {}), tree.get("run", {})
    if not isinstance(checkpoint, dict) or not isinstance(run, dict) or not _missing(tree) or _names_preset(tree):
        return None
    load, mode, place = checkpoint.get("load", "latest"), checkpoint.get("load_mode", "continue"), run.get("dir", "")
    if not all(isinstance(text, str) and not unusable_text(text) for text in (load, mode, place)):
        return None  # reported by _validate
    return find_model(run_directory(place, path), load, mode)


def _names_preset(tree: dict[str, Any]) -> bool:
    """Whether a preset is named: one that is unknown has been reported by :func:`apply_preset`."""
    return bool(tree.get("model", {}).get("preset"))


def missing_settings(tree: dict[str, Any], path: Path) -> Iterator[Fault]:
    missing = _missing(tree)
    if not missing or _names_preset(tree):
        return
    checkpoint, run = tree.get("checkpoint", {}), tree.get("run", {})
    is_resumed = isinstance(checkpoint, dict) and checkpoint.get("load", "latest") == "latest"
    place = run.get("dir") if isinstance(run, dict) else None
    place = place if isinstance(place, str) and place else f"runs/{path.stem}"
    yield Fault(
        "model",
        None,
        f"needs {', '.join(f'model.{key}' for key in missing)}\n"
        f"    or choose a model.preset that has them: {', '.join(presets())}\n"
        "    or leave them out where weights are loaded, and they come from the checkpoint: checkpoint.load = a folder"
        + (f", or a run.dir with checkpoints ({place} has none)" if is_resumed else ""),
    )


def origin_notes(stored: StoredModel | None, model: Model) -> Iterator[str]:
    """For the log: which checkpoint ``model`` was completed from, and what the recipe has otherwise."""
    if stored is None:
        return
    before, now = (settings.model_dump(exclude={"preset"}) for settings in (stored.settings, model))
    own = [f"{key} = {now[key]}" for key in now if now[key] != before[key]]
    yield f"[model] comes from {stored.checkpoint}" + (f", with the recipe's {', '.join(own)}" if own else "")

"""What a checkpoint holds, told without loading it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from megagap.checkpoint.index import DTYPES, INDEX_NAME, DamagedCheckpointError, Index
from megagap.checkpoint.node_folders import IN_USE
from megagap.checkpoint.retention import VALIDATION_LOSS
from megagap.checkpoint.save import UNFINISHED, read_latest, step_folders
from megagap.checkpoint.verify import Damage, check_headers, find_damage
from megagap.errors import CheckpointError
from megagap.files import file_errors

# Long, and of use to the run alone.
_NO_SETTINGS = ("identities", "guard_history", "ids", "loss_scale")


def describe(folder: Path, index: Index) -> dict[str, Any]:
    """The checkpoint ``folder`` as JSON: its step, sizes, tensors by kind, and ``settings``, the rest of its state."""
    state = index.state
    train = state.get("train")
    return {
        "checkpoint": str(folder),
        "step": state.get("step"),
        "consumed_tokens": state.get("consumed_tokens"),
        "validation_loss": state.get(VALIDATION_LOSS),
        "precision": train.get("precision") if isinstance(train, dict) else None,
        "parameters": sum(prod(tensor.shape) for tensor in index.tensors if tensor.kind == "weight"),
        "parallel": state.get("parallel"),
        "bytes": sum(file.size for file in index.files),
        "files": {file.name: file.size for file in index.files},
        "tensors": kinds_of(index),
        "settings": {name: value for name, value in state.items() if name not in _NO_SETTINGS},
    }


def kinds_of(index: Index) -> dict[str, dict[str, Any]]:
    """By kind (weights and moments): how many tensors, elements, bytes and chunks, and in which dtypes."""
    kinds: dict[str, dict[str, Any]] = {}
    for tensor in index.tensors:
        kind = kinds.setdefault(tensor.kind, {"tensors": 0, "elements": 0, "bytes": 0, "chunks": 0, "dtypes": []})
        elements = prod(tensor.shape)
        kind["tensors"] += 1
        kind["elements"] += elements
        kind["bytes"] += elements * DTYPES[tensor.dtype].itemsize
        kind["chunks"] += len(tensor.chunks)
        kind["dtypes"] = sorted({*kind["dtypes"], tensor.dtype})
    return kinds


def is_part(folder: Path) -> bool:
    """Whether this is a node's part of a checkpoint on the nodes' disks, and others have the rest.

    Raises :class:`CheckpointError` if its index is damaged.
    """
    if not (folder.parent / IN_USE).is_file():
        return False
    return not all((folder / file.name).exists() for file in Index.read(folder, whole=False).files)


@dataclass(frozen=True)
class Listed:
    """One of a run's checkpoints."""

    checkpoint: str
    step: int | None
    bytes: int | None
    validation_loss: float | None
    is_latest: bool
    state: str
    """``whole`` as far as it was read, ``damaged``, ``incomplete``, or ``unusable``: intact, but not understood."""
    reason: str = ""
    """Why it is not whole."""
    damage: tuple[Damage, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_checkpoints(
    checkpoints: Path, verify: bool, progress: Callable[[int], object] = lambda done: None
) -> list[Listed]:
    """All that lie in a run's folder, oldest first, then what was never completed. ``verify``: read every byte. A run
    may write and remove some meanwhile.

    Raises :class:`CheckpointError` if the folder cannot be read.
    """
    with file_errors(f"cannot read {checkpoints}", checkpoints, CheckpointError):
        latest, folders = read_latest(checkpoints), step_folders(checkpoints)
        unfinished = sorted(path for path in checkpoints.glob(f"{UNFINISHED}*") if path.is_dir())
    listed = [_listed(folder, folder == latest, verify, progress) for folder in folders]
    # What a run has removed meanwhile was not damaged: it has lost its name before its files.
    listed = [each for folder, each in zip(folders, listed, strict=True) if folder.exists()]
    reason = "it is being written or removed, or a killed run left it"
    return listed + [Listed(path.name, None, None, None, False, "incomplete", reason) for path in unfinished]


def _listed(folder: Path, is_latest: bool, verify: bool, progress: Callable[[int], object]) -> Listed:
    if not (folder / INDEX_NAME).is_file():
        return Listed(folder.name, None, None, None, is_latest, "incomplete", f"it has no {INDEX_NAME}")
    try:
        if is_part(folder):
            return Listed(folder.name, None, None, None, is_latest, "incomplete", "other nodes have the rest of it")
        index = Index.read(folder)
        step, loss = index.state.get("step"), index.state.get(VALIDATION_LOSS)
        damage = find_damage(folder, index, progress) if verify else ()
        if not verify:
            check_headers(folder, index)
    except CheckpointError as error:
        is_damaged = isinstance(error, DamagedCheckpointError)
        reason = error.what if isinstance(error, DamagedCheckpointError) else str(error.args[0]).partition("\n")[0]
        return Listed(folder.name, None, None, None, is_latest, "damaged" if is_damaged else "unusable", reason)
    size = sum(file.size for file in index.files)
    return Listed(
        folder.name,
        step if isinstance(step, int) else None,
        size,
        loss if isinstance(loss, float) else None,
        is_latest,
        "damaged" if damage else "whole",
        damage[0].reason if damage else "",
        damage,
    )

"""Checkpoints on the nodes' own disks: which files of which checkpoint lie where.

    LOCAL_DIR/RUN-0123456789abcdef/      (checkpoint/lineage.py names it)
      node_00000/
        step_00000100/
          rank_00000.safetensors …       what this node's ranks own, and a copy of what those of the node before own
          index.json                     of all ranks' files; the same text on every node
        in_use                           which start of the run writes here

Each node writes below a folder of its own, so that a disk that several nodes see does no harm. Files belong to one
checkpoint if their folders have the same index, to the byte: it holds the checksum of every chunk.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megagap.checkpoint.index import INDEX_NAME, Index, checksum, damaged
from megagap.checkpoint.save import UNFINISHED, step_folder_name, step_folders, step_of
from megagap.errors import CheckpointError

IN_USE = "in_use"


def node_folder(root: Path, node: int) -> Path:
    """Where node number ``node`` writes."""
    return root / f"node_{node:05}"


def node_folders(root: Path) -> list[Path]:
    """Of all nodes that have written to this disk."""
    return sorted(path for path in root.glob("node_*") if path.is_dir())


@dataclass(frozen=True)
class Key:
    """What the parts of one checkpoint have in common."""

    step: int
    index: str
    """The checksum of index.json."""


@dataclass(frozen=True)
class Part:
    """A node's part of a checkpoint, as its disk has it."""

    key: Key
    start: int
    """The number of the start of the run that wrote it."""
    folder: Path
    present: frozenset[str]
    """The files that are there with the size that the index promises."""
    total: int
    """How many files the whole checkpoint has."""


def key_of(step: int, text: bytes) -> Key:
    """``text``: of index.json."""
    return Key(step, checksum(text))


def find_parts(root: Path) -> tuple[list[Part], list[str]]:
    """The parts on this disk whose index is sound, and what is wrong with the others."""
    parts, faults = [], []
    for folder in (step for node in node_folders(root) for step in step_folders(node)):
        try:
            parts.append(_read_part(folder))
        except CheckpointError as error:
            faults.append(str(error.args[0]))
        except OSError as error:
            faults.append(f"cannot read {folder}: {error.strerror}")
    return parts, faults


def folders_of(root: Path, key: Key) -> list[Path]:
    """The folders on this disk that have parts of a checkpoint."""
    found = []
    for folder in (node / step_folder_name(key.step) for node in node_folders(root)):
        with suppress(OSError):
            if key_of(key.step, (folder / INDEX_NAME).read_bytes()) == key:
                found.append(folder)
    return found


def _read_part(folder: Path) -> Part:
    index = Index.read(folder, whole=False)
    step, start = index.state.get("step"), index.state.get("start")
    if step != step_of(folder) or not isinstance(start, int):
        raise damaged(folder, f"its index is that of step {step}, start {start}")
    present = frozenset(file.name for file in index.files if _size(folder / file.name) == file.size)
    return Part(key_of(step, (folder / INDEX_NAME).read_bytes()), start, folder, present, len(index.files))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def remove(folder: Path) -> None:
    """Remove a step's folder, which does not look like a checkpoint meanwhile. Raises OSError."""
    doomed = folder.with_name(f"{UNFINISHED}{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """What killed runs left in a node's folder."""
    for stale in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(stale, ignore_errors=True)

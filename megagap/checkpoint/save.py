"""Writing a checkpoint, so that it is either complete or absent.

Each rank writes and syncs a file of what it owns into a temporary folder; rank 0 gathers what was written, checks that
every element is there exactly once, writes the index, renames the folder, and points ``latest`` at it. If one
rank fails, all fail: none waits for it, and nothing is committed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from megagap.checkpoint.index import (
    DTYPE_NAMES,
    INDEX_NAME,
    Chunk,
    Index,
    Rectangle,
    StoredFile,
    StoredTensor,
    checksum,
    rectangles,
)
from megagap.errors import CheckpointError, system_reason
from megagap.files import file_errors, publish, write_text
from megagap.parallel.communicator import Communicator, SingleProcess
from megagap.parallel.shard import Shard, Slice

LATEST = "latest"
"""Text file beside the checkpoints: the folder name of the one to resume from."""

STEP_FOLDER = re.compile(r"step_([0-9]{1,18})")

UNFINISHED = "partial_"
"""Prefix of the name of a folder that is being written or removed."""


@dataclass(frozen=True)
class _Entry:
    """A chunk and the tensor it is part of, as the rank that wrote it knows them."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: Chunk


@dataclass(frozen=True)
class _Outcome:
    """What one rank reports: its file and chunks, or its fault."""

    file: StoredFile | None = None
    entries: tuple[_Entry, ...] = ()
    fault: str | None = None


def save_checkpoint(
    folder: Path,
    slices: Iterable[Slice],
    state: dict[str, Any],
    communicator: Communicator | None = None,
    *,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Write ``folder``, a checkpoint of all ranks' slices and rank 0's ``state``. Every rank calls it.

    ``slices``: what this rank owns; over all ranks every element of every tensor occurs exactly once.
    ``state``: small values, JSON only. ``communicator``: None for a single process.
    ``progress`` is called with the bytes of each piece that this rank has written.
    An existing checkpoint of this name is replaced, and its parent's stale unfinished ones are removed.
    Raises :class:`CheckpointError` on every rank, and leaves nothing behind, if any rank fails.
    """
    communicator = communicator or SingleProcess()
    is_first = communicator.rank == 0
    partial = folder.with_name(UNFINISHED + folder.name)
    fault = None
    if is_first:
        try:
            _make_empty(partial)
        except OSError as error:
            fault = f"cannot make {partial}: {system_reason(error)}"
    _raise_everywhere(folder, fault, communicator)

    cause: Exception | None = None
    try:
        outcome = _write_rank(partial / f"rank_{communicator.rank:05}.safetensors", slices, progress)
    # Whatever it is, the other ranks must be told instead of waiting.
    except Exception as error:
        cause = error
        outcome = _Outcome(fault=f"rank {communicator.rank}: {_describe(error)}")
    outcomes = cast("list[_Outcome] | None", communicator.gather(outcome))
    if outcomes is not None:
        try:
            fault = _commit(folder, partial, outcomes, state)
        except Exception as error:
            cause, fault = error, _describe(error)
        if fault:
            shutil.rmtree(partial, ignore_errors=True)
    _raise_everywhere(folder, fault, communicator, cause)


def remove(path: Path) -> None:
    """A folder with its contents; for a link (a checkpoint moved to another disk, for example) only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def step_folder_name(step: int) -> str:
    """The name of the checkpoint after ``step`` steps."""
    return f"step_{step:08}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def step_folders(checkpoints: Path) -> list[Path]:
    """The folders named as checkpoints, oldest step first."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def point_latest_at(folder: Path) -> None:
    """Let ``latest`` name this checkpoint. Raises :class:`CheckpointError` if it cannot be written."""
    with file_errors(f"cannot write {folder.parent / LATEST}", folder.parent / LATEST, CheckpointError):
        write_text(folder.parent / LATEST, folder.name + "\n")


def read_latest(checkpoints: Path) -> Path | None:
    """The folder that ``latest`` names, if it names a complete checkpoint beside it."""
    try:
        name = (checkpoints / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = checkpoints / name
    return folder if STEP_FOLDER.fullmatch(name) and (folder / INDEX_NAME).is_file() else None


def _make_empty(partial: Path) -> None:
    """Make the temporary folder, and remove those that killed runs left."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for stale in {partial, *partial.parent.glob(f"{UNFINISHED}step_*")}:
        remove(stale)
    partial.mkdir()


def _write_rank(path: Path, slices: Iterable[Slice], progress: Callable[[int], object]) -> _Outcome:
    """Write and sync one rank's safetensors file, in which every rectangle of every slice is a tensor."""
    # Wider elements first keep every tensor aligned, as the format requires.
    ordered = sorted(slices, key=lambda part: -part.dtype.itemsize)
    pieces: list[list[Rectangle]] = [_global_rectangles(part) for part in ordered]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for part, rects in zip(ordered, pieces, strict=True):
        for offsets, sizes in rects:
            end = position + prod(sizes) * part.dtype.itemsize
            key = "/".join((part.kind, part.shard.name, "_".join(map(str, offsets))))
            dtype = DTYPE_NAMES[part.dtype]
            header[key] = {"dtype": dtype, "shape": sizes, "data_offsets": (position, end)}
            position = end
    if not position:
        return _Outcome()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    preamble = len(text).to_bytes(8, "little") + text

    entries = []
    with open(path, "wb") as file:
        file.write(preamble)
        position = len(preamble)
        for part, rects in zip(ordered, pieces, strict=True):
            data = part.read().detach().cpu().view(torch.uint8).numpy().data
            done = 0
            for offsets, sizes in rects:
                length = prod(sizes) * part.dtype.itemsize
                piece = data[done : done + length]
                file.write(piece)
                progress(length)
                chunk = Chunk(
                    offsets=offsets,
                    sizes=sizes,
                    file=path.name,
                    begin=position,
                    end=position + length,
                    checksum=checksum(piece),
                )
                dtype = DTYPE_NAMES[part.dtype]
                entries.append(_Entry(part.kind, part.shard.name, part.shard.shape, dtype, chunk))
                done += length
                position += length
        file.flush()
        os.fsync(file.fileno())
    stored = StoredFile(name=path.name, size=position, header_size=len(preamble), header_checksum=checksum(preamble))
    return _Outcome(stored, tuple(entries))


def _global_rectangles(part: Slice) -> list[Rectangle]:
    """The rectangles of a slice, in coordinates of the global tensor."""
    assert part.tensor.shape == (part.stop - part.start,), (part.kind, part.shard.name, part.tensor.shape)
    assert 0 <= part.start <= part.stop <= part.shard.numel, (part.kind, part.shard.name, part.start, part.stop)
    return [
        (shift(offsets, part.shard), sizes) for offsets, sizes in rectangles(part.shard.sizes, part.start, part.stop)
    ]


def shift(offsets: tuple[int, ...], shard: Shard) -> tuple[int, ...]:
    """From coordinates of the local part to those of the global tensor."""
    return tuple(own + inner for own, inner in zip(shard.offsets, offsets, strict=True))


def _commit(folder: Path, partial: Path, outcomes: list[_Outcome], state: dict[str, Any]) -> str | None:
    """Make the written files a checkpoint. Returns a fault that the ranks reported."""
    faults = [outcome.fault for outcome in outcomes if outcome.fault]
    if faults:
        return "\n  ".join(faults)
    index = Index(
        files=tuple(outcome.file for outcome in outcomes if outcome.file),
        tensors=_collect(entry for outcome in outcomes for entry in outcome.entries),
        state=state,
    )
    index.validate_against(partial)
    write_text(partial / INDEX_NAME, index.to_json())
    replaced = folder.with_name(f"{UNFINISHED}{folder.name}.replaced")
    if folder.exists():
        # A folder cannot be renamed over another that has files: move it aside for the moment in between.
        os.replace(folder, replaced)
    publish(partial, folder)
    if STEP_FOLDER.fullmatch(folder.name):
        write_text(folder.parent / LATEST, folder.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return None


def _collect(entries: Iterable[_Entry]) -> tuple[StoredTensor, ...]:
    """Chunks of one tensor together. Raises :class:`CheckpointError` if ranks disagree on its shape or dtype."""
    chunks: dict[tuple[str, str], list[Chunk]] = {}
    forms: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for entry in entries:
        key = entry.kind, entry.name
        form = entry.shape, entry.dtype
        if forms.setdefault(key, form) != form:
            raise CheckpointError(f"{entry.kind} of {entry.name} is {forms[key]} on one rank, {form} on another")
        chunks.setdefault(key, []).append(entry.chunk)
    return tuple(
        StoredTensor(kind=kind, name=name, shape=shape, dtype=dtype, chunks=tuple(chunks[kind, name]))  # type: ignore[arg-type]
        for (kind, name), (shape, dtype) in sorted(forms.items())
    )


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        reason = system_reason(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, CheckpointError):
        return str(error.args[0])
    return f"{type(error).__name__}: {error}"


def _raise_everywhere(
    folder: Path, fault: str | None, communicator: Communicator, cause: Exception | None = None
) -> None:
    """Send rank 0's verdict to every rank, and raise it there if it is a fault."""
    verdict = communicator.broadcast(fault)
    if verdict is not None:
        raise CheckpointError(f"{folder} was not written\n  {verdict}") from cause

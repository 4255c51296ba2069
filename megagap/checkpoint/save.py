"""Writing a checkpoint, so that it is either complete or absent.

Each rank writes and syncs a file of what it owns into a temporary folder; rank 0 gathers what was written, checks that
every element is there exactly once, writes the index, renames the folder, and points ``latest`` at it. If one
rank fails, all fail: none waits for it, and nothing is committed.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
from megagap.errors import CheckpointError, NotWrittenError, system_reason
from megagap.files import file_errors, publish, write_text
from megagap.parallel.communicator import Communicator, SingleProcess
from megagap.parallel.shard import Shard, Slice

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in its directory."""

LATEST = "latest"
"""Text file beside the checkpoints: the folder name of the one to resume from."""

STEP_FOLDER = re.compile(r"step_([0-9]{1,18})")

UNFINISHED = "partial_"
"""Prefix of the name of a folder that is being written or removed."""


WRITE_BYTES = 1 << 26
"""Written at once. While the system copies a piece, the interpreter is free for training."""

INDEX_BYTES = 512
"""Of the index, for each chunk; at most."""


@dataclass(frozen=True)
class Entry:
    """A chunk and the tensor it is part of, as the rank that wrote it knows them."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: Chunk


@dataclass(frozen=True)
class _Fault:
    """Why a checkpoint is not written."""

    text: str
    is_refusal: bool
    """By the system."""

    @classmethod
    def of(cls, error: Exception, where: str = "") -> "_Fault":
        return cls(where + reason_of(error), isinstance(error, OSError))


@dataclass(frozen=True)
class _Outcome:
    """What one rank reports: its file and chunks, or its fault."""

    file: StoredFile | None = None
    entries: tuple[Entry, ...] = ()
    fault: _Fault | None = None


@dataclass(frozen=True)
class FilePlan:
    """One rank's file before it is written: every rectangle of every slice is a tensor of it."""

    slices: list[Slice]
    rectangles: list[list[Rectangle]]
    """Of each slice, in global coordinates; they follow each other in it."""
    preamble: bytes
    size: int
    """Bytes of the file; 0: there is none."""

    @classmethod
    def of(cls, slices: Iterable[Slice]) -> "FilePlan":
        # Wider elements first keep every tensor aligned, as the format requires.
        ordered = sorted(slices, key=lambda part: -part.dtype.itemsize)
        pieces = [_global_rectangles(part) for part in ordered]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for part, rects in zip(ordered, pieces, strict=True):
            for offsets, sizes in rects:
                end = position + prod(sizes) * part.dtype.itemsize
                key = "/".join((part.kind, part.shard.name, "_".join(map(str, offsets))))
                header[key] = {"dtype": DTYPE_NAMES[part.dtype], "shape": sizes, "data_offsets": (position, end)}
                position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        preamble = len(text).to_bytes(8, "little") + text
        return cls(ordered, pieces, preamble, len(preamble) + position if position else 0)

    @property
    def needed(self) -> int:
        """Bytes that this rank's part of the checkpoint takes on the disk."""
        return self.size + INDEX_BYTES * sum(map(len, self.rectangles))


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
    On return it is durable: all that was written has been synced, and found to be there in its whole size.
    Raises on every rank, and leaves nothing behind, if any rank fails: :class:`NotWrittenError` if the system refused,
    or has not enough free space; else :class:`CheckpointError`.
    """
    communicator = communicator or SingleProcess()
    rank = communicator.rank
    partial = folder.with_name(UNFINISHED + folder.name)
    cause: Exception | None = None
    plan = FilePlan([], [], b"", 0)
    own_fault: _Fault | None = None
    try:
        plan = FilePlan.of(slices)
    # Whatever it is, the other ranks must be told instead of waiting.
    except Exception as error:
        cause, own_fault = error, _Fault.of(error, f"rank {rank}: ")
    plans = cast("list[tuple[int, _Fault | None]] | None", communicator.gather((plan.needed, own_fault)))
    fault = None
    if plans is not None:
        fault = _all_of(found for _, found in plans) or _prepare(partial, sum(needed for needed, _ in plans))
    _raise_everywhere(folder, fault, communicator, cause)

    try:
        outcome = write_rank(partial / f"rank_{rank:05}.safetensors", plan, progress)
    except Exception as error:
        cause, outcome = error, _Outcome(fault=_Fault.of(error, f"rank {rank}: "))
    outcomes = cast("list[_Outcome] | None", communicator.gather(outcome))
    if outcomes is not None:
        try:
            fault = _commit(folder, partial, outcomes, state)
        except Exception as error:
            cause, fault = error, _Fault.of(error)
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


def _prepare(partial: Path, needed: int) -> _Fault | None:
    """Make the temporary folder, on a disk that has room for ``needed`` bytes."""
    try:
        _make_empty(partial)
    except OSError as error:
        return _Fault(f"cannot make {partial}: {system_reason(error)}", is_refusal=True)
    try:
        _require_space(partial, needed)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        return _Fault.of(error)
    return None


def _make_empty(partial: Path) -> None:
    """Make the temporary folder, and remove those that killed runs left."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for stale in {partial, *partial.parent.glob(f"{UNFINISHED}step_*")}:
        remove(stale)
    partial.mkdir()


def _require_space(folder: Path, needed: int) -> None:
    """Raises OSError if the file system of ``folder`` has less free space. Some do not know how much they have."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed:,} bytes, {free:,} are free", str(folder.parent))


def write_rank(path: Path, plan: FilePlan, progress: Callable[[int], object]) -> _Outcome:
    """Write and sync one rank's safetensors file. Each slice is written while a thread computes its checksums."""
    if not plan.size:
        return _Outcome()
    entries: list[Entry] = []
    position = len(plan.preamble)
    with open(path, "wb", buffering=1 << 20) as file, ThreadPoolExecutor(1, "checksums") as pool:
        file.write(plan.preamble)
        for part, rects in zip(plan.slices, plan.rectangles, strict=True):
            data = part.read().detach().cpu().view(torch.uint8).numpy().data
            chunks = pool.submit(_chunks, data, rects, part.dtype.itemsize, path.name, position)
            for begin in range(0, len(data), WRITE_BYTES):
                piece = data[begin : begin + WRITE_BYTES]
                file.write(piece)
                progress(len(piece))
            position += len(data)
            dtype = DTYPE_NAMES[part.dtype]
            entries += [Entry(part.kind, part.shard.name, part.shard.shape, dtype, chunk) for chunk in chunks.result()]
        file.flush()
        os.fsync(file.fileno())
    assert position == plan.size, (position, plan.size)
    header_size, header_checksum = len(plan.preamble), checksum(plan.preamble)
    stored = StoredFile(name=path.name, size=position, header_size=header_size, header_checksum=header_checksum)
    return _Outcome(stored, tuple(entries))


def _chunks(data: memoryview, rects: Iterable[Rectangle], itemsize: int, file: str, position: int) -> list[Chunk]:
    """The rectangles of a slice, whose bytes ``data`` lie from ``position`` on in ``file``."""
    chunks, done = [], 0
    for offsets, sizes in rects:
        length = prod(sizes) * itemsize
        begin, end = position + done, position + done + length
        digest = checksum(data[done : done + length])
        chunks.append(Chunk(offsets=offsets, sizes=sizes, file=file, begin=begin, end=end, checksum=digest))
        done += length
    return chunks


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


def _commit(folder: Path, partial: Path, outcomes: list[_Outcome], state: dict[str, Any]) -> _Fault | None:
    """Make the written files a checkpoint. Returns a fault that the ranks reported."""
    if fault := _all_of(outcome.fault for outcome in outcomes):
        return fault
    index = Index(
        files=tuple(outcome.file for outcome in outcomes if outcome.file),
        tensors=collect_tensors(entry for outcome in outcomes for entry in outcome.entries),
        state=state,
    )
    index.validate_against(partial)
    write_text(partial / INDEX_NAME, index.to_json())
    replaced = folder.with_name(f"{UNFINISHED}{folder.name}.replaced")
    has_replaced = folder.exists()
    if has_replaced:
        # A folder cannot be renamed over another that has files: move it aside for the moment in between.
        os.replace(folder, replaced)
    try:
        publish(partial, folder)
        if STEP_FOLDER.fullmatch(folder.name):
            write_text(folder.parent / LATEST, folder.name + "\n")
    except OSError:
        # What is not announced must not be there: undo the renaming.
        if folder.exists():
            os.replace(folder, partial)
        if has_replaced:
            os.replace(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return None


def _all_of(faults: Iterable[_Fault | None]) -> _Fault | None:
    """What several ranks report, as one fault; None if none does."""
    found = [fault for fault in faults if fault is not None]
    return _Fault("\n  ".join(f.text for f in found), all(f.is_refusal for f in found)) if found else None


def collect_tensors(entries: Iterable[Entry]) -> tuple[StoredTensor, ...]:
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


def reason_of(error: Exception) -> str:
    if isinstance(error, OSError):
        reason = system_reason(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, CheckpointError):
        return str(error.args[0])
    return f"{type(error).__name__}: {error}"


def _raise_everywhere(
    folder: Path, fault: _Fault | None, communicator: Communicator, cause: Exception | None = None
) -> None:
    """Send rank 0's verdict to every rank, and raise it there if it is a fault."""
    verdict = cast("_Fault | None", communicator.broadcast(fault))
    if verdict is not None:
        kind = NotWrittenError if verdict.is_refusal else CheckpointError
        raise kind(f"{folder} was not written\n  {verdict.text}") from cause

"""Reading a checkpoint: intersect what is requested with what is listed, whatever layout wrote it.

Of each file, the header and the chunks that are used are verified against their checksums.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagap.checkpoint.index import (
    INDEX_NAME,
    Chunk,
    DamagedCheckpointError,
    Index,
    StoredTensor,
    damaged,
    rectangles,
)
from megagap.checkpoint.recognise import no_checkpoint, require_path
from megagap.checkpoint.save import CHECKPOINTS, read_latest, shift, step_folders, step_of
from megagap.checkpoint.verify import check_headers, read_verified
from megagap.errors import CheckpointError
from megagap.files import file_errors
from megagap.parallel.shard import Slice, whole


def resumable(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run's folder that it may resume from, best first: the one ``latest`` names, or else
    the newest, and those before it."""
    latest = read_latest(checkpoints)
    folders = [latest] if latest is not None else []
    for folder in reversed(step_folders(checkpoints)):
        if (folder / INDEX_NAME).is_file() and (latest is None or step_of(folder) < step_of(latest)):
            folders.append(folder)
    return folders


def find_latest(checkpoints: Path) -> Path | None:
    """The checkpoint to resume from in a run's folder of checkpoints; None if it has none.

    That is the one ``latest`` names, or else the newest complete one.
    Raises :class:`CheckpointError` if there are checkpoints but none is complete.
    """
    for folder in resumable(checkpoints):
        return folder
    if folders := step_folders(checkpoints):
        raise damaged(folders[-1], f"it has no {INDEX_NAME}, and no other checkpoint of {checkpoints} has one")
    return None


def find_intact(
    checkpoints: Path, passed_over: dict[Path, DamagedCheckpointError], *, headers: bool = True
) -> tuple[Path, Index] | None:
    """The checkpoint to resume from as far as that can be known without reading all of it: its index is right, and
    all files are there with their sizes and headers. None if there are no checkpoints.

    ``passed_over``: those that are known to be damaged; others that are found to be are added. ``headers``: whether
    those of the files are read.
    Raises :class:`DamagedCheckpointError` if none is left, and :class:`CheckpointError` as :func:`find_latest`.
    """
    find_latest(checkpoints)
    for folder in resumable(checkpoints):
        if folder in passed_over:
            continue
        try:
            index = Index.read(folder)
            if headers:
                check_headers(folder, index)
            return folder, index
        except DamagedCheckpointError as error:
            passed_over[folder] = error
    if passed_over:
        faults = [f"  {folder.name}: {error.what}" for folder, error in passed_over.items()]
        raise DamagedCheckpointError(
            "\n".join([f"{checkpoints} is damaged: it has no whole checkpoint to resume from", *faults])
            + "\n  copy one of them again, or start another run.dir from a checkpoint that you have elsewhere."
        )
    return None


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by ``path``: itself, or the latest of a run or of its ``checkpoints``.

    Raises :class:`CheckpointError` if there is none.
    """
    require_path(path)
    with file_errors(f"cannot read {path}", path, CheckpointError):
        if (path / INDEX_NAME).is_file():
            return path
        found = find_latest(path / CHECKPOINTS) or find_latest(path)
    if found is None:
        raise no_checkpoint(path)
    return found


def load_slices(
    folder: Path, index: Index, wanted: Iterable[Slice], *, cast: bool = False, may_grow: Collection[str] = ()
) -> None:
    """Fill the tensors of ``wanted`` in place from the checkpoint ``folder`` with this ``index``.

    ``cast``: convert to the requested dtype instead of refusing another one. ``may_grow``: names of parameters of which
    more rows may be requested than are stored; the rows beyond are left as they are.
    Raises :class:`CheckpointError` if a tensor is missing, has another shape or dtype, or is damaged.
    """
    copies: dict[str, dict[Chunk, list[tuple[StoredTensor, Slice, _Overlap]]]] = {}
    for part in wanted:
        stored = index.tensor(folder, part.kind, part.shard.name)
        _check_form(folder, stored, part, cast, part.shard.name in may_grow)
        filled = 0
        for chunk, overlap in _intersect(stored, part):
            copies.setdefault(chunk.file, {}).setdefault(chunk, []).append((stored, part, overlap))
            filled += overlap.of_slice(part.tensor).numel()
        # The index holds every element once, so this is also "each filled exactly once".
        assert filled == _stored_elements(stored, part), (part.kind, part.shard.name, filled)

    needed = [
        (chunk, f"{users[0][0].kind} of {users[0][0].name}")
        for chunks in copies.values()
        for chunk, users in sorted(chunks.items(), key=lambda entry: entry[0].begin)
    ]
    for chunk, data in read_verified(folder, {file.name: file for file in index.files}, needed):
        for stored, part, overlap in copies[chunk.file][chunk]:
            source = torch.frombuffer(data, dtype=stored.torch_dtype, count=prod(chunk.sizes), offset=chunk.begin)
            part.write(source.view(chunk.sizes)[overlap.in_chunk], overlap.of_slice)


def files_of(folder: Path, index: Index, wanted: Iterable[Slice]) -> set[str]:
    """The files that :func:`load_slices` would read. Raises :class:`CheckpointError` if a tensor is missing."""
    parts = ((part, index.tensor(folder, part.kind, part.shard.name)) for part in wanted)
    return {chunk.file for part, stored in parts for chunk, _ in _intersect(stored, part)}


def load_tensor(folder: Path, index: Index, kind: str, name: str) -> Tensor:
    """One whole tensor, in the stored dtype. Raises :class:`CheckpointError` if it is missing or damaged."""
    stored = index.tensor(folder, kind, name)
    tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
    load_slices(folder, index, [Slice(kind, whole(name, stored.shape), 0, tensor.numel(), tensor.view(-1))])
    return tensor


def _stored_elements(stored: StoredTensor, part: Slice) -> int:
    """Elements of the slice in rows that are stored."""
    if stored.shape == part.shard.shape:
        return part.stop - part.start
    rows = min(max(stored.shape[0] - part.shard.offsets[0], 0), part.shard.sizes[0])
    return max(min(part.stop, rows * prod(part.shard.sizes[1:])) - part.start, 0)


def _check_form(folder: Path, stored: StoredTensor, part: Slice, cast: bool, may_grow: bool) -> None:
    assert part.tensor.shape == (part.stop - part.start,), (part.kind, part.shard.name, part.tensor.shape)
    grown = may_grow and stored.shape[1:] == part.shard.shape[1:] and stored.shape[0] < part.shard.shape[0]
    if stored.shape != part.shard.shape and not grown:
        raise CheckpointError(
            f"{folder}: {stored.kind} of {stored.name} has shape {list(stored.shape)}, "
            f"this model has {list(part.shard.shape)}\n  load it with the model settings it was trained with."
        )
    if stored.torch_dtype != part.dtype and not cast:
        raise CheckpointError(
            f"{folder}: {stored.kind} of {stored.name} is stored as {stored.torch_dtype}, "
            f"not as {part.dtype}\n  load it with the precision it was trained with."
        )


@dataclass(frozen=True)
class _Overlap:
    """The elements that a chunk and a slice share."""

    in_chunk: tuple[slice, ...]
    first: int
    sizes: tuple[int, ...]
    """A rectangle of the slice: elements from ``first`` on, of this shape."""
    in_rectangle: tuple[slice, ...]

    def of_slice(self, tensor: Tensor) -> Tensor:
        """The view of a slice's ``tensor`` [n] to fill."""
        return tensor[self.first : self.first + prod(self.sizes)].view(self.sizes)[self.in_rectangle]


def _intersect(stored: StoredTensor, part: Slice) -> Iterator[tuple[Chunk, _Overlap]]:
    """Every chunk that overlaps the slice."""
    chunk_first, chunk_end = stored.boxes
    position = 0
    for offsets, sizes in rectangles(part.shard.sizes, part.start, part.stop):
        first = np.array(shift(offsets, part.shard), dtype=np.int64)
        end = first + np.array(sizes, dtype=np.int64)
        common_first, common_end = np.maximum(chunk_first, first), np.minimum(chunk_end, end)
        for i in np.nonzero((common_first < common_end).all(axis=1))[0].tolist():
            inside = _ranges(common_first[i] - chunk_first[i], common_end[i] - chunk_first[i])
            within = _ranges(common_first[i] - first, common_end[i] - first)
            yield stored.chunks[i], _Overlap(inside, position, sizes, within)
        position += prod(sizes)


def _ranges(first: np.ndarray, end: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(first.tolist(), end.tolist(), strict=True))

"""The list of what a checkpoint holds: which rectangle of which tensor lies at which bytes of which file.

A checkpoint is a folder:

    step_00000100/
      rank_00000.safetensors …   what each rank owned, one tensor per rectangle
      index.json                 {"checksum": of all that follows, "body": files, tensors with their chunks, state}

The index is untrusted input: ``read`` checks every number against the others and against the files' sizes before a
byte of them is used. Each byte of the folder is covered by an xxh3_64 checksum: chunk by chunk, each file's
header, and the index itself.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from megagap.errors import CheckpointError

INDEX_NAME = "index.json"


class DamagedCheckpointError(CheckpointError):
    """Bytes of a checkpoint are missing, or are not those that were written. The one before it may be whole."""

    @property
    def what(self) -> str:
        """In one line, what is damaged."""
        return str(self.args[0]).partition("\n")[0].partition(" is damaged: ")[2]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Element types by their names in safetensors."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Below 2**62 even when two are added, so that numpy's int64 cannot overflow.
_Count = Annotated[int, Field(ge=0, le=2**60)]
_Length = Annotated[int, Field(ge=1, le=2**60)]
_Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_SURROGATE = re.compile(r"\\u(dc[89a-f][0-9a-f])")
_HEAD = re.compile(rb'\{"checksum":"([0-9a-f]{16})","body":')

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, in elements, one of each per dimension."""


INDEX_BYTES, BYTES_PER_INDEX_BYTE = 16 * 2**20, 128
"""An index may have so many bytes, some 125,000 chunks, and one more for so many bytes of tensors. Chunks are larger:
those of 70 billion parameters over 1,024 ranks have 1.2 MB on average."""

MOST_NEIGHBOURS = 256
"""Chunks of one tensor that may lie side by side, on average: tp ranks that split its columns, and a few more."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class StoredFile(_Record):
    """A safetensors file of the folder."""

    # A plain name: no path out of the folder.
    name: Annotated[str, Field(pattern=r"^rank_[0-9]{5,9}\.safetensors$")]
    size: _Length
    """Bytes."""
    header_size: _Length
    """Bytes before the first tensor's."""
    header_checksum: _Checksum


class Chunk(_Record):
    """A rectangle of a tensor, stored row by row in bytes ``[begin, end)`` of a file."""

    offsets: tuple[_Count, ...]
    sizes: tuple[_Length, ...]
    file: str
    begin: _Count
    end: _Count
    checksum: _Checksum


class StoredTensor(_Record):
    """A global tensor and the chunks that cover it, each element once."""

    kind: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    name: Annotated[str, Field(min_length=1, max_length=1024)]
    shape: Annotated[tuple[_Count, ...], Field(max_length=8)]
    """Without padding."""
    dtype: Literal["F64", "F32", "F16", "BF16"]
    chunks: Annotated[tuple[Chunk, ...], FailFast()]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @cached_property
    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """First and past-the-last coordinates of the chunks, int64 [chunks, dimensions]."""
        dimensions = (len(self.chunks), len(self.shape))
        first = np.array([chunk.offsets for chunk in self.chunks], dtype=np.int64).reshape(dimensions)
        return first, first + np.array([chunk.sizes for chunk in self.chunks], dtype=np.int64).reshape(dimensions)


class Index(_Record):
    """The content of ``index.json``."""

    format: Literal[1] = 1
    files: Annotated[tuple[StoredFile, ...], FailFast()]
    tensors: Annotated[tuple[StoredTensor, ...], FailFast()]
    state: dict[str, Any]
    """Small values: steps, data positions, settings. JSON only; ``state.py`` reads and checks them."""

    @classmethod
    def read(cls, folder: Path, *, whole: bool = True) -> "Index":
        """Read and check a folder's index. Raises :class:`CheckpointError` naming the folder and what is wrong.

        ``whole``: whether all files must be there; a node's own disk may have a part of them.
        """
        try:
            if whole:
                _check_length(folder)
            raw = (folder / INDEX_NAME).read_bytes()
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint: it has no {INDEX_NAME}\n"
                "  give a folder such as RUN/checkpoints/step_00000100."
            ) from None
        except OSError as error:
            if error.errno == errno.EIO:
                raise damaged(folder, f"{INDEX_NAME}: {error.strerror}") from None
            raise CheckpointError(f"cannot read {folder / INDEX_NAME}: {error.strerror}") from None
        return cls.parse(folder, raw, whole=whole)

    @classmethod
    def parse(cls, folder: Path, raw: bytes, *, whole: bool) -> "Index":
        """The index of ``folder`` from what its file holds, checked as in :meth:`read`."""
        head = _HEAD.match(raw)
        if head is None or checksum(memoryview(raw)[head.end() :]) != head[1].decode():
            raise damaged(folder, f"{INDEX_NAME} does not match its checksum")
        body = raw[head.end() :].removesuffix(b"}\n")
        _check_json(folder, body)
        try:
            index = cls.model_validate_json(body)
        except ValidationError as error:
            raise unusable(folder, error) from None
        index.validate_against(folder, whole=whole)
        return index.model_copy(update={"state": _with_texts(index.state, _unescaped)})

    def to_json(self) -> str:
        """The text of ``index.json``. Raises TypeError or ValueError if ``state`` holds more than finite JSON."""
        plain = self.model_dump() | {"state": _with_texts(self.state, _escaped)}
        body = json.dumps(plain, allow_nan=False, separators=(",", ":")) + "}\n"
        return f'{{"checksum":"{checksum(body.encode())}","body":{body}'

    def validate_against(self, folder: Path, *, whole: bool = True) -> None:
        """Check that fields fit each other and, if ``whole``, the files of ``folder``, and that each element is stored
        once.

        Raises :class:`CheckpointError`.
        """
        files = {file.name: file for file in self.files}
        if len(files) < len(self.files):
            raise damaged(folder, "files: a name is listed twice")
        for file in self.files if whole else ():
            check_size(folder, file)
        if len(self._by_name) < len(self.tensors):
            raise damaged(folder, "tensors: a name is listed twice")
        for tensor in self.tensors:
            where = f"{tensor.kind} of {tensor.name}"
            item = tensor.torch_dtype.itemsize
            for chunk in tensor.chunks:
                if chunk.file not in files:
                    raise damaged(folder, f"{where}: file {chunk.file!r} is not among the files")
                if len(chunk.offsets) != len(tensor.shape) or len(chunk.sizes) != len(tensor.shape):
                    raise damaged(folder, f"{where}: a chunk and the tensor differ in their number of dimensions")
                if chunk.end - chunk.begin != prod(chunk.sizes) * item or chunk.begin % item:
                    raise damaged(folder, f"{where}: bytes [{chunk.begin}, {chunk.end}) do not fit {chunk.sizes}")
            fault = _coverage_fault(tensor)
            if fault:
                raise damaged(folder, f"{where}: {fault}")
        self._check_bytes(folder)

    def _check_bytes(self, folder: Path) -> None:
        """Headers and chunks must fill each file without gap or overlap: no byte goes unchecked."""
        ends = {file.name: file.header_size for file in self.files}
        for chunk in sorted((c for t in self.tensors for c in t.chunks), key=lambda chunk: (chunk.file, chunk.begin)):
            if chunk.begin != ends[chunk.file]:
                raise damaged(folder, f"{chunk.file}: a gap or an overlap at byte {ends[chunk.file]}")
            ends[chunk.file] = chunk.end
        for file in self.files:
            if ends[file.name] != file.size:
                raise damaged(folder, f"{file.name}: chunks end at byte {ends[file.name]} of {file.size}")

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], StoredTensor]:
        return {(tensor.kind, tensor.name): tensor for tensor in self.tensors}

    def names(self, kind: str) -> list[str]:
        """The tensors that the checkpoint holds of this kind."""
        return [tensor.name for tensor in self.tensors if tensor.kind == kind]

    def tensor(self, folder: Path, kind: str, name: str) -> StoredTensor:
        """Raises :class:`CheckpointError` if the checkpoint, whose folder is ``folder``, does not contain it."""
        tensor = self._by_name.get((kind, name))
        if tensor is None:
            raise CheckpointError(
                f"{folder} does not contain {kind} of {name}\n"
                f"  tensors of this kind: {len(self.names(kind))}; is it a checkpoint of another model?"
            )
        return tensor


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_with_texts(key, change): _with_texts(inner, change) for key, inner in value.items()}
    return [_with_texts(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _escaped(text: str) -> str:
    """Bytes of paths that are not valid UTF-8, which are surrogates in Python and impossible in JSON, written out."""
    return text.encode(errors="backslashreplace").decode()


def _unescaped(text: str) -> str:
    return _SURROGATE.sub(lambda match: chr(int(match[1], 16)), text)


def rectangles(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """Tile elements ``[start, stop)`` of an array flattened row by row with at most 2N - 1 rectangles, in order.

    Each rectangle's elements are contiguous in the flattened array.
    """
    if start >= stop:
        return
    if not sizes:
        yield (), ()
        return
    row = prod(sizes[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # inside one row
        yield from _in_row(sizes, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(sizes, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in sizes[1:])), (last - first, *sizes[1:])
    if last * row < stop:
        yield from _in_row(sizes, last, 0, stop - last * row)


def _in_row(sizes: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Rectangle]:
    for inner_offsets, inner_sizes in rectangles(sizes[1:], start, stop):
        yield (index, *inner_offsets), (1, *inner_sizes)


def checksum(data: bytes | memoryview) -> str:
    """xxh3_64, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def check_size(folder: Path, file: StoredFile) -> None:
    """Raises :class:`CheckpointError` unless the file exists with all its bytes."""
    try:
        size = (folder / file.name).stat().st_size
    except OSError as error:
        raise damaged(folder, f"{file.name}: {error.strerror}") from None
    if size != file.size:
        raise damaged(folder, f"{file.name} has {size:,} bytes, the index promises {file.size:,}")


def _check_length(folder: Path) -> None:
    """Raises :class:`CheckpointError` for an index out of all proportion to the files, which would take minutes and
    gigabytes to read."""
    length = (folder / INDEX_NAME).stat().st_size
    if length <= INDEX_BYTES:
        return
    stored = sum(map(_stored_bytes, folder.glob("rank_*.safetensors")))
    if length > INDEX_BYTES + stored // BYTES_PER_INDEX_BYTE:
        raise _not_ours(folder, f"it has {length:,} bytes, for {stored:,} bytes of tensors")


def _stored_bytes(path: Path) -> int:
    """A file's size without its holes, which anybody can make as large as they like."""
    found = path.stat()
    if 512 * found.st_blocks >= found.st_size // 2:
        return found.st_size
    # It has holes, or a file system that compresses, or that does not tell what a file takes.
    stored, position = 0, 0
    with open(path, "rb") as file, suppress(OSError):  # ENXIO: nothing but a hole follows
        while position < found.st_size:
            begin = os.lseek(file.fileno(), position, os.SEEK_DATA)
            position = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            stored += position - begin
    return stored


def _check_json(folder: Path, body: bytes) -> None:
    """Raises :class:`CheckpointError` for what JSON leaves open, and others may read otherwise: keys that occur twice,
    NaN, nesting and integers without bounds."""
    try:
        json.loads(body, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _not_ours(folder, reason.partition("; use sys")[0]) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Nothing is kept: only the check counts."""
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has two fields {next(name for name in names if names.count(name) > 1)!r}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def unusable(folder: Path, error: ValidationError, *within: str) -> CheckpointError:
    """The error for an intact index that has something in the field ``within`` that megagap does not write."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, (*within, *first["loc"]))) or "body"
    return _not_ours(folder, f"{field}: {first['msg'].removeprefix('Value error, ')}")


def _not_ours(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}/{INDEX_NAME}: {reason}\n"
        "  it was written by another version of megagap, is not a checkpoint of a training run, or was tampered with."
    )


def damaged(folder: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{folder} is damaged: {what}\n"
        "  copy it again, or remove or rename the folder to resume from the checkpoint before it."
    )


def _coverage_fault(tensor: StoredTensor) -> str | None:
    """Why the chunks do not cover each element exactly once; None if they do.

    Boxes that lie inside, do not overlap and add up to the volume leave no gap.
    """
    first, end = tensor.boxes
    if (end > np.array(tensor.shape, dtype=np.int64)).any():
        return f"a chunk reaches beyond the shape {tensor.shape}"
    stored, whole = sum(prod(chunk.sizes) for chunk in tensor.chunks), prod(tensor.shape)
    if stored != whole:
        return f"{stored:,} elements are stored, the tensor has {whole:,}"
    if len(tensor.chunks) < 2:
        return None
    # Sort along the dimension that separates the chunks best, then compare each with its 1st, 2nd, … successor until
    # none begins before it ends: about as many comparisons as there are chunks, unless many lie side by side.
    axis = max(range(len(tensor.shape)), key=lambda dim: len(np.unique(first[:, dim])))
    order = np.argsort(first[:, axis], kind="stable")
    first, end = first[order], end[order]
    left, compared = np.arange(len(order)), 0
    for distance in range(1, len(order)):
        left = left[left < len(order) - distance]
        left = left[first[left + distance, axis] < end[left, axis]]
        if not len(left):
            return None
        compared += len(left)
        if compared > MOST_NEIGHBOURS * len(order):
            return f"more than {MOST_NEIGHBOURS} chunks lie side by side"
        right = left + distance
        if ((first[left] < end[right]) & (first[right] < end[left])).all(axis=1).any():
            return "two chunks overlap"
    return None

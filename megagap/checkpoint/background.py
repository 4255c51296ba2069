"""Writing checkpoints while training goes on.

What a rank saves is copied once, to host memory that is kept for the next save; a thread then does all that
:func:`save_checkpoint` does, with a communicator of its own. Checksums, copies and writes release the interpreter's
lock, so that they do not keep training from its work.
"""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megagap.checkpoint.save import save_checkpoint
from megagap.errors import CheckpointError
from megagap.parallel.communicator import Communicator
from megagap.parallel.shard import Slice

ALIGNMENT = 64
"""Bytes at whose multiples each copy starts."""

log = logging.getLogger(__name__)


class HostCopies:
    """Host memory for copies of slices, pinned where these are on a GPU."""

    def __init__(self, slices: Sequence[Slice], device: torch.device) -> None:
        """Allocate what ``slices`` need. Raises RuntimeError if that is not there."""
        on_gpu = device.type == "cuda"
        # Written to once, else the first copy would wait for the system to find every page.
        self._memory = torch.zeros(copied_bytes(slices), dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def take(self, slices: Sequence[Slice]) -> tuple[list[Slice], torch.cuda.Event | None]:
        """Copies of ``slices``, in the place of those taken before.

        On a GPU they are made on a stream of their own, behind what has been queued: they are there, and ``slices`` may
        change, once the event has passed.
        """
        if self._stream is None:
            return self._copy(slices), None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return self._copy(slices), self._stream.record_event()

    def _copy(self, slices: Sequence[Slice]) -> list[Slice]:
        position, copies = 0, []

        def copy(tensor: Tensor) -> Tensor:
            nonlocal position
            there = self._memory[position : position + tensor.nbytes].view(tensor.dtype)
            position += _padded(tensor.nbytes)
            return there.copy_(tensor, non_blocking=True)

        for part in slices:
            remainder = None if part.remainder is None else copy(part.remainder)
            copies.append(replace(part, tensor=copy(part.tensor), remainder=remainder))
        return copies


def copied_bytes(slices: Sequence[Slice]) -> int:
    """Host memory that copies of ``slices`` take."""
    tensors = (tensor for part in slices for tensor in (part.tensor, part.remainder))
    return sum(_padded(tensor.nbytes) for tensor in tensors if tensor is not None)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class BackgroundSaver:
    """Saves checkpoints one at a time, in a thread. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        slices: Sequence[Slice],
        communicator: Communicator,
        device: torch.device,
        progress: Callable[[int], object] = lambda written: None,
    ) -> None:
        """Allocate the copies of ``slices``, which every save is to have.

        ``communicator``: used by nothing else. ``progress``: of :func:`save_checkpoint`, in the thread. Raises
        :class:`CheckpointError`, on every rank, if a machine has too little memory.
        """
        self._communicator, self._progress = communicator, progress
        _require_memory(copied_bytes(slices), communicator)
        fault, made = None, None
        try:
            made = HostCopies(slices, device)
        except (RuntimeError, MemoryError) as error:
            fault = _no_memory(f"rank {communicator.rank}: {error}")
        _raise_first(fault, communicator)
        assert made is not None
        self._copies = made
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: Future[None] | None = None
        self.write_seconds = 0.0
        """What the last save took, without the copy."""

    def start(
        self, folder: Path, slices: Sequence[Slice], state: dict[str, Any], saved: Callable[[float], object]
    ) -> torch.cuda.Event | None:
        """Save ``slices`` and ``state`` as they are now, as :func:`save_checkpoint` does. The save before must have
        been waited for.

        ``saved`` is called in the thread, on every rank, as soon as the checkpoint is durable, with the seconds since
        the copy. Returns the event before which no slice may change; None if they may.
        """
        assert self._save is None, "two saves at once"
        copies, copied = self._copies.take(slices)
        self._save = self._thread.submit(self._write, copied, folder, copies, state, saved)
        return copied

    def _write(
        self,
        copied: torch.cuda.Event | None,
        folder: Path,
        copies: Sequence[Slice],
        state: dict[str, Any],
        saved: Callable[[float], object],
    ) -> None:
        if copied is not None:
            copied.synchronize()
        began = time.monotonic()
        save_checkpoint(folder, copies, state, self._communicator, progress=self._progress)
        self.write_seconds = time.monotonic() - began
        saved(self.write_seconds)

    @property
    def is_idle(self) -> bool:
        """Whether :meth:`wait` would return at once, without an error."""
        return self._save is None or (self._save.done() and self._save.exception() is None)

    @property
    def has_failed(self) -> bool:
        """Whether :meth:`wait` would raise at once."""
        return self._save is not None and self._save.done() and self._save.exception() is not None

    def wait(self) -> None:
        """Until the save under way, if there is one, has ended. Raises what it raised, as :func:`save_checkpoint`."""
        save, self._save = self._save, None
        if save is not None:
            save.result()

    def close(self) -> None:
        """However training ended, the save under way comes to its end. Its error is logged, since training had one of
        its own then: where it has none, whoever started a save has waited for it."""
        try:
            self.wait()
        except Exception as error:
            log.error("the checkpoint that was being written is not complete: %s", error)
        self._thread.shutdown()


def _require_memory(needed: int, communicator: Communicator) -> None:
    """Raises :class:`CheckpointError` on every rank if a machine has less memory than its ranks need."""
    answers = communicator.gather((socket.gethostname(), needed, available_memory()))
    fault = None
    for host, (total, available) in _by_host(cast("list[tuple[str, int, int | None]]", answers or [])).items():
        if available is not None and total > available:
            fault = fault or _no_memory(
                f"{host} has {available / 1e9:.1f} GB available, they take {total / 1e9:.1f} GB"
            )
    _raise_first(fault, communicator)


def _by_host(answers: Sequence[tuple[str, int, int | None]]) -> dict[str, tuple[int, int | None]]:
    """What the ranks of each machine need together, and the least that one of them sees available."""
    found: dict[str, tuple[int, int | None]] = {}
    for host, needed, available in answers:
        total, least = found.get(host, (0, None))
        known = [number for number in (least, available) if number is not None]
        found[host] = total + needed, min(known, default=None)
    return found


def _no_memory(reason: str) -> str:
    return (
        f"checkpoint.async = true: no memory for the copies of what is saved: {reason}\n"
        "  use more processes on more machines, or checkpoint.async = false, which needs no copies."
    )


def _raise_first(fault: str | None, communicator: Communicator) -> None:
    """Raise the fault of the first rank that has one, on every rank."""
    faults = communicator.gather(fault)
    verdict = communicator.broadcast(next(filter(None, faults), None) if faults else None)
    if verdict is not None:
        raise CheckpointError(verdict)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process's machine, or its control group (version 2), has left; None where that cannot be told."""
    found: list[int] = []
    with suppress(OSError, ValueError, LookupError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = (root / "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        folder = root / "sys/fs/cgroup"
        for place in {folder, folder / group}:
            with suppress(OSError, ValueError, LookupError):  # a limit of "max" is no number
                limit = int((place / "memory.max").read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                used = int((place / "memory.current").read_text())
                found.append(limit - used + int(stat["inactive_file"]))  # cached files make room
    return max(0, min(found)) if found else None

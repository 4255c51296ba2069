"""The run directory: all there is to know of a run, and its one writer.

RUN/
  config.toml        as resolved              environment.json   revision, versions, hardware, layout
  metrics.jsonl      one object a step        tensorboard/       the same, for TensorBoard
  logs/rank_00000.log …                       checkpoints/step_00000100/ …  latest
  events.jsonl       append-only              status.json        state, step, message
"""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch

from megagap.checkpoint.save import LATEST
from megagap.config import Settings
from megagap.errors import ConfigError, DataError, DistributedError, system_reason
from megagap.files import (
    LineFile,
    Lock,
    LockedError,
    file_errors,
    require_writable,
    require_writable_folder,
    write_text,
    writing,
)
from megagap.parallel.mesh import DistributedCommunicator, Mesh

CONFIG, ENVIRONMENT, EVENTS, LOCK, STATUS = "config.toml", "environment.json", "events.jsonl", "lock", "status.json"
LOCK_SECONDS = 10.0
"""How long a second run waits for the first to leave the directory."""

State = Literal["running", "finished", "preempted", "failed"]


class RunDirectory:
    """The files of a run that rank 0 writes. On other ranks only paths."""

    def __init__(self, path: Path, is_writer: bool) -> None:
        self.path, self.is_writer = path, is_writer
        self.step = 0
        """Last step begun or loaded, for the status."""
        self.has_begun = False
        self._lock: Lock | None = None
        self._folder: os.stat_result | None = None
        """The directory that was opened, whatever has its name later."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def is_open(self) -> bool:
        """Whether this process holds the directory and may write it."""
        return self._lock is not None

    def open(self, tensorboard: bool = False) -> None:
        """Become the directory's one writer, and try all that will be written. What a former run left stays as it is.

        ``tensorboard``: whether its files will be written too.
        Raises :class:`ConfigError` if another process is writing it, or if it or something in it cannot be written.
        """
        if not self.is_writer:
            return
        try:
            require_writable_folder(self.path)
            require_writable(self.path / LOCK)
            with file_errors(f"cannot lock {self.path / LOCK}", self.path / LOCK):
                self._lock = Lock(self.path / LOCK, wait=LOCK_SECONDS)
            self._folder = os.stat(self.path)
            for folder in (self.checkpoints, self.logs, *([self.tensorboard] if tensorboard else [])):
                require_writable_folder(folder)
            for name in (CONFIG, ENVIRONMENT, EVENTS, STATUS):
                require_writable(self.path / name)
            for file in (self.metrics, log_file(self.logs, 0), self.checkpoints / LATEST):
                require_writable(file)
        except LockedError as error:
            raise ConfigError(
                f"run.dir {self.path} is being written by {error.holder}\n"
                "  wait for it to end, stop it, or choose another run.dir."
            ) from None
        except DataError as error:
            raise ConfigError(f"run.dir {self.path} cannot be written\n  {error.args[0]}") from None

    def is_archived(self, steps: int) -> bool:
        """Whether a run of so many steps is finished in a directory that cannot be written: there is nothing to do."""
        if not self.path.is_dir() or os.access(self.path, os.W_OK):
            return False
        try:
            status = json.loads((self.path / STATUS).read_text(encoding="utf-8"))
            return status["state"] == "finished" and status["step"] >= steps
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return False

    def begin(self, settings: Settings, mesh: Mesh) -> None:
        """Describe the run that really starts, or goes on; from here on a failure is this run's."""
        self.has_begun = True
        if self.is_writer:
            self._write(CONFIG, tomli_w.dumps(settings.model_dump(exclude_none=True)))
            self._write(ENVIRONMENT, json.dumps(environment(mesh), indent=2) + "\n")
            self.status("running")

    def require_shared(self, communicator: DistributedCommunicator) -> None:
        """Every rank must see the same directory: they write one checkpoint together. Collective, after :meth:`open`.

        Raises :class:`DistributedError` on all ranks if one of them does not.
        """
        holder = communicator.broadcast(self._lock_holder() if self.is_writer else None)
        # A shared file system may take a moment to show the file.
        deadline = time.monotonic() + LOCK_SECONDS
        while not (seen := self._lock_holder() == holder):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        answers = communicator.gather(None if seen else socket.gethostname())
        blind = communicator.broadcast(sorted({str(host) for host in answers if host}) if answers else None)
        if blind:
            assert isinstance(blind, list)
            raise DistributedError(
                f"run.dir {self.path} is not shared: {', '.join(blind)} does not see the first rank's files in it\n"
                "  put it on a file system that all machines mount at the same path."
            )

    def require_in_place(self) -> None:
        """Raises :class:`DataError`, and writes nothing more, if the directory that was opened was removed or moved.

        What has been written since is lost or elsewhere, and what has its name now may be another run's.
        """
        if self._folder is None:
            return
        try:
            is_in_place = os.path.samestat(self._folder, os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            is_in_place = False
        if not is_in_place:
            self.close()
            raise DataError(
                f"run.dir {self.path} was removed, moved or replaced while the run was writing it\n"
                "  put it back where it was if you can, and start the same command again to go on from its last "
                "checkpoint; without it the command starts afresh."
            )

    def _lock_holder(self) -> str | None:
        """What the lock file says, as this rank sees it."""
        try:
            return (self.path / LOCK).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def status(self, state: State, message: str = "") -> None:
        """What scripts look at to decide whether to requeue."""
        if self.is_open:
            text = json.dumps({"state": state, "step": self.step, "message": message, "time": now()}) + "\n"
            try:
                self._write(STATUS, text)
            except DataError:
                # A full disk has no room for a new file beside the old one, but mostly for the same file.
                if state == "failed" and (self.path / STATUS).exists():
                    with suppress(OSError):
                        (self.path / STATUS).write_text(text, encoding="utf-8")
                raise

    def event(self, name: str, **details: Any) -> None:
        """Append what must survive a resume that cuts the metrics back."""
        if self.is_open:
            file = LineFile(self.path / EVENTS)
            file.append(json.dumps({"time": now(), "event": name, "step": self.step, **details}))
            file.close()

    def fail(self, message: str) -> None:
        """Record a failure, in each of its two places that can be written.

        A start that was refused leaves the state of the run before as it is.
        """
        try:
            if self.has_begun or not (self.path / STATUS).exists():
                self.status("failed", message)
        finally:
            self.event("failure", message=message)

    def _write(self, name: str, text: str) -> None:
        with writing(self.path / name):
            write_text(self.path / name, text)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def log_to(folder: Path, rank: int) -> None:
    """Send the package's log to ``folder/rank_NNNNN.log``, and rank 0's to the console too.

    Raises :class:`ConfigError` if the file cannot be written. Where that happens later, the call that logs raises
    :class:`DataError`.
    """
    path = log_file(folder, rank)
    require_writable(path, ConfigError)
    with file_errors(f"cannot write {path}", path, ConfigError):
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log_to_console(logging.INFO if rank == 0 else None)
    logging.getLogger("megagap").addHandler(file)


def log_to_console(level: int | None) -> None:
    """Send the package's log to the console only, from ``level`` up; None: nowhere."""
    logger = logging.getLogger("megagap")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    logger.addHandler(logging.NullHandler())  # else logging's last resort would print faults a second time
    if level is not None:
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(level)
        console.addFilter(lambda record: record.levelno < logging.ERROR)  # faults are printed as the process ends
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)


def log_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05}.log"


class _LogFile(logging.FileHandler):
    """A log that cannot be written ends the run like any other of its files, instead of a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        # An error is logged as the process ends, and printed then: it must not be replaced by this one.
        elif record.levelno < logging.ERROR:
            raise DataError(f"cannot write {self.baseFilename}: {system_reason(error)}") from None


def environment(mesh: Mesh) -> dict[str, Any]:
    """What else a run's numbers depend on."""
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "started": now(),
        "revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": socket.gethostname(),
        "device": device,
        "processes": mesh.world.size,
        "layout": {axis: mesh.axis(axis).size for axis in ("pp", "dp", "cp", "tp")},
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_revision() -> str | None:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

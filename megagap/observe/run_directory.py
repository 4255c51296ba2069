"""The run directory: all there is to know of a run, and its one writer.

RUN/
  config.toml        as resolved              environment.json   revision, versions, hardware, layout
  metrics.jsonl      one object a step        tensorboard/       the same, for TensorBoard
  logs/rank_00000.log …                       checkpoints/step_00000100/ …  latest
  events.jsonl       append-only              status.json        state, step, message
"""

import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

import tomli_w
import torch

from megagap.config import Settings
from megagap.errors import ConfigError, DistributedError
from megagap.files import write_text
from megagap.parallel.mesh import DistributedCommunicator, Mesh

LOCK = "lock"
STATUS = "status.json"
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
        self._lock: TextIO | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def is_open(self) -> bool:
        """Whether this process holds the directory and may write it."""
        return self._lock is not None

    def open(self) -> None:
        """Become the directory's one writer. What a former run left is not touched yet.

        Raises :class:`ConfigError` if another process is writing it, or if it cannot be written.
        """
        if not self.is_writer:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = acquire(self.path / LOCK)
        except OSError as error:
            raise ConfigError(f"run.dir {self.path} cannot be written: {error.strerror}") from None

    def begin(self, settings: Settings, mesh: Mesh) -> None:
        """Describe the run that really starts, or goes on; from here on a failure is this run's."""
        self.has_begun = True
        if self.is_writer:
            write_text(self.path / "config.toml", tomli_w.dumps(settings.model_dump(exclude_none=True)))
            write_text(self.path / "environment.json", json.dumps(environment(mesh), indent=2) + "\n")
            self.status("running")

    def require_shared(self, communicator: DistributedCommunicator) -> None:
        """Every rank must see the same directory: they write one checkpoint together. Collective, after :meth:`open`.

        Raises :class:`DistributedError` on all ranks if one of them does not.
        """
        lock = self.path / LOCK
        holder = communicator.broadcast(lock.read_text(encoding="utf-8") if self.is_writer else None)
        # A shared file system may take a moment to show the file.
        deadline = time.monotonic() + LOCK_SECONDS
        while not (seen := lock.exists() and lock.read_text(encoding="utf-8") == holder):
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

    def status(self, state: State, message: str = "") -> None:
        """What scripts look at to decide whether to requeue."""
        if self.is_open:
            text = json.dumps({"state": state, "step": self.step, "message": message, "time": now()})
            write_text(self.path / STATUS, text + "\n")

    def event(self, name: str, **details: Any) -> None:
        """Append what must survive a resume that cuts the metrics back."""
        if self.is_open:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": now(), "event": name, "step": self.step, **details}) + "\n")

    def fail(self, message: str) -> None:
        """Leave word of a failure. A start that was refused leaves the state of the run before as it is."""
        self.event("failure", message=message)
        if self.has_begun or not (self.path / STATUS).exists():
            self.status("failed", message)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def acquire(path: Path) -> TextIO:
    """Hold an advisory lock on ``path``, which names the holder, until the file is closed or the process ends."""
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise ConfigError(
                    f"run.dir {path.parent} is being written by {holder}\n"
                    "  wait for it to end, stop it, or choose another run.dir."
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
    file.flush()
    return file


def log_to(folder: Path, rank: int) -> None:
    """Send the package's log to ``folder/rank_NNNNN.log``, and rank 0's to the console too."""
    folder.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("megagap")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    file = logging.FileHandler(folder / f"rank_{rank:05}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.addFilter(lambda record: record.levelno < logging.ERROR)  # faults are printed as the process ends
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)


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

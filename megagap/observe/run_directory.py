"""The run directory: everything there is to know about a run, and its one writer.

RUN/
  config.toml        as resolved              environment.json   revision, versions, hardware, layout, MFU's formula
  metrics.jsonl      one object per step      tensorboard/       the same, for TensorBoard
  logs/rank_00000.log …                       checkpoints/step_00000100/ …  latest
  events.jsonl       append-only              status.json        state, step, message
  spans/             of every rank, where run.spans is set
  accounting.jsonl   where the time went      guard/             batches of bad steps
  lineage.json       its id and starts, where checkpoints are on other disks, too
  config_before_step_00000100.toml            config.toml of the starts before, where a restart changed a setting
"""

import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch

from megagap.checkpoint.recognise import unfit_for_a_run
from megagap.checkpoint.save import CHECKPOINTS, LATEST
from megagap.config import Settings, timeline_of
from megagap.errors import ConfigError, DataError, DistributedError
from megagap.files import (
    LineFile,
    Lock,
    LockedError,
    file_errors,
    reading,
    require_writable,
    require_writable_folder,
    write_bytes,
    write_text,
    writing,
)
from megagap.model.flops import flops_per_token
from megagap.observe.goodput import ACCOUNTING
from megagap.observe.logs import log_file
from megagap.observe.utilisation import peak_tflops
from megagap.optim.precision import PRECISIONS
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.run_files import CONFIG, ENVIRONMENT, EVENTS, LOCK, METRICS, STATUS

LOCK_SECONDS = 10.0
"""How long a second run waits for the first to leave the directory."""

LOST_SECONDS = 1.0
"""How long another rank waits for the lock of a writer that may have died."""

State = Literal["running", "finished", "preempted", "failed"]


class RunDirectory:
    """The files of a run that rank 0 writes. On other ranks only paths."""

    def __init__(self, path: Path, is_writer: bool) -> None:
        self.path, self.is_writer = path, is_writer
        self.step = 0
        """Last step started or loaded, for the status."""
        self.has_begun = False
        self._has_ended = False
        self._writing = threading.RLock()
        """A second Ctrl-C or SIGTERM is answered in a thread of its own."""
        self._lock: Lock | None = None
        self._folder: os.stat_result | None = None
        """The directory that was opened; later another one may have its name."""
        self.local: Path | None = None
        """This node's folder of checkpoints on its own disk, if the run has such."""

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run."""
        return checkpoint.parent in (self.checkpoints, self.local)

    @property
    def is_open(self) -> bool:
        """Whether this process holds the directory and may write it."""
        return self._lock is not None

    def open(self, tensorboard: bool = False) -> None:
        """Become the directory's one writer, and try everything that will be written. What is there stays as it is.

        ``tensorboard``: whether its files will be written too.
        Raises :class:`ConfigError` if another process is writing it, if it or something in it cannot be written, and if
        it is a checkpoint, a run's folder of them, or a Hugging Face model.
        """
        if not self.is_writer:
            return
        if not os.path.exists(self.path / STATUS) and (fault := unfit_for_a_run(self.path)):
            raise ConfigError(f"run.dir {fault}")
        try:
            require_writable_folder(self.path)
            require_writable(self.path / LOCK)
            with file_errors(f"cannot lock {self.path / LOCK}", self.path / LOCK):
                self._lock = Lock(self.path / LOCK, wait=LOCK_SECONDS)
            self._folder = os.stat(self.path)
            for folder in (self.checkpoints, self.logs, *([self.tensorboard] if tensorboard else [])):
                require_writable_folder(folder)
            for name in (CONFIG, ENVIRONMENT, EVENTS, STATUS, ACCOUNTING):
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
        """Whether a run of so many steps is finished in a read-only directory, so that there is nothing to do."""
        if not self.path.is_dir() or os.access(self.path, os.W_OK):
            return False
        try:
            status = json.loads((self.path / STATUS).read_text(encoding="utf-8"))
            return status["state"] == "finished" and status["step"] >= steps
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return False

    def begin(self, settings: Settings, mesh: Mesh) -> None:
        """Describe the run that now really starts or resumes; from here on a failure is this run's."""
        self.has_begun = True
        if self.is_writer:
            self._write(CONFIG, tomli_w.dumps(settings.model_dump(exclude_none=True)))
            described = environment(mesh) | {"mfu": mfu_formula(settings, mesh)}
            self._write(ENVIRONMENT, json.dumps(described, indent=2) + "\n")
            self.status("running")

    def last_config(self) -> dict[str, Any] | None:
        """The settings of the run's last start; None before the first.

        Raises :class:`DataError` if the file cannot be read or is not TOML.
        """
        path = self.path / CONFIG
        with reading(path):
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError:
                return None
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path}: it is not valid TOML ({error})") from None

    def last_layout(self) -> dict[str, Any] | None:
        """:func:`layout` of the run's last start, where its environment.json says it."""
        try:
            before = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))
            return {"processes": before["processes"], "layout": dict(before["layout"])}
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None

    def keep_config(self, step: int) -> str:
        """Keep the last start's config.toml, which :meth:`begin` replaces, beside it. Returns the copy's name.

        ``step``: the last step that it applied to. Raises :class:`DataError` if it cannot be copied.
        """
        source = self.path / CONFIG
        with reading(source):
            content = source.read_bytes()
        name, number = f"config_before_step_{step:08}.toml", 1
        while (self.path / name).exists():
            with reading(self.path / name):
                if (self.path / name).read_bytes() == content:
                    return name
            number += 1  # several starts from one step, each with other settings
            name = f"config_before_step_{step:08}_{number}.toml"
        with writing(self.path / name):
            write_bytes(self.path / name, content)
        return name

    def require_shared(self, communicator: DistributedCommunicator) -> None:
        """Every rank must see the same directory: they write one checkpoint together. Collective, after :meth:`open`.

        Raises :class:`DistributedError` on all ranks if one of them does not.
        """
        holder = communicator.broadcast(self._lock_holder() if self.is_writer else None)
        # A shared file system may need a moment to show the file.
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

        What was written since is lost or elsewhere, and what now has its name may be another run's.
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
                "  put it back where it was and run the same command again: it resumes from the newest checkpoint in "
                "it, if there is one. Without the directory the command starts from the beginning."
            )

    def _lock_holder(self) -> str | None:
        """What the lock file says, as this rank sees it."""
        try:
            return (self.path / LOCK).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def status(self, state: State, message: str = "") -> None:
        """What scripts read to decide whether to requeue."""
        if not self.is_open:
            return
        with self._writing:
            self._has_ended = state in ("finished", "preempted")
            text = json.dumps({"state": state, "step": self.step, "message": message, "time": now()}) + "\n"
            try:
                self._write(STATUS, text)
            except DataError:
                # A full disk has no space for a new file beside the old one, but usually for overwriting it.
                if state == "failed" and (self.path / STATUS).exists():
                    with suppress(OSError):
                        (self.path / STATUS).write_text(text, encoding="utf-8")
                raise

    def event(self, name: str, **details: Any) -> None:
        """Append what must survive a resume that cuts the metrics back."""
        if not self.is_open:
            return
        with self._writing:
            file = LineFile(self.path / EVENTS)
            file.append(json.dumps({"time": now(), "event": name, "step": self.step, **details}))
            file.close()

    def fail(self, message: str) -> None:
        """Record a failure, in each of its two places that can be written.

        A start that was refused leaves the status of the start before as it is; a run that has ended stays so. Another
        rank than the writer records it if that one is gone without a word.
        """
        if not self.is_writer:
            self._fail_for_lost_writer(message)
            return
        if self._has_ended:
            return
        try:
            if self.has_begun or not (self.path / STATUS).exists():
                self.status("failed", message)
        finally:
            self.event("failure", message=message)

    def _fail_for_lost_writer(self, message: str) -> None:
        """On another rank. The system releases a dead writer's lock."""
        if not self.has_begun:
            return
        with suppress(LockedError):
            self._lock = Lock(self.path / LOCK, wait=LOST_SECONDS)
        if self._lock is None:
            return
        try:
            status = json.loads((self.path / STATUS).read_text(encoding="utf-8"))
            if self._lock.is_enforced and status["state"] == "running":  # not one that a restart has begun meanwhile
                self.status("failed", message)
                self.event("failure", message=message)
        except (ValueError, LookupError, TypeError):
            pass  # a status that nobody can read says nothing false
        finally:
            self.close()

    def _write(self, name: str, text: str) -> None:
        with writing(self.path / name):
            write_text(self.path / name, text)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


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
        **layout(mesh),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def layout(mesh: Mesh) -> dict[str, Any]:
    """How many processes there are, and how many along each axis."""
    axes = {axis: mesh.axis(axis).size for axis in ("pp", "dp", "cp", "tp")}
    return {"processes": mesh.world.size, "layout": axes}


def mfu_formula(settings: Settings, mesh: Mesh) -> dict[str, Any]:
    """What the ``mfu`` and ``tflops_per_device`` of metrics.jsonl mean in this run."""
    lengths = timeline_of(settings).sequence_lengths
    dtype = PRECISIONS[settings.train.precision].compute
    peak = peak_tflops(mesh.device, dtype)
    device = torch.cuda.get_device_name(mesh.device) if peak is not None else None
    return {
        "formula": "mfu = tflops_per_device / peak_tflops; "
        "tflops_per_device = flops_per_token * tokens_per_second / processes / 1e12",
        "flops_per_token": {
            "formula": "6 * (weights of all matrices but the input embedding) "
            "+ 12 * num_hidden_layers * num_attention_heads * head_dim * sequence_length (the full attention square)",
            "by_sequence_length": {str(length): flops_per_token(settings.model, length).full for length in lengths},
        },
        "peak_tflops": peak,
        "peak_of": f"data sheet of {device}: dense matrix products in {str(dtype).removeprefix('torch.')}"
        if device
        else None,
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

"""The errors that a user can cause, each with a message that says what, where, and what to do.

A bug in megagap raises anything else and keeps its traceback.
"""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""

OPS_SWITCH = "MEGAGAP_OPS"
"""Environment variable for ruling out the kernels as a cause: ``plain`` always computes with plain torch."""


def printable(text: str) -> str:
    r"""``text`` with bytes of file names that are not valid UTF-8 (surrogates in Python) written as ``\xe9``.

    The result can be printed, and encoded as UTF-8.
    """
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(ord(found[0])), text)


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded as UTF-8: names of files may hold bytes that are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(surrogate: int) -> str:
    is_byte = 0xDC80 <= surrogate <= 0xDCFF
    return f"\\x{surrogate - 0xDC00:02x}" if is_byte else f"\\u{surrogate:04x}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 step``, ``2,000 steps``; ``plural``: of a noun that takes more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def ranks_named(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 2``; of many, the first."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


class MegagapError(Exception):
    """Base of all errors caused by input, settings or surroundings rather than by a bug in megagap."""

    kind = "error"
    exit_code = 2

    def __str__(self) -> str:
        return printable(f"{self.kind}: {super().__str__()}")


class ConfigError(MegagapError):
    """The settings cannot be used: unknown, malformed, or contradicting each other."""

    kind = "config error"


class DataError(MegagapError):
    """A data or tokenizer file is missing, damaged, or does not fit the model."""

    kind = "data error"


class CheckpointError(MegagapError):
    """A checkpoint is missing, damaged, or belongs to another model or run."""

    kind = "checkpoint error"


class NotWrittenError(CheckpointError):
    """The system refused to write a checkpoint, for want of space say; another time it may not. Those written before
    are intact."""


class DistributedError(MegagapError):
    """The processes cannot form the requested layout, or lost each other."""

    kind = "distributed error"


class LostPeerError(DistributedError):
    """Another process of the run is gone or no longer answers."""

    exit_code = 1


class HangError(DistributedError):
    """No rank of the run has moved on for longer than ``run.hang_seconds``."""

    exit_code = 1


class CorruptionError(MegagapError):
    """Ranks that must hold the same parameters do not: one of them computes or remembers wrongly."""

    kind = "silent corruption"


class CompileError(MegagapError):
    """torch.compile cannot compile the model's layers on this machine."""

    kind = "compile error"


class DivergedError(MegagapError):
    """Training produced losses or gradients that are not finite, none or spikes, for too many steps in a row."""

    kind = "training diverged"


class FileSystemError(MegagapError):
    """The system refused to use a file, folder or stream, and no more specific error was raised for it."""

    kind = "system error"


def system_reason(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Why the system refused to use ``path``, and what to do: one line each, where something can be done."""
    if path is not None and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        with suppress(OSError, ValueError):
            if os.path.islink(path) and not os.path.exists(path):
                return f"it is a link to {os.readlink(path)}, which does not exist\n  remove it, or create its target"
    reason, cure = error.strerror or str(error) or type(error).__name__, _CURES.get(error.errno or 0)
    return f"{reason}\n  {cure}." if cure else reason


_NOT_YOURS = "you lack the permission: change its owner or mode, or choose another location"
_CURES = {
    errno.ENOSPC: "its disk is full: free some space, or choose another location",
    errno.EDQUOT: "your disk quota is exceeded: free some space, or choose another location",
    errno.EFBIG: "larger than its file system or ulimit -f allows: choose another location",
    errno.EACCES: _NOT_YOURS,
    errno.EPERM: _NOT_YOURS,
    errno.EROFS: "its file system is mounted read-only: choose another location",
    errno.EISDIR: "there is a folder where a file is needed: remove or rename it",
    errno.ENOTDIR: "there is a file where a folder is needed: remove or rename it",
    errno.EEXIST: "there is a file where a folder is needed: remove or rename it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links form a loop: remove them",
    errno.EMFILE: "this process has reached its limit of open files: raise it with ulimit -n",
    errno.EIO: "its disk or network file system is failing: see the system log",
    errno.ESTALE: "its handle on the network file system is stale: remount the file system",
}


def ops_choice() -> str:
    """What :data:`OPS_SWITCH` chooses, ``auto`` or ``plain``. Raises :class:`ConfigError` if it is neither."""
    choice = os.environ.get(OPS_SWITCH, "auto")
    if choice not in ("auto", "plain"):
        raise ConfigError(f"{OPS_SWITCH}={choice} in the environment: must be auto or plain")
    return choice


@contextmanager
def library_errors(what: str, kind: type[MegagapError] = DataError) -> Iterator[None]:
    """For a library call on user input: whatever it raises becomes ``kind``, with the message ``what: reason``.

    The one place where exceptions of tokenizers, safetensors, pyarrow, zstandard and others become megagap's. Keep the
    block to that call: in megagap's own code an exception is a bug and must stay one. Panics of libraries in Rust
    (``pyo3_runtime.PanicException``) are not an ``Exception``, and are caught too.
    """
    try:
        yield
    except (MegagapError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except OSError as error:
        raise kind(f"{what}: {system_reason(error)}") from None
    except BaseException as error:
        reason = str(error).strip() or type(error).__name__
        raise kind(f"{what}: {reason}") from None


def file_system_error(error: OSError) -> FileSystemError:
    """The error for an OSError that nothing else handled: a full disk or a removed folder, rather than a bug."""
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    named += [str(name) for name in (error.filename,) if isinstance(name, os.PathLike)]
    what = f"cannot use {' and '.join(named)}: " if named else ""
    return FileSystemError(what + system_reason(error, named[0] if named else None))


def run_tool(main: Callable[[], None]) -> None:
    """Run a command-line ``main`` and exit: 0 when done, the error's code (2) and message on a user's fault.

    Anything but a :class:`MegagapError` or OSError is a bug in megagap: Python prints its traceback and exits with 1.
    """
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _StandardOutput(sys.stdout)
    with suppress(AttributeError, OSError):  # the terminal's encoding may lack some characters
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        ops_choice()
        main()
        sys.stdout.flush()  # at exit Python would only print a warning
    except MegagapError as error:
        _exit(str(error), error.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)
    except (_ReaderGoneError, BrokenPipeError):  # the reader closed the pipe (… | head)
        _drop_output()
        sys.exit(0)
    except OSError as error:
        _exit(str(file_system_error(error)), FileSystemError.exit_code)


def _open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams (``>&-``, or a daemon's).

    Otherwise the next files opened would take their descriptors, and libraries would print into them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor, inheritable=True)
                os.close(nowhere)
            else:
                os.set_inheritable(descriptor, True)
    # For a stream that was closed at startup Python has None; its descriptor may belong to another file by now.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _exit(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # a full disk, for example
        print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, MegagapError, _ReaderGoneError):
        _drop_output()
    sys.exit(code)


def _drop_output() -> None:
    """Discard what is left in standard output's buffer: Python would print a warning about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ReaderGoneError(Exception):
    """Nobody reads standard output any more. Not an OSError: rich turns a BrokenPipeError into exit code 1."""


class _StandardOutput(io.TextIOWrapper):
    """Standard output that can print any file name, valid UTF-8 or not.

    Raises :class:`FileSystemError` if it cannot be written to, such as a file on a full disk.
    """

    def __init__(self, output: io.TextIOWrapper) -> None:
        encoding, line_buffering, write_through = output.encoding, output.line_buffering, output.write_through
        buffer = output.detach()
        super().__init__(buffer, encoding, "backslashreplace", None, line_buffering, write_through)

    def write(self, text: str, /) -> int:
        with self._errors():
            return super().write(printable(text))

    def flush(self) -> None:
        with self._errors():
            super().flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise _ReaderGoneError from None
        except OSError as error:
            _drop_output()
            raise FileSystemError(f"cannot write to standard output: {system_reason(error)}") from None

"""The errors that a user can cause, each with a message that says what, where, and what to do.

Faults of ours raise anything else and keep their traceback.
"""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

OPS_SWITCH = "MEGAGAP_OPS"
"""Environment variable to find out whether a kernel is to blame: ``plain`` computes with plain torch, always."""


def printable(text: str) -> str:
    r"""``text`` with the bytes of file names that are not valid UTF-8, which Python holds as surrogates, as ``\xe9``.

    Such a text can be printed, and stored in UTF-8.
    """
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(ord(found[0])), text)


def _escaped(surrogate: int) -> str:
    is_byte = 0xDC80 <= surrogate <= 0xDCFF
    return f"\\x{surrogate - 0xDC00:02x}" if is_byte else f"\\u{surrogate:04x}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 step``, ``2,000 steps``; ``plural``: of a noun that takes more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class MegagapError(Exception):
    """Base of all errors caused by input, settings or surroundings rather than by a bug of ours."""

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


class DistributedError(MegagapError):
    """The processes cannot form the requested layout, or lost each other."""

    kind = "distributed error"


class LostPeerError(DistributedError):
    """Another process of the run is gone or no longer answers."""

    exit_code = 1


class DivergedError(MegagapError):
    """Training produced losses or gradients that are not finite, or no gradients, for too long."""

    kind = "training diverged"


class FileSystemError(MegagapError):
    """The system refused to use a file, a folder or a stream, where no code nearer to it says what it was for."""

    kind = "system error"


def system_reason(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Why the system refused to use ``path``, and what to do: one line each, where something can be done."""
    if path is not None and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        with suppress(OSError, ValueError):
            if os.path.islink(path) and not os.path.exists(path):
                return (
                    f"it is a link to {os.readlink(path)}, which does not exist\n  remove the link, or make its target"
                )
    reason, cure = error.strerror or str(error) or type(error).__name__, _CURES.get(error.errno or 0)
    return f"{reason}\n  {cure}." if cure else reason


_NOT_YOURS = "this user may not: change its owner or mode, or choose another place"
_CURES = {
    errno.ENOSPC: "its disk is full: make room there, or choose another place",
    errno.EDQUOT: "your quota there is used up: make room, or choose another place",
    errno.EFBIG: "larger than its file system or ulimit -f allows: choose another place",
    errno.EACCES: _NOT_YOURS,
    errno.EPERM: _NOT_YOURS,
    errno.EROFS: "its file system is mounted read-only: choose another place",
    errno.EISDIR: "a folder is in the place of a file: remove or rename it",
    errno.ENOTDIR: "a file is in the place of a folder: remove or rename it",
    errno.EEXIST: "a file is in the place of a folder: remove or rename it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: remove them",
    errno.EMFILE: "this process has as many files open as it may: raise the limit, ulimit -n",
    errno.EIO: "its disk or network file system fails: look at the system's log",
    errno.ESTALE: "the network file system has lost it: mount it again",
}


def ops_choice() -> str:
    """What :data:`OPS_SWITCH` chooses, ``auto`` or ``plain``. Raises :class:`ConfigError` if it is neither."""
    choice = os.environ.get(OPS_SWITCH, "auto")
    if choice not in ("auto", "plain"):
        raise ConfigError(f"{OPS_SWITCH}={choice} in the environment: possible are auto and plain")
    return choice


@contextmanager
def library_errors(what: str, kind: type[MegagapError] = DataError) -> Iterator[None]:
    """For a call into a library on something that a user gave: whatever it raises becomes ``kind``, ``what: reason``.

    The one place where the exceptions of tokenizers, safetensors, pyarrow, zstandard and others become ours. Keep the
    block to that call: in our own code an exception is a bug and must stay one. Panics of libraries in Rust
    (``pyo3_runtime.PanicException``) are no ``Exception``, and are caught too.
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
    """What an OSError means that reached the top: a full disk, a folder taken away, rather than a bug."""
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
    with suppress(AttributeError, OSError):  # messages may hold what the terminal's encoding has not
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        ops_choice()
        main()
        sys.stdout.flush()  # at exit Python would only complain
    except MegagapError as error:
        _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except (_ReaderGoneError, BrokenPipeError):  # the reader of our output has seen enough (… | head)
        _drop_output()
        sys.exit(0)
    except OSError as error:
        _leave(str(file_system_error(error)), FileSystemError.exit_code)


def _open_missing_streams() -> None:
    """Have streams that are closed (``>&-``, or a daemon's) lead nowhere.

    Else the next files that are opened would take their places, and what libraries print would be written into them.
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
    # Python has none for a stream that was closed when it started; its descriptor may be another file's by now.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _leave(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # as on a full disk, too
        print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, MegagapError, _ReaderGoneError):
        _drop_output()
    sys.exit(code)


def _drop_output() -> None:
    """Have what is left in standard output's buffer go nowhere: Python would complain about it as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ReaderGoneError(Exception):
    """Nobody reads standard output any more. No OSError: of a BrokenPipeError, rich would make exit code 1."""


class _StandardOutput(io.TextIOWrapper):
    """Standard output to which names of files can be printed, valid UTF-8 or not.

    Raises :class:`FileSystemError` where it cannot be written, as to a file on a full disk.
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

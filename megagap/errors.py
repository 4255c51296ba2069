"""The errors that a user can cause, each with a message that says what, where, and what to do.

Faults of ours raise anything else and keep their traceback.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def printable(text: str) -> str:
    r"""``text`` with the bytes of file names that are not valid UTF-8, which Python holds as surrogates, as ``\xe9``.

    Such a text can be printed, and stored in UTF-8.
    """
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(ord(found[0])), text)


def _escaped(surrogate: int) -> str:
    is_byte = 0xDC80 <= surrogate <= 0xDCFF
    return f"\\x{surrogate - 0xDC00:02x}" if is_byte else f"\\u{surrogate:04x}"


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
    """Training produced losses or gradients that are not finite for too long."""

    kind = "training diverged"


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
        raise kind(f"{what}: {error.strerror or error}") from None
    except BaseException as error:
        reason = str(error).strip() or type(error).__name__
        raise kind(f"{what}: {reason}") from None


def run_tool(main: Callable[[], None]) -> None:
    """Run a command-line ``main`` and exit: 0 when done, the error's code (2) and message on a user's fault.

    Anything but a :class:`MegagapError` is a fault of ours: Python prints its traceback and exits with 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _StandardOutput(sys.stdout)
    try:
        main()
        sys.stdout.flush()  # at exit Python would only complain
    except MegagapError as error:
        with suppress(OSError):  # as on a full disk, too
            print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough (… | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


class _StandardOutput(io.TextIOWrapper):
    """Standard output to which names of files can be printed, valid UTF-8 or not.

    Raises :class:`MegagapError` where it cannot be written, as to a file on a full disk.
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
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what Python flushes at exit
            raise MegagapError(f"cannot write to standard output: {error.strerror}") from None

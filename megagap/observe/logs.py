"""The log of a process: a file per rank, and the console."""

import logging
import sys
from pathlib import Path

from megagap.errors import ConfigError, DataError, system_reason
from megagap.files import file_errors, require_writable


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
    """Send the package's log to the console only, from ``level`` up; None: to nowhere."""
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
    """A log that cannot be written ends the run like any other of its files, instead of a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        # An error is logged as the process ends, and printed then: it must not be replaced by this one.
        elif record.levelno < logging.ERROR:
            raise DataError(f"cannot write {self.baseFilename}: {system_reason(error)}") from None

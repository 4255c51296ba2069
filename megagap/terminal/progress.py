"""Progress bars: a line that is redrawn on a terminal, a line from time to time in a log."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
"""Where standard error is no terminal."""


class ProgressBar(tqdm):
    """tqdm's, whose arguments it takes, on standard error.

    Where that is no terminal, each state is a line of its own, the first and the last among them: a bar that is redrawn
    by carriage returns would be one line of many thousand characters in a log.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        form: dict[str, Any] = {"file": sys.stderr}
        if not sys.stderr.isatty():
            # maxinterval is when tqdm's thread would shorten the interval of a bar that is seldom updated.
            form = {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "maxinterval": float("inf")}
        super().__init__(*arguments, **(form | options))


class _Lines:
    """Writes what tqdm would draw over the line before on a line of its own."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False

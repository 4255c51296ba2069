"""How far a run has come, on the terminal."""

import time
from typing import Self

from rich.filesize import decimal

from megagap.preprocess.units import Unit
from megagap.terminal.progress import ProgressBar

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}B of {total_fmt}B of files [{elapsed}<{remaining}{postfix}]"
OF_PIPES = "{desc}: {n_fmt}B read [{elapsed}{postfix}]"
"""Of these nobody knows how much there will be."""


class Progress:
    """A bar of the input files' bytes, compressed or not, which tell the time that is left; a context manager.

    Its rate is of the content, uncompressed, that was read since it began: ``done`` bytes of the files were read by an
    earlier run.
    """

    def __init__(self, name: str, file_bytes: int, done: int, is_shown: bool) -> None:
        self.content_bytes = 0
        """Read since it began, uncompressed."""
        self._start = time.monotonic()
        self._bar = ProgressBar(
            total=file_bytes or None,
            initial=done,
            unit="B",
            unit_scale=True,
            desc=name,
            bar_format=BAR if file_bytes else OF_PIPES,
            disable=not is_shown,
        )

    def add(self, unit: Unit) -> None:
        self.content_bytes += unit.content_size
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{decimal(int(self.content_bytes / seconds))}/s uncompressed", refresh=False)
        self._bar.update(unit.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

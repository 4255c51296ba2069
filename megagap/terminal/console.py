"""Tables and text on the terminal, or in a pipe or file."""

import sys
from typing import IO, Any

import rich.console
from rich.cells import cell_len
from rich.table import Table

UNLIMITED = 1 << 20
"""Characters of a line where output is no terminal."""
NARROWEST_COLUMN = 4
"""Characters: narrower columns could not hold a character of an East Asian script and its neighbour."""


class Console(rich.console.Console):
    """That of rich, but it shows all that it is given, as it is written.

    - Where output is no terminal, a table is as wide as its content: nothing is folded, so that every cell is found in
      one line. In a terminal that is too narrow, cells are folded; no part of one is left out.
    - Square brackets and ``:names:`` of characters are ordinary text.
    - Where the reader of the output has seen enough (``… | head``), BrokenPipeError is raised. rich itself would end
      the process with 1; :func:`megagap.errors.run_tool` ends it quietly with 0.

    ``width`` overrides the width of the terminal, ``file`` standard output.
    """

    def __init__(self, *, width: int | None = None, file: IO[str] | None = None, **options: Any) -> None:
        if width is None and not (file or sys.stdout).isatty():
            width = UNLIMITED
        super().__init__(width=width, file=file, **({"markup": False, "emoji": False} | options))

    def print(self, *objects: Any, crop: bool = False, **options: Any) -> None:
        """As rich's, whose other arguments it takes too."""
        for table in objects:
            if isinstance(table, Table):
                self._show_all_of(table)
        super().print(*objects, crop=crop, **options)

    def on_broken_pipe(self) -> None:
        raise

    def _show_all_of(self, table: Table) -> None:
        for column in table.columns:
            column.overflow, column.no_wrap = "fold", False  # rich crops what it may not wrap
            column.min_width = max(column.min_width or 0, NARROWEST_COLUMN)
        if self.width == UNLIMITED:
            table.caption_justify = "left"
        if self.width == UNLIMITED and table.title:
            title = table.title if isinstance(table.title, str) else str(table.title)
            table.min_width = max(table.min_width or 0, cell_len(title))
            table.title_justify = "left"  # in the middle of a wide table it would be out of sight

"""Tables on the terminal."""

import rich.console


class Console(rich.console.Console):
    """That of rich, but where the reader of our output has seen enough (``… | head``), BrokenPipeError is raised.

    rich itself would end the process with 1; :func:`megagap.errors.run_tool` ends it quietly with 0.
    """

    def on_broken_pipe(self) -> None:
        raise

"""A second Ctrl-C ends the process at once, whatever its main thread is waiting for."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megagap.process.parent import UNDER_TORCHRUN

DUPLICATE_SECONDS = 1.0
"""Under torchrun, a SIGINT that follows the first one so soon is the same Ctrl-C: schedulers that signal all processes
of a job reach the workers themselves and torchrun, which passes it on."""


class InterruptCounter:
    """Tells how often a person has pressed Ctrl-C from the signals that a process receives.

    Without torchrun each SIGINT is one Ctrl-C. torchrun passes the first one on as SIGINT, and answers the second one,
    while it waits for its workers to end, with SIGTERM.
    """

    def __init__(self, under_torchrun: bool) -> None:
        self._under_torchrun = under_torchrun
        self._first: float | None = None

    def count(self, number: int, seconds: float) -> int:
        """Take note of a signal received at ``seconds`` of some clock. Returns 1 if it is the first Ctrl-C, 2 if it is
        a later one, 0 if it is none."""
        if number not in (signal.SIGINT, signal.SIGTERM):
            return 0
        if self._first is None:
            if number == signal.SIGTERM:
                return 0
            self._first = seconds
            return 1
        if number == signal.SIGTERM:
            return 2 if self._under_torchrun else 0
        is_duplicate = self._under_torchrun and seconds - self._first < DUPLICATE_SECONDS
        return 0 if is_duplicate else 2


@contextmanager
def watch_interrupts(on_first: Callable[[], None], on_second: Callable[[], None]) -> Iterator[None]:
    """Call ``on_first`` and ``on_second`` at the first and second Ctrl-C, in a thread of their own.

    Python runs signal handlers in the main thread only, between its own instructions: one that waits for another rank
    in a collective would not see a second Ctrl-C. Must be entered in the main thread.
    """
    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    counter = InterruptCounter(UNDER_TORCHRUN in os.environ)

    def watch() -> None:
        while received := os.read(reading_end, 1):
            count = counter.count(received[0], time.monotonic())
            if count:
                (on_first if count == 1 else on_second)()

    # The interpreter writes the number of each signal that has a handler in Python there.
    before = signal.set_wakeup_fd(writing_end, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing_end)
        thread.join(timeout=5)  # a terminal that is paused must not keep the process
        os.close(reading_end)

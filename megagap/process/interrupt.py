"""A second Ctrl-C or SIGTERM ends the process at once, whatever its main thread is waiting for."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megagap.process.parent import UNDER_TORCHRUN

DUPLICATE_SECONDS = 1.0
"""A signal that follows the first one so soon repeats it: schedulers signal all processes of a job, so that workers get
the signal itself and once more from torchrun, which passes it on."""


class InterruptCounter:
    """Tells from the signals that a process receives how often it was told to stop, by Ctrl-C (SIGINT) or SIGTERM.

    Without torchrun each SIGINT is one Ctrl-C. torchrun passes the first one on as SIGINT, and answers the second one,
    while it waits for its workers to end, with SIGTERM. It passes each SIGTERM on as such. SIGUSR1, a scheduler's
    notice that more will follow, is not counted.
    """

    def __init__(self, under_torchrun: bool) -> None:
        self._under_torchrun = under_torchrun
        self._seconds = 0.0
        self.first: int | None = None
        """The signal that came first."""

    def count(self, number: int, seconds: float) -> int:
        """Take note of a signal received at ``seconds`` of some clock. Returns 1 if it is the first, 2 if it is a later
        one, 0 if it is none or repeats the first."""
        if number not in (signal.SIGINT, signal.SIGTERM):
            return 0
        if self.first is None:
            self.first, self._seconds = number, seconds
            return 1
        is_second_interrupt = self.first == signal.SIGINT and number == (
            signal.SIGTERM if self._under_torchrun else signal.SIGINT
        )
        return 2 if is_second_interrupt or seconds - self._seconds >= DUPLICATE_SECONDS else 0


@contextmanager
def watch_interrupts(on_first: Callable[[int], None], on_second: Callable[[int], None]) -> Iterator[None]:
    """Call ``on_first`` and ``on_second`` at the first and second Ctrl-C or SIGTERM, in a thread of their own, with the
    number of the first.

    Python runs signal handlers in the main thread only, between its own instructions: one that waits for another rank
    in a collective would not see a second signal. Must be entered in the main thread.
    """
    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    counter = InterruptCounter(UNDER_TORCHRUN in os.environ)

    def watch() -> None:
        while received := os.read(reading_end, 1):
            count = counter.count(received[0], time.monotonic())
            if count and counter.first is not None:
                (on_first if count == 1 else on_second)(counter.first)

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

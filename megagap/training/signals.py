"""Stop requests: a signal asks, the training loop answers at the next step boundary."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM or SIGUSR1 (a scheduler's notice of preemption); ``name`` tells which."""

    def __init__(self) -> None:
        self.name = ""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def __bool__(self) -> bool:
        return bool(self.name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

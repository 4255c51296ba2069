"""What a process is doing: the one primitive behind hang reports, recordings, slow ranks and goodput.

``with spans.span("forward", microbatch=3, chunk=0): …`` keeps in memory that this is going on, always: it costs about a
microsecond. A watchdog in another thread reads it (``observe/watchdog.py``); listeners are told of each begin and end,
and record or add up what they want (``observe/spans.py``, ``observe/goodput.py``, ``observe/pace.py``).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

WRITER = "writer"
"""Where the main thread waits for the one that writes checkpoints in the background, whose spans are its own."""


class Span:
    """Something that begins and ends, and may hold others. Made by :class:`Spans`."""

    __slots__ = ("axis", "fields", "name", "number", "peer", "spans", "waits")

    def __init__(
        self,
        spans: "Spans",
        name: str,
        fields: dict[str, int],
        waits: bool = False,
        axis: str = "",
        number: int = 0,
        peer: int | None = None,
    ) -> None:
        self.spans, self.name, self.fields = spans, name, fields
        self.waits = waits
        """Whether it does nothing but wait for other ranks, or for the device."""
        self.axis, self.number = axis, number
        """Of a collective: the mesh axis, and how many this rank had begun along it with this one."""
        self.peer = peer
        """Of a message: the global rank that it comes from or goes to."""

    def __enter__(self) -> None:
        spans = self.spans
        spans.open.append(self)
        spans.moves += 1
        for listener in spans.listeners:
            listener.begin(self)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        spans = self.spans
        if error is not None and spans.failure[0] != id(error):
            spans.failure = id(error), list(spans.open)
        spans.open.remove(self)
        spans.moves += 1
        for listener in spans.listeners:
            listener.end(self)

    def __str__(self) -> str:
        """``forward of microbatch 3, chunk 0``, ``all-reduce over tp (number 57)``."""
        text = self.name.replace("_", " ")
        if self.axis:
            text += f" over {self.axis} (number {self.number})"
        if self.peer is not None:
            text += f" for rank {self.peer}"
        fields = ", ".join(f"{key} {value}" for key, value in self.fields.items())
        return f"{text} of {fields}" if fields else text


class Listener(Protocol):
    """Is told of spans, in the thread that runs them."""

    def begin(self, span: Span) -> None: ...

    def end(self, span: Span) -> None: ...


class Spans:
    """Those of one process: of its main thread, and of others that work while it waits for them, as autograd's do."""

    def __init__(self) -> None:
        self.step = 0
        """The step under way, or the last one."""
        self.moves = 0
        """Changes whenever a span begins or ends, and with :meth:`move`."""
        self.open: list[Span] = []
        """Under way, the outermost first."""
        self.failure: tuple[int, list[Span]] = (0, [])
        """The identity of the last error that ended spans, and those that were open when it was raised."""
        self.steps = 0
        """Begun by this process."""
        self.collectives: Counter[str] = Counter()
        """Begun, by axis."""
        self.listeners: tuple[Listener, ...] = ()

    def begin_step(self, step: int) -> None:
        """What follows belongs to this step."""
        self.step = step
        self.steps += 1

    def move(self, *_: object) -> None:
        """Something that takes long goes on."""
        self.moves += 1

    def span(self, name: str, **fields: int) -> Span:
        """What happens in the block, under ``name``."""
        return Span(self, name, fields)

    def wait(self, name: str, peer: int | None = None) -> Span:
        """The block waits for another rank, or for the device, and computes nothing."""
        return Span(self, name, {}, waits=True, peer=peer)

    def collective(self, name: str, axis: str) -> Span:
        """Count a collective along an axis. The result is to be entered where the process waits for its end."""
        self.collectives[axis] += 1
        self.moves += 1
        return Span(self, name, {}, True, axis, self.collectives[axis])

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` of the spans of the block."""
        self.listeners += (listener,)
        try:
            yield
        finally:
            self.listeners = tuple(other for other in self.listeners if other is not listener)

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """No listener is told of what begins and ends in the block."""
        listeners, self.listeners = self.listeners, ()
        try:
            yield
        finally:
            self.listeners = listeners

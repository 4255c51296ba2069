"""Ends a run in which nothing goes on any more, with a report of what every rank was doing.

Each rank has two threads that look at the spans of its main thread. As long as these move, nothing is written. A rank
that has stood still for half of ``run.hang_seconds`` writes a file that says where (:class:`RankState`) into
RUN/logs/hang; from then on all others do, too, as long as it is there. Once a rank has stood still for the whole time,
and no other has moved since, the first to see it writes RUN/logs/hang_report.txt, and all end themselves. Ranks
exchange these files only, and no messages: what hangs may be the network, or the rank that holds the store.

Nothing here can hang itself. The thread that keeps the time touches no file; it ends the process if the one that does
is late, as on a file system that hangs. A main thread that holds Python's lock stops both; then faulthandler, which
needs no lock, writes its stack to the rank's log and ends the process.
"""

import faulthandler
import logging
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megagap.errors import HangError
from megagap.files import write_text
from megagap.observe.flight_recorder import RECORDS, save_record
from megagap.observe.hang_report import REPORT, RankState, report, states_of, suspected
from megagap.observe.logs import log_file
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.spans import WRITER, Span, Spans

PATIENCE = 2.0
"""How many times the time-out starting, the first step and evaluations may take: they read much, and compile."""
POLLS = 50
"""Looks at the spans per time-out."""
POLL_SECONDS = (0.05, 2.0)
"""Least and most between two looks."""
COLLECT_SECONDS = 4.0
"""How long a report waits for the states of ranks that have written none."""
LATE_SECONDS = 8.0
"""After the time-out, when a process ends even if no report has been written."""
STUCK_SECONDS = 1.0
"""After the time-out, when faulthandler ends a process whose threads do not run."""
LOST_SECONDS = 1.0
"""How long the report of a lost rank waits for the states of others, which notice it within moments."""
LOG_BYTES = 1 << 16
"""Of a silent rank's log that are searched for what faulthandler wrote."""
MOST_LOGS = 64
"""Silent ranks whose logs are searched."""

End = Callable[[HangError, bool], NoReturn]
"""Records an error and ends the process, from any thread; prints it, too, where this rank is the one of its machine to
do so."""

log = logging.getLogger(__name__)


class Watchdog:
    """Of one process. :meth:`start` it once all ranks see the run directory."""

    def __init__(
        self,
        logs: Path,
        spans: Spans,
        layout: Layout,
        rank: int,
        seconds: float,
        end: End,
        writer: Spans | None = None,
    ) -> None:
        """``logs``: RUN/logs. ``seconds``: the time-out. ``writer``: of the thread that writes checkpoints."""
        self.logs, self.folder = logs, logs / "hang"
        self.writer = writer or Spans()
        self.spans, self.layout, self.rank, self.seconds, self.end = spans, layout, rank, seconds, end
        low, high = POLL_SECONDS
        self.poll = min(max(seconds / POLLS, low), high)
        self._idle = 0.0
        """Seconds without a move; a single write, so that threads need no lock."""
        self._closed = threading.Event()
        self._concluding = threading.Lock()
        self._others_moved = -float("inf")
        self._published, self._published_at = "", 0.0
        """The name of this rank's file, and when it was written."""
        self._log = (logs / f"rank_{rank:05}.log").open("ab")
        """Where faulthandler writes."""

    def start(self) -> None:
        for work in (self._keep_time, self._keep_states):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """The run has ended by itself, or failed by an error."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._withdraw()

    @property
    def limit(self) -> float:
        """Seconds without a move that are a hang, now."""
        is_patient = self.spans.steps < 2 or any(span.name == "evaluation" for span in self.spans.open[:1])
        return self.seconds * PATIENCE if is_patient else self.seconds

    # -- the thread that keeps the time

    def _keep_time(self) -> None:
        moves, last = self._moves(), time.monotonic()
        while True:
            faulthandler.dump_traceback_later(self.limit + STUCK_SECONDS, exit=True, file=self._log)
            if self._closed.wait(self.poll):
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            # A process that was stopped for a while, and goes on, has not been idle.
            passed, last = min(now - last, 3 * self.poll), now
            if self._moves() != moves:
                moves, self._idle = self._moves(), 0.0
            else:
                self._idle += passed
            if self._idle >= self.limit + LATE_SECONDS and not self._have_others_moved():
                place = self._state(self._open()).place
                message = f"rank {self.rank} has stood still for {self._idle:.0f} s in {place}"
                print(f"{message}, and cannot write to {self.folder}", file=sys.stderr, flush=True)
                os._exit(HangError.exit_code)

    def _moves(self) -> int:
        return self.spans.moves + self.writer.moves

    def _open(self) -> list[Span]:
        """What goes on; where the main thread waits for the writer, what that does."""
        spans = list(self.spans.open)
        return spans + list(self.writer.open) if spans and spans[-1].name == WRITER else spans

    # -- the thread that reads and writes files

    def _keep_states(self) -> None:
        while not self._closed.wait(self.poll):
            with suppress(OSError):
                if self._idle >= self.limit / 2:
                    self._refresh("stalled")
                elif any(name.startswith("stalled") for name in os.listdir(self.folder)):
                    self._refresh("moving")
                else:
                    self._withdraw()
            if self._idle >= self.limit and not self._do_others_move():
                self._conclude()

    def _do_others_move(self) -> bool:
        """Whether another rank has moved within the time-out, as its file says."""
        now = time.time()
        states = [state for rank, state in self._read().items() if rank != self.rank]
        if any(state.idle_seconds + max(0.0, now - state.time) < self.limit for state in states):
            self._others_moved = time.monotonic()
            return True
        return False

    def _have_others_moved(self) -> bool:
        """What the other thread has found a moment ago."""
        return time.monotonic() - self._others_moved < LATE_SECONDS

    def _state(self, spans: Sequence[Span], cause: str = "", stacks: str = "") -> RankState:
        last = spans[-1] if spans else None
        return RankState(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            idle_seconds=self._idle,
            step=self.spans.step,
            doing=list(map(str, spans)),
            waits=last is not None and last.waits and last.name != WRITER,
            axis=last.axis if last is not None else "",
            number=last.number if last is not None else 0,
            peer=last.peer if last is not None else None,
            collectives=Counter(dict(self.spans.collectives)) + Counter(dict(self.writer.collectives)),
            cause=cause,
            stacks=stacks,
        )

    def _refresh(self, kind: str) -> None:
        """Keep this rank's file no older than a tenth of the time-out."""
        if not self._published.startswith(kind) or time.monotonic() - self._published_at > self.limit / 10:
            self._publish(kind, self._state(self._open(), stacks=stacks()))

    def _publish(self, kind: str, state: RankState) -> None:
        name = f"{kind}_{self.rank:05}.json"
        write_text(self.folder / name, state.model_dump_json())
        if self._published not in ("", name):
            (self.folder / self._published).unlink(missing_ok=True)
        self._published, self._published_at = name, time.monotonic()

    def _withdraw(self) -> None:
        if self._published:
            with suppress(OSError):
                (self.folder / self._published).unlink(missing_ok=True)
            self._published = ""

    def _read(self) -> dict[int, RankState]:
        texts = []
        for path in self.folder.glob("*_*.json"):
            with suppress(OSError):
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
        return states_of(texts)

    def _conclude(self) -> NoReturn:
        with self._concluding:
            idle = f"{self._idle:.0f} s"
            title = f"Nothing has gone on for {idle} (run.hang_seconds = {self.seconds:g})."
            with suppress(OSError):
                self._publish("stalled", self._state(self._open(), stacks=stacks()))
                self._save_record()
                self._report(title, COLLECT_SECONDS)
            states = self._read()
            host = socket.gethostname()
            speaker = min((state.rank for state in states.values() if state.host == host), default=self.rank)
            found = f"{idle} without progress at step {self.spans.step}: {suspected(states, self.layout)}"
            error = HangError(f"{found}\n  {self.logs / REPORT} says what each rank was doing.")
            self.end(error, self.rank == speaker)

    def lost(self, error: BaseException) -> None:
        """Another rank is gone, as this one's ``error`` says: write or await the report before the process ends.

        To be called in the main thread. Where a hang is being reported already, that ends the process."""
        self._closed.set()
        with self._concluding, suppress(OSError):
            stack = "".join(traceback.format_exception(error))
            identity, spans = self.spans.failure
            spans = spans if identity == id(error) else []
            self._publish("stalled", self._state(spans, str(error).strip().partition("\n")[0], stack))
            self._save_record()
            self._report("A rank was lost.", LOST_SECONDS)
            log.error("%s says what each rank was doing", self.logs / REPORT)

    def _save_record(self) -> None:
        """Torch's own, beside the report. This rank's state is there already, should torch stand still, too."""
        with suppress(RuntimeError):
            save_record(self.logs / RECORDS / f"rank_{self.rank:05}.json")

    def _report(self, title: str, seconds: float) -> None:
        """Write the report once all states are there, or after ``seconds``; or wait for the rank that does."""
        done = self.folder / "reported"
        deadline = time.monotonic() + seconds
        try:
            os.close(os.open(self.folder / "claimed", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            while not done.exists() and time.monotonic() < deadline + 1:
                time.sleep(0.05)
            return
        while len(states := self._read()) < self.layout.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
        silent = [rank for rank in range(self.layout.world_size) if rank not in states]
        logged = {rank: last_stacks(log_file(self.logs, rank)) for rank in silent[:MOST_LOGS]}
        write_text(self.logs / REPORT, report(title, states, self.layout, logged))
        done.touch()


def stacks() -> str:
    """Those of all threads of this process but the calling one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own, parts = threading.get_ident(), []
    for ident, frame in sys._current_frames().items():
        if ident != own and not names.get(ident, "").startswith("watchdog"):
            text = "".join(traceback.format_stack(frame))
            parts.append(f"thread {names.get(ident, ident)}:\n{text}")
    return "\n".join(sorted(parts, key=lambda part: not part.startswith("thread MainThread")))


def last_stacks(path: Path) -> str:
    """What faulthandler wrote at the end of a log; nothing if it did not."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    _, begin, written = text.rpartition("\nTimeout (")
    return (begin + written).strip()


def clear(run: RunDirectory) -> None:
    """Remove what an earlier start left of a hang; its report stays. By the writer, before any rank watches."""
    if run.is_writer:
        shutil.rmtree(run.logs / "hang", ignore_errors=True)
        (run.logs / "hang").mkdir(parents=True, exist_ok=True)


@contextmanager
def watching(run: RunDirectory, mesh: Mesh, seconds: float, end: End) -> Iterator[Watchdog | None]:
    """Watch the block, in which a hang ends the process; None where ``seconds`` is 0."""
    if not seconds:
        yield None
        return
    writer = mesh.background_spans
    watchdog = Watchdog(run.logs, mesh.spans, mesh.layout, mesh.world.rank, seconds, end, writer)
    watchdog.start()
    yield watchdog  # an error leaves it to who ends the process: the loss of a rank is reported, too
    watchdog.close()

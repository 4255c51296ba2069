"""Maps a function over items in worker processes, in order; stops with the error of a worker that raises or dies."""

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar, cast

from megagap.errors import DataError, system_reason

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_TO_DIE = 5.0
"""Seconds between the end of a worker's pipe and that of its process."""
UNDER_WAY = 3
"""Items per worker: one in progress, one queued, one done and waiting for an earlier one."""


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    threads: int = 1,
    describe: Callable[[Item], str] = str,
) -> Generator[tuple[Item, Result], None, None]:
    """Each item and ``function(item)``, which runs in ``workers`` processes.

    ``threads`` is how many threads libraries in Rust may use in each of them. If it is one, ``function`` must work in a
    forked process: it may have no threads, nor locks that threads of this process could hold.
    At most a few items per worker are in flight, so memory does not grow with their number. Raises what a worker
    raises, and :class:`DataError` if one died or ran out of memory, naming it and what it worked on (``describe``).
    """
    # Forked workers share what the function has loaded. A library's threads do not survive a fork, so with these
    # workers are spawned, and so they are on macOS, whose own libraries may have some; the function is pickled then.
    can_fork = threads == 1 and sys.platform == "linux"
    context: ForkContext | SpawnContext = get_context("fork") if can_fork else get_context("spawn")
    processes: list[BaseProcess] = []
    idle: SimpleQueue[tuple[BaseProcess, Connection]] = SimpleQueue()

    def call(item: Item) -> Result:
        # Each worker has its own pipe: with a shared one, a worker that dies while sending would block the rest.
        worker, connection = idle.get()
        try:
            connection.send(item)
            error, result = connection.recv()
        except (EOFError, OSError):
            raise DataError(
                f"a worker process died ({_cause_of_death(worker)}) on {describe(item)}\n"
                "  try again with fewer --workers, or with --workers 1 to see its error."
            ) from None
        finally:
            idle.put((worker, connection))
        if isinstance(error, MemoryError):
            raise DataError(
                f"a worker process ran out of memory on {describe(item)}\n  try again with fewer --workers."
            ) from None
        if error is not None:
            raise error
        return cast(Result, result)

    pool: ThreadPoolExecutor | None = None
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for _ in range(workers):
            try:
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(target=_work, args=(theirs, threads, function), daemon=True)
                process.start()
            except OSError as error:
                raise DataError(
                    f"cannot start a worker process: {system_reason(error)}\n  use fewer --workers."
                ) from None
            processes.append(process)
            theirs.close()  # only the worker has it, so that its death ends our reading
            idle.put((process, ours))
        pool = ThreadPoolExecutor(workers)  # only now: threads do not survive a fork
        for item in items:
            under_way.append((item, pool.submit(call, item)))
            if len(under_way) == workers * UNDER_WAY:
                yield _first_of(under_way)
        while under_way:
            yield _first_of(under_way)
    finally:
        for process in processes:
            process.kill()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def _cause_of_death(process: BaseProcess) -> str:
    process.join(SECONDS_TO_DIE)
    code = process.exitcode
    if code is None or code >= 0:
        return f"number {process.pid}, exit code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    return f"number {process.pid}, killed by {name}" + (": out of memory?" if -code == signal.SIGKILL else "")


def _first_of(under_way: "deque[tuple[Item, Future[Result]]]") -> tuple[Item, Result]:
    item, future = under_way.popleft()
    return item, future.result()


def _work(connection: Connection, threads: int, function: Callable[[Any], Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its workers cleanly
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            item = connection.recv()
            answer: tuple[Exception | None, Any]
            try:
                answer = None, function(item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error, None
            connection.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

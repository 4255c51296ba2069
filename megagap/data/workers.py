"""A function over items in worker processes, in order; a worker that raises or dies ends it with its error."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from megagap.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

UNDER_WAY = 3
"""Items for each worker: one in work, one waiting, one done and waiting for an earlier one."""


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, threads: int = 1
) -> Generator[tuple[Item, Result], None, None]:
    """Each item and ``function(item)``, which runs in ``workers`` processes.

    ``threads`` is how many threads libraries in Rust may use in each of them. If it is one, ``function`` must work in a
    forked process: it may have no threads, nor locks that threads of this process could hold.
    At most a few items a worker are under way, so memory does not grow with their number. Raises what a worker raised,
    and :class:`DataError` if one died.
    """
    # Forked workers share what the function has loaded. A library's threads do not survive a fork, so with these
    # workers are spawned, and so they are on macOS, whose own libraries may have some; the function is pickled then.
    method = "fork" if threads == 1 and sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, get_context(method), _start, (threads, function))
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            under_way.append((item, pool.submit(_call, item)))
            if len(under_way) == workers * UNDER_WAY:
                yield _first_of(under_way)
        while under_way:
            yield _first_of(under_way)
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (out of memory, or killed?)\n"
            "  try again with fewer --workers, or with --workers 1 to see its fault."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _first_of(under_way: "deque[tuple[Item, Future[Result]]]") -> tuple[Item, Result]:
    item, future = under_way.popleft()
    return item, future.result()


_function: Callable[[Any], Any]
"""In a worker process: set once by its initialiser, as ProcessPoolExecutor has no other place for it."""


def _start(threads: int, function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)

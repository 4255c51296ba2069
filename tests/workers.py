"""A pool of real processes for distributed tests: started once, used by many tests, each with its own process group."""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.launching import SECONDS

MOST_RANKS = 8


class Workers:
    """Runs a function on n ranks over gloo and returns every rank's result."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # Imported once in the server; every worker is a fork of it. Recomputation needs dynamo, a second of CPU.
        self._context.set_forkserver_preload(
            ["torch", "torch.distributed", "torch._dynamo", "megagap.training.trainer"]
        )
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        """Of the files by which ranks find each other. It outlives them: the end of a group whose file's folder is gone
        waits for it, for minutes."""
        self._runs = 0

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = SECONDS) -> list[Any]:
        """``function(rank, world_size, *arguments)`` on each rank; a module-level function.

        Raises AssertionError with the traceback of the first rank that fails.
        """
        self._start(ranks)
        self._runs += 1
        store = os.path.join(self._folder.name, str(self._runs))
        for rank in range(ranks):
            self._workers[rank][1].send((store, rank, ranks, function, arguments))
        results, failures = [], []
        for rank in range(ranks):
            connection = self._workers[rank][1]
            # Once one rank has failed, the others wait for it in vain.
            if not connection.poll(3 if failures else timeout):
                failures.append(f"rank {rank}: no answer")
                continue
            try:
                succeeded, value = connection.recv()
            except EOFError:
                succeeded, value = False, "process died"
            (results if succeeded else failures).append(value if succeeded else f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise AssertionError("\n".join(sorted(failures, key=lambda text: "no answer" in text)))
        return results

    def _start(self, ranks: int) -> None:
        while len(self._workers) < ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the modules of torch and megagap: looking through them after each run takes longer than most runs
    while True:
        try:
            store, rank, ranks, function, arguments = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            if ranks > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
            answer = (True, function(rank, ranks, *arguments))
            if ranks > 1:
                dist.barrier()
                dist.destroy_process_group()
            gc.collect()  # a run's process groups, which its reference cycles keep: their threads poll
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
        if not answer[0]:
            os._exit(1)  # its group is in an unknown state

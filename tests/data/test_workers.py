"""A worker that dies ends the run with a message, whatever it was doing."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
from multiprocessing.connection import Connection
from megagap.data.workers import map_in_order
from megagap.errors import run_tool

def half(self, message, write=os.write):
    write(self.fileno(), message[: len(message) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

def double(item):
    if item == 5:
        Connection._send = half
    return 2 * item

if __name__ == "__main__":
    run_tool(lambda: print(*map_in_order(double, range(int(sys.argv[1])), 2, threads=int(sys.argv[2]))))
"""


def run(folder: Path, items: int, threads: int) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, folder / "program.py", str(items), str(threads)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_come_in_order(tmp_path: Path, threads: int) -> None:
    assert run(tmp_path, 5, threads).stdout == "(0, 0) (1, 2) (2, 4) (3, 6) (4, 8)\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_killed_while_it_sends_a_result_ends_the_run(tmp_path: Path, threads: int) -> None:
    done = run(tmp_path, 100, threads)
    assert done.returncode == 2 and done.stderr.startswith("data error: a worker process died"), done.stderr

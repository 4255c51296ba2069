"""A worker that dies ends the run with a message, whatever it was doing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import SECONDS

PROGRAM = """
import os, signal, sys
from multiprocessing.connection import Connection
from megagap.preprocess.workers import map_in_order
from megagap.errors import run_tool

def half(self, message, write=os.write):
    write(self.fileno(), message[: len(message) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

def double(item):
    if item == 5:
        Connection._send = half
    return 2 * item

if __name__ == "__main__":
    run_tool(lambda: print(*map_in_order(double, range(int(sys.argv[1])), 2, int(sys.argv[2]), "item {}".format)))
"""


def run(folder: Path, items: int, threads: int) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, folder / "program.py", str(items), str(threads)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_come_in_order(tmp_path: Path, threads: int) -> None:
    assert run(tmp_path, 5, threads).stdout == "(0, 0) (1, 2) (2, 4) (3, 6) (4, 8)\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_killed_while_it_sends_a_result_ends_the_run(tmp_path: Path, threads: int) -> None:
    done = run(tmp_path, 100, threads)
    assert done.returncode == 2 and done.stderr.startswith("data error: a worker process died (number "), done.stderr
    assert "killed by SIGKILL: out of memory?) on item 5\n" in done.stderr


FATAL = """
import os, signal, sys
from megagap.preprocess.workers import map_in_order
from megagap.errors import run_tool

def end(item):
    if item == 5:
        {how}
    return item

if __name__ == "__main__":
    run_tool(lambda: print(*map_in_order(end, range(100), 2, int(sys.argv[1]), "item {{}}".format)))
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("os._exit(7)", ", exit code 7) on item 5"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ", killed by SIGSEGV) on item 5"),
        ("raise MemoryError", "a worker process ran out of memory on item 5"),
        ("bytes(1 << 60)", "a worker process ran out of memory on item 5"),
    ],
)
def test_the_error_of_a_dead_worker_says_how_and_on_what(tmp_path: Path, threads: int, how: str, message: str) -> None:
    (tmp_path / "program.py").write_text(FATAL.format(how=how))
    command = [sys.executable, tmp_path / "program.py", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr

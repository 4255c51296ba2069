import os
import subprocess
import sys

from tests.launching import SECONDS, wait_until
from tools.processes import descendants, kill_tree

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'input()'])"


def test_descendants_are_found_and_end_with_their_tree_while_other_processes_come_and_go(monkeypatch):
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*listed(path), "999999999"])  # one that has ended since
    with subprocess.Popen([sys.executable, "-S", "-c", PARENT], stdin=subprocess.PIPE) as parent:
        wait_until(lambda: len(descendants(parent.pid)) == 1)
        assert parent.pid in descendants(os.getpid())
        kill_tree(parent.pid)
        parent.wait(SECONDS)
    assert not descendants(parent.pid)

"""``python`` with torch and other large libraries already imported: each program is a fork of one server.

For commands whose promise is neither how a process starts nor which processes there are. Importing torch and friends
takes seconds, which is most of what many a tool does; megagap itself is imported by each program anew.
"""

import atexit
import os
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""Before any test changes it. Each program takes its own PYTHONPATH."""


@cache
def python() -> str:
    """A program to call like ``sys.executable``, with a ``torchrun`` beside it whose workers start so too. Starts the
    server, which all of them are children of, not of whoever started them.

    What it cannot start this way, such as ``-I``, or with other settings of the libraries in the environment, it leaves
    to the Python that runs the tests.
    """
    folder = tempfile.TemporaryDirectory(prefix="megagap-python-")
    atexit.register(folder.cleanup)
    socket = Path(folder.name, "socket")
    lifeline, ours = os.pipe()  # closed by the kernel when this process ends, however it does
    command = [sys.executable, HERE / "server.py", socket, str(lifeline)]
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT, pass_fds=[lifeline]
    )
    os.close(lifeline)
    atexit.register(server.wait)
    atexit.register(os.close, ours)
    client = ["exec", sys.executable, "-I", "-S", str(HERE / "client.py"), sys.executable, str(socket)]
    program = Path(folder.name, "python")
    workers = f"export PYTHON_EXEC={shlex.quote(str(program))}"
    scripts = {
        program: shlex.join(client),
        program.with_name("torchrun"): f"{workers}\n{shlex.join([*client, '-m', 'torch.distributed.run'])}",
    }
    for script, command in scripts.items():
        script.write_text(f'#!/bin/sh\n{command} "$@"\n')
        script.chmod(0o700)
    return str(program)


def torchrun() -> str:
    """The one beside :func:`python`."""
    return str(Path(python()).with_name("torchrun"))

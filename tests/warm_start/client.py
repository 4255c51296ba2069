"""``client.py PYTHON SOCKET ARGUMENT ...``: what ``PYTHON ARGUMENT ...`` does, by a fork of the server at ``SOCKET``.

It passes on its streams, folder, environment and limits, then signals to the fork, and ends as that ends. To start in
milliseconds, it is run by ``python -I -S``, and imports little.
"""

import json
import os
import resource
import signal
import socket
import sys
import time

SETTINGS = ("OMP_", "MKL_", "KMP_", "ATEN_", "TORCH", "PYTORCH", "CUDA", "MPL", "XDG_", "HOME")
SETTINGS += ("PYTHON", "LD_", "LC_", "LANG", "TZ")
CHANGEABLE = ("PYTHONPATH", "PYTHON_EXEC", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "TORCH_WARM_POOL")
"""Taken on by each program: the first by the server, the second by torchrun, the others by torch, which sets them
itself where it compiles."""
OF_WORKERS = ("TORCHELASTIC_", "TORCH_NCCL_")
"""What torchrun tells its workers, who read it when they meet."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def settings_of(environment):
    """What Python and the libraries read as they start, which the server cannot change later."""
    later = {name for name in environment if name in CHANGEABLE or name.startswith(OF_WORKERS)}
    return {name: value for name, value in environment.items() if name.startswith(SETTINGS) and name not in later}


def ignored():
    """Signals that a program would ignore from the start, such as SIGHUP under nohup."""
    return [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]


def limits():
    return {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}


def connect(path):
    """To a server that may be starting still."""
    while True:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(path)
            return server
        except (FileNotFoundError, ConnectionRefusedError):
            server.close()
            time.sleep(0.02)


def main():
    python, path, *arguments = sys.argv[1:]
    is_program = arguments and (arguments[0] in ("-m", "-c") or not arguments[0].startswith("-"))
    if not is_program or any(map(os.isatty, range(3))):
        os.execv(python, [python, *arguments])
    os.umask(umask := os.umask(0))
    request = dict(arguments=arguments, folder=os.getcwd(), environment=dict(os.environ), umask=umask, limits=limits())
    request["ignored"] = ignored()
    content = json.dumps(request).encode()
    server = connect(path)
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    pid = int.from_bytes(server.recv(8), "big")
    if not pid:
        os.execv(python, [python, *arguments])
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = os.waitstatus_to_exitcode(int.from_bytes(server.recv(8), "big"))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()

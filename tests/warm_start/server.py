"""``server.py SOCKET LIFELINE``: imports large libraries, then forks a program for each client, until LIFELINE ends."""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import ModuleType
from typing import Any

from client import ignored, settings_of

LIBRARIES = (
    *("numpy", "torch", "torch.distributed", "torch.distributed.run", "torch.profiler", "safetensors.torch"),
    *("pydantic.main", "pydantic.type_adapter", "rich.console", "rich.table", "tqdm", "orjson", "tomllib", "tomli_w"),
    *("xxhash", "zstandard", "tokenizers"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboard.summary.writer.record_writer"),
)
"""None of megagap's own modules: each program imports them, as it would without the server. Nor any of Hugging Face's
that reads HF_… as it is imported: tests, and what they import, change such variables."""

Request = dict[str, Any]


class Server:
    """Forks a program per client, and tells it how that ended."""

    def __init__(self, path: str, lifeline: int) -> None:
        self.settings, self.ignored = settings_of(os.environ), ignored()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.lifeline = lifeline
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.selector.register(lifeline, selectors.EVENT_READ, None)

    def run(self) -> Request:
        """Returns in each fork, with what its client asks for; exits with the lifeline."""
        while True:
            key, _ = self.selector.select()[0]
            if key.fileobj is self.listener:
                if (request := self._accept()) is not None:
                    return request
            elif key.fileobj == self.lifeline:
                os._exit(0)
            elif isinstance(key.fileobj, socket.socket):  # the client is gone
                self.selector.unregister(key.fileobj)
                os.kill(key.data[0], signal.SIGKILL)
            else:
                self._tell_end(key.fd, *key.data)

    def _accept(self) -> Request | None:
        client, _ = self.listener.accept()
        size, streams, _, _ = socket.recv_fds(client, 8, 3)
        with client.makefile("rb") as sent:
            request: Request = json.loads(sent.read(int.from_bytes(size, "big")))
        if settings_of(request["environment"]) != self.settings or request["ignored"] != self.ignored:
            pid = 0
        elif (pid := os.fork()) == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            others = [key.fileobj for key in self.selector.get_map().values()]
            for file in (*streams, client, *others):
                os.close(file.detach() if isinstance(file, socket.socket) else file)
            self.selector.close()
            return request
        for stream in streams:
            os.close(stream)
        client.sendall(pid.to_bytes(8, "big"))
        if pid:
            self.selector.register(client, selectors.EVENT_READ, (pid,))
            self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
        return None

    def _tell_end(self, pidfd: int, pid: int, client: socket.socket) -> None:
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        with suppress(KeyError):
            self.selector.unregister(client)
        with suppress(BrokenPipeError):
            client.sendall(status.to_bytes(8, "big"))
        client.close()


def run(request: Request) -> None:
    """The program, as ``__main__``."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        former = getattr(sys, name)  # which knows whether the server's stream could seek
        settings = dict(encoding=former.encoding, errors=former.errors, closefd=False)
        stream = open(number, former.mode, **settings)  # noqa: SIM115  (it stays open)
        stream.reconfigure(line_buffering=former.line_buffering or former.write_through)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    for name, values in request["limits"].items():
        resource.setrlimit(getattr(resource, name), values)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    importlib.invalidate_caches()
    first, *rest = request["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.realpath(first)), [first, *rest]
        runpy.run_path(first, run_name="__main__")


def end(code: int) -> None:
    """Like the interpreter, but memory is not freed object by object: with torch that takes a fifth of a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # else the interpreter says what is wrong with a stream
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    server = Server(sys.argv[1], int(sys.argv[2]))
    for library in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)
    gc.collect()
    gc.freeze()
    try:
        run(server.run())
        end(0)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            end(stop.code or 0)
        raise

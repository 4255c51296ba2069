"""Files that appear under their name only when whole."""

import errno
import fcntl
import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakSet

from megagap.errors import DataError, MegagapError, library_errors

log = logging.getLogger(__name__)


def partial_name(path: str | Path) -> Path:
    """Where to write what will be renamed to ``path``; matches neither ``*.bin`` nor ``*.idx``."""
    return Path(f"{path}.partial-{os.getpid()}")


def publish(partial: Path, path: str | Path) -> None:
    """Rename ``partial``, whose contents have been synced, to ``path``, and make the rename itself durable."""
    os.replace(partial, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # as on some network file systems
            raise
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``, replacing what was there in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, replacing what was there in one step."""
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written_by_library(path: str | Path) -> Iterator[Path]:
    """For a library that writes a file by name: yields another name, whose file then replaces ``path`` in one step.

    The file gets the mode that the umask gives, whatever the library chose (some write through files that only their
    owner may read). Raises :class:`DataError` naming ``path`` for all that the block raises: the library call only.
    """
    partial = partial_name(path)
    try:
        with library_errors(f"cannot write {path}"):
            yield partial
            os.chmod(partial, 0o666 & ~_umask())
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def require_name(name: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Raises ``kind`` for what no file can be called: where the system is not asked, it would be a ValueError."""
    if "\0" in str(name):
        raise kind(f"no file can be called {str(name)!r}: there is a NUL in it")


def pair_prefix(name: str | Path) -> str:
    """The prefix of a ``.bin``/``.idx`` pair that was named by it, or by one of its files."""
    require_name(name)
    prefix = str(name)
    for ending in (".bin", ".idx", ".json"):
        stem = prefix.removesuffix(ending)
        if stem != prefix and not os.path.exists(f"{prefix}.idx"):
            return stem
    return prefix


@contextmanager
def reading(path: str | Path, kind: type[MegagapError] = DataError) -> Iterator[None]:
    """For a block that opens or reads a file that a user named, as bytes or as UTF-8.

    Raises ``kind`` naming the file where the system refuses that, it is not valid UTF-8, or no file can have such a
    name (one with a NUL). Who has an answer to a missing file catches FileNotFoundError within the block.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"cannot read {str(path) or repr('')}: {explain(error)}") from None
    except UnicodeDecodeError as error:
        raise kind(f"cannot read {path}: it is not valid UTF-8 ({error.reason} at byte {error.start:,})") from None
    except ValueError as error:
        raise kind(f"cannot read {str(path)!r}: {error}") from None


def explain(error: OSError) -> str:
    """What the system says, and what to do about it where that is not plain."""
    said = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{said}\n  this process may open {limit:,}; allow more with ulimit -n."
    return said


def allow_more_open_files() -> bool:
    """Raise this process's limit of open files as far as the system lets it; whether that changed anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS allows fewer than its limit says
        return False
    return True


def make_folder(folder: str | Path) -> None:
    """Make a folder that a user named, and those above it. Raises :class:`DataError` if that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}") from None
    except ValueError as error:  # a NUL
        raise DataError(f"cannot make the folder {str(folder)!r}: {error}") from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """For a block that writes a file that a user named: its folder is made.

    Raises :class:`DataError` naming the file where the system refuses that, or the block.
    """
    make_folder(Path(path).parent)
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None


class LockedError(Exception):
    """Another process, or another part of this one, holds the lock."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Lock:
    """An advisory lock on a file that names its holder, held until :meth:`release` or the end of the process.

    Processes that are forked from it do not hold it: they may outlive it for a while.

    Raises :class:`LockedError` at once if it is held, and OSError if the file cannot be written. Where the file system
    cannot lock, as some on clusters, it warns and goes on.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        while True:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise LockedError(holder) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    file.close()
                    raise
                log.warning("%s: its file system cannot lock files; make sure that nobody else writes there", path)
            # The holder before may have removed the file after we opened it.
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                break
            file.close()
        self._file = file
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError:  # a full disk
            Path(path).unlink(missing_ok=True)
            with suppress(OSError):
                file.close()
            raise
        _held.add(self)

    def release(self) -> None:
        """Remove the file and let others have the lock."""
        if not self._file.closed:
            with suppress(OSError):  # the folder may have become read-only; without its holder, the file locks nothing
                Path(self._path).unlink(missing_ok=True)
            self._file.close()

    def let_go(self) -> None:
        """In a forked process: leave it to the parent."""
        self._file.close()


_held: "WeakSet[Lock]" = WeakSet()


def _let_go_of_all() -> None:
    for lock in _held:
        lock.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)

"""Files that appear under their name only when whole."""

import errno
import fcntl
import logging
import os
import resource
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from weakref import WeakSet

from megagap.errors import DataError, MegagapError, library_errors, system_reason

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
    """Write ``text`` in UTF-8 to ``path``, replacing what was there in one step.

    Bytes of file names that are not valid UTF-8, which Python holds as surrogates, become ``\\udcff`` written out.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


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
        _remove_partial(partial)


@contextmanager
def written_by_library(
    path: str | Path, kind: type[MegagapError] = DataError, shown: str | Path | None = None
) -> Iterator[Path]:
    """For a library that writes a file by name: yields another name, whose file then replaces ``path`` in one step.

    The file gets the mode that the umask gives, whatever the library chose (some write through files that only their
    owner may read). Raises ``kind`` naming ``path``, or ``shown`` where that is what the user knows it by, for all that
    the block raises: the library call only.
    """
    partial = partial_name(path)
    try:
        with library_errors(f"cannot write {shown or path}", kind):
            yield partial
            os.chmod(partial, 0o666 & ~_umask())
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            publish(partial, path)
    finally:
        _remove_partial(partial)


def write_together(contents: dict[Path, bytes]) -> None:
    """Write several files that belong together, and only then give them their names: a full disk replaces none."""
    partials = {path: partial_name(path) for path in contents}
    try:
        for path, content in contents.items():
            with open(partials[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            publish(partial, path)
    finally:
        for partial in partials.values():
            _remove_partial(partial)


def _remove_partial(partial: Path) -> None:
    """Where even that is refused, what was refused before says why."""
    with suppress(OSError):
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
        raise kind(f"cannot read {str(path) or repr('')}: {system_reason(error, path)}") from None
    except UnicodeDecodeError as error:
        raise kind(f"cannot read {path}: it is not valid UTF-8 ({error.reason} at byte {error.start:,})") from None
    except ValueError as error:
        raise kind(f"cannot read {str(path)!r}: {error}") from None


def is_there(path: str | Path, kind: type[MegagapError] = DataError) -> bool:
    """Whether anything bears this name, if only a link that leads nowhere. Raises ``kind`` if the system won't tell."""
    with reading(path, kind):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def read_regular(path: str | Path, kind: type[MegagapError] = DataError) -> bytes:
    """The content of a file that a user named or that stands beside one.

    Raises ``kind`` as :func:`reading` does, and for a named pipe or a device, which may have no end or no writer.
    FileNotFoundError where there is nothing; a link that leads nowhere is refused.
    """
    if not is_there(path, kind):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    require_regular(path, kind)
    with reading(path, kind):
        return Path(path).read_bytes()


def require_regular(path: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Raises ``kind`` unless ``path`` is a file that can be read more than once."""
    with reading(path, kind):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise kind(f"cannot read {path}: it is a named pipe or a device, not a file\n  give a file in its place.")


GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text starts that Git LFS leaves in place of a file that it has not fetched."""
GIT_LFS_FAULT = (
    "is a Git LFS pointer, not the file itself",
    "fetch the file: git lfs pull, in the folder of the clone.",
)
"""What is wrong with such a file, and what to do."""


def require_fetched(path: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Raises ``kind`` if ``path`` is the pointer that Git LFS leaves in place of a file; one that cannot be read
    passes, for its reader to say why."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(GIT_LFS_POINTER))
    except (OSError, ValueError):
        return
    if start == GIT_LFS_POINTER:
        what, advice = GIT_LFS_FAULT
        raise kind(f"{path} {what}\n  {advice}")


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
    with file_errors(f"cannot make the folder {folder}", folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """For a block that writes a file that a user named: its folder is made.

    Raises :class:`DataError` naming the file where the system refuses that, or the block.
    """
    make_folder(Path(path).parent)
    with file_errors(f"cannot write {path}", path):
        yield


@contextmanager
def file_errors(what: str, path: str | Path, kind: type[MegagapError] = DataError) -> Iterator[None]:
    """For a block that opens or writes ``path``: what the system refuses becomes ``kind``, ``what: reason``."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {system_reason(error, path)}") from None
    except ValueError as error:  # no file can have this name
        if "\0" not in str(path):
            raise
        raise kind(f"{what!r}: {error}") from None


def require_writable(path: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Try now what will be written later: to add to the file ``path``, or to make it; it is left as it is.

    Raises ``kind`` naming it if a folder is in its place, it is a link that leads nowhere, or the system refuses.
    """
    path = Path(path)
    with file_errors(f"cannot write {path}", path, kind):
        if os.path.lexists(path):
            # Not O_CREAT: a link that leads nowhere is refused. O_NONBLOCK: a named pipe without a reader is, too.
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    if not os.path.lexists(path):
        require_writable_folder(path.parent, kind)


def require_writable_folder(folder: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Make ``folder`` if need be, and write and remove a file in it. Raises ``kind`` naming the folder."""
    folder = Path(folder)
    with file_errors(f"cannot make the folder {folder}", folder, kind):
        folder.mkdir(parents=True, exist_ok=True)
    probe = partial_name(folder / "probe")
    with file_errors(f"cannot write into the folder {folder}", folder, kind):
        try:
            probe.write_bytes(b"megagap")
        finally:
            probe.unlink(missing_ok=True)


class LineFile:
    """A text file that whole lines are added to, each visible to readers as soon as it is written.

    A line that a former writer left unfinished is ended first, so that it does not swallow the next. Where a line does
    not fit on the disk, what was written of it is taken back. Every method raises :class:`DataError` naming the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with self._errors():
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            size = os.fstat(self._file.fileno()).st_size
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self.append("")

    def append(self, line: str) -> None:
        """Add a line, given without its end."""
        left = memoryview((line + "\n").encode(errors="backslashreplace"))
        with self._errors():
            before = os.fstat(self._file.fileno()).st_size
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with suppress(OSError):
                    os.truncate(self._file.fileno(), before)
                raise

    def sync(self) -> None:
        """Bring every line to the disk."""
        with self._errors():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._errors():
            self._file.close()

    def _errors(self) -> AbstractContextManager[None]:
        return file_errors(f"cannot write {self.path}", self.path)


class LockedError(Exception):
    """Another process, or another part of this one, holds the lock."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Lock:
    """An advisory lock on a file that names its holder, held until :meth:`release` or the end of the process.

    Processes that are forked from it do not hold it: they may outlive it for a while.

    Raises :class:`LockedError` if another holds it for ``wait`` seconds, and OSError if the file cannot be written.
    Where the file system cannot lock, as some on clusters, it warns and goes on.
    """

    def __init__(self, path: str | Path, wait: float = 0.0) -> None:
        self._path = path
        deadline = time.monotonic() + wait
        while not self._acquire():
            if time.monotonic() >= deadline:
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise LockedError(holder)
            self._file.close()
            time.sleep(min(0.2, wait))
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError:  # a full disk
            self.release()
            raise
        _held.add(self)

    def _acquire(self) -> bool:
        """Open the file and try to lock it, whether or not the system can."""
        while True:
            self._file = open(self._path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._file.seek(0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # Which code it is depends on the system: ENOSYS, EOPNOTSUPP and ENOLCK of Lustre and NFS without their lock
            # services, EPERM, EACCES, EINVAL and EIO of FUSE and remote servers. A held lock is none of them.
            except OSError as error:
                log.warning(
                    "%s: its file system cannot lock files (%s); make sure that nobody else writes there",
                    self._path,
                    error.strerror or error,
                )
            # The holder before may have removed the file after we opened it.
            if self._is_in_place():
                return True
            self._file.close()

    def _is_in_place(self) -> bool:
        """Whether the name still leads to the file that was opened."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file, where that is allowed and it is still ours, and let others have the lock."""
        if not self._file.closed:
            with suppress(OSError):
                if self._is_in_place():
                    os.unlink(self._path)
            with suppress(OSError):
                self._file.close()

    def let_go(self) -> None:
        """In a forked process: leave it to the parent."""
        self._file.close()


_held: "WeakSet[Lock]" = WeakSet()


def _let_go_of_all() -> None:
    for lock in _held:
        lock.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)

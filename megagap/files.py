"""Files that appear under their final name only when complete."""

import errno
import fcntl
import hashlib
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

PACKAGE = Path(__file__).parent


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
    """Write ``text`` as UTF-8 to ``path``, replacing the old file atomically.

    Bytes of file names that are not valid UTF-8 (surrogates in Python) are escaped as ``\\udcff``.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, replacing the old file atomically."""
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
    """For a library that writes a file by name: yields a temporary name, whose file then replaces ``path`` atomically.

    The file's mode follows the umask, whatever the library chose (some write files that only their owner may read).
    Raises ``kind`` naming ``path``, or ``shown`` if that is the name the user knows, for anything raised in the block,
    which should be the library call only.
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
    """Write several files that belong together before renaming any: on a full disk none is replaced."""
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
    """A failure here is ignored: the error before it says why."""
    with suppress(OSError):
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def require_name(name: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Raises ``kind`` for an impossible file name, which would otherwise be a ValueError later."""
    if "\0" in str(name):
        raise kind(f"{str(name)!r} is not a valid file name: it contains a NUL character")


@contextmanager
def reading(path: str | Path, kind: type[MegagapError] = DataError) -> Iterator[None]:
    """For a block that opens or reads a file that a user named, as bytes or as UTF-8.

    Raises ``kind`` naming the file if the system refuses, it is not valid UTF-8, or the name is impossible (contains a
    NUL). To handle a missing file, catch FileNotFoundError within the block.
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
    """Whether anything has this name, even a broken link. Raises ``kind`` if the system refuses to say."""
    with reading(path, kind):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def read_regular(path: str | Path, kind: type[MegagapError] = DataError) -> bytes:
    """The content of a file that a user named, or of one beside it.

    Raises ``kind`` as :func:`reading` does, and for a named pipe or a device, which may have no end or no writer.
    FileNotFoundError if there is no such file; a broken link raises ``kind``.
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
        raise kind(f"cannot read {path}: it is a named pipe or a device, not a regular file\n  give a regular file.")


GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Start of the small text file that Git LFS leaves in place of one it has not fetched."""
GIT_LFS_FAULT = (
    "is a Git LFS pointer, not the file itself",
    "fetch the file: run git lfs pull in the clone.",
)
"""What is wrong with such a file, and what to do."""


def require_fetched(path: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Raises ``kind`` if ``path`` is the pointer that Git LFS leaves in place of a file. An unreadable file passes:
    whoever reads it reports why."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(GIT_LFS_POINTER))
    except (OSError, ValueError):
        return
    if start == GIT_LFS_POINTER:
        what, advice = GIT_LFS_FAULT
        raise kind(f"{path} {what}\n  {advice}")


def allow_more_open_files() -> bool:
    """Raise this process's limit of open files as far as the system allows; returns whether it changed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS allows fewer than its limit says
        return False
    return True


def make_folder(folder: str | Path) -> None:
    """Create a folder that a user named, and its parents. Raises :class:`DataError` if that fails."""
    with file_errors(f"cannot create the folder {folder}", folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """For a block that writes a file that a user named: its folder is created.

    Raises :class:`DataError` naming the file if the system refuses that, or what the block does.
    """
    make_folder(Path(path).parent)
    with file_errors(f"cannot write {path}", path):
        yield


@contextmanager
def file_errors(what: str, path: str | Path, kind: type[MegagapError] = DataError) -> Iterator[None]:
    """For a block that opens or writes ``path``: an OSError becomes ``kind``, ``what: reason``."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {system_reason(error, path)}") from None
    except ValueError as error:  # no file can have this name
        if "\0" not in str(path):
            raise
        raise kind(f"{what!r}: {error}") from None


def require_writable(path: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Check early that the file ``path`` can be appended to or created later; it is left unchanged.

    Raises ``kind`` naming it if it is a folder or a broken link, or the system refuses.
    """
    path = Path(path)
    with file_errors(f"cannot write {path}", path, kind):
        if os.path.lexists(path):
            # Not O_CREAT: a broken link is refused. O_NONBLOCK: a named pipe without a reader is, too.
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    if not os.path.lexists(path):
        require_writable_folder(path.parent, kind)


def require_writable_folder(folder: str | Path, kind: type[MegagapError] = DataError) -> None:
    """Create ``folder`` if needed, then write and remove a file in it. Raises ``kind`` naming the folder."""
    folder = Path(folder)
    with file_errors(f"cannot create the folder {folder}", folder, kind):
        folder.mkdir(parents=True, exist_ok=True)
    probe = partial_name(folder / "probe")
    with file_errors(f"cannot write into the folder {folder}", folder, kind):
        try:
            probe.write_bytes(b"megagap")
        finally:
            probe.unlink(missing_ok=True)


class LineFile:
    """A text file that whole lines are added to, each visible to readers as soon as it is written.

    A line left unfinished by an earlier writer is terminated first, so that it does not swallow the next. If a line
    does not fit on the disk, the part written is removed again. Every method raises :class:`DataError` naming the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with self._errors():
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            size = os.fstat(self._file.fileno()).st_size
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self.append("")

    def append(self, line: str) -> None:
        """Add a line, given without its newline."""
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
        """Flush every line to the disk (fsync)."""
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

    Forked child processes do not hold it: they may outlive the parent for a while.

    Raises :class:`LockedError` if another holds it for ``wait`` seconds, and OSError if the file cannot be written.
    If the file system does not support locks, like some on clusters, it logs a warning and continues.
    """

    def __init__(self, path: str | Path, wait: float = 0.0) -> None:
        self._path = path
        self.is_enforced = True
        """Whether the file system can lock files, so that nobody else holds it."""
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
                self.is_enforced = False
                log.warning(
                    "%s: its file system cannot lock files (%s); make sure that no other process writes there",
                    self._path,
                    error.strerror or error,
                )
            # The previous holder may have removed the file after we opened it.
            if self._is_in_place():
                return True
            self._file.close()

    def _is_in_place(self) -> bool:
        """Whether the name still refers to the file that was opened."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file, if that is permitted and it is still ours, and release the lock."""
        if not self._file.closed:
            with suppress(OSError):
                if self._is_in_place():
                    os.unlink(self._path)
            with suppress(OSError):
                self._file.close()

    def abandon(self) -> None:
        """In a forked process: leave the lock to the parent."""
        self._file.close()


_held: "WeakSet[Lock]" = WeakSet()


def _abandon_all() -> None:
    for lock in _held:
        lock.abandon()


os.register_at_fork(after_in_child=_abandon_all)


def sources_digest(package: Path = PACKAGE) -> str:
    """A hash of all Python and TOML files of the package."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for ending in ("*.py", "*.toml") for path in package.rglob(ending)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()

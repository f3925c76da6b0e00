"""A lock on a work folder: two runs in it would overwrite each other's state, and mix their logs."""

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from halfeven.errors import StorageError
from halfeven.files import storing

LOCK_FILE = ".lock"
"""File of the lock. The operating system holds the lock for the process, so that a dead process holds none."""
LOCK_TAKEN_ERRORS = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a work folder within the context.

    Args:
        folder: exists already.
        log: called with a note where the disk has no locks.

    Raises:
        StorageError: another process, on this machine or another that shares the disk, holds the lock.
    """
    path = folder / LOCK_FILE
    with storing(path):
        file = _open_newest(path, log)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock goes: whoever waits for this file sees that it is gone


def _open_newest(path: Path, log: Callable[[str], None]) -> BinaryIO:
    """Open and lock the file that has this name at the moment of the lock."""
    while True:
        # Not emptied by opening, since it says who holds the lock. No link is followed.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+b")
        try:
            _lock_file(file)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                log(f"The disk of {path.parent} has no locks: see to it that no second run uses this folder.")
                return file
            holder = file.read(200).decode(errors="replace") or "another process"
            file.close()
            if error.errno not in LOCK_TAKEN_ERRORS:
                raise
            raise StorageError(
                f"{path.parent} is in use by {holder}: two runs in it would overwrite each other's state. Wait for its "
                "end or stop it, or give another --work-dir."
            ) from error
        if _is_open_file_at(file, path):
            return file
        file.close()


def _is_open_file_at(file: BinaryIO, path: Path) -> bool:
    """Return True where a path names an open file. Opening it a second time would end this process's lock on it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock_file(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock_file(file: BinaryIO) -> None:
        # A lock of the process (POSIX), which the workers that read samples do not inherit: they may outlive it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

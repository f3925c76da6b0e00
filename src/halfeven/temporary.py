"""Temporary folders that do not outlive their process for long: the next process deletes those of a killed one."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "halfeven-"
LOCK = ".lock"
"""File whose lock the operating system holds for the process that made the folder, so that a dead one holds none."""


class TemporaryFolder:
    """A folder for temporary files, which is locked until it is deleted.

    Args:
        parent: where the folder is made; None for the system's folder of temporary files.
    """

    def __init__(self, parent: str | None = None) -> None:
        _delete_abandoned(Path(parent or tempfile.gettempdir()))
        self._lock: int | None = None
        while self._lock is None:  # another process may have taken the new folder for an abandoned one
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = _try_lock(self.path / LOCK, os.O_CREAT)

    def delete(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def temporary_folder(parent: str | None = None) -> Iterator[Path]:
    """Give a folder for temporary files, which is deleted at the end of the context.

    Args:
        parent: where the folder is made; None for the system's folder of temporary files.
    """
    folder = TemporaryFolder(parent)
    try:
        yield folder.path
    finally:
        folder.delete()


def _delete_abandoned(parent: Path) -> None:
    """Delete the folders of killed processes. What cannot be deleted, another user's for example, stays."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            held = _try_lock(lock, 0)
            if held is not None:
                shutil.rmtree(lock.parent, ignore_errors=True)
                os.close(held)


if sys.platform == "win32":

    def _try_lock(path: Path, flags: int) -> int | None:
        # An open file cannot be deleted there, so that a folder holds no lock, and none counts as abandoned.
        return os.open(os.devnull, os.O_RDONLY) if flags else None

else:
    import fcntl

    def _try_lock(path: Path, flags: int) -> int | None:
        """Return a file descriptor that holds the lock; None where another holds it, or the file is gone meanwhile.

        The lock belongs to the descriptor (BSD), not to the process, so that this process sees its own locks too.
        """
        try:
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            if flags:  # a disk without locks: nobody can take the folder for an abandoned one
                return lock
        os.close(lock)
        return None

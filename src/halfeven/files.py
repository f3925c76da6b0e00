"""Write files that are either whole or not there, say what a disk refuses, and make values fit for JSON."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfeven.errors import HalfevenError, StorageError

PARTIAL = ".partial"
"""Ending of the folders in which files are written."""
PROBE_BYTES = 1 << 20
"""Size of the file that is written to learn why a library could not write its own."""

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota of disk space is used up",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.ENOTDIR: "a file stands where a folder belongs",
    errno.EEXIST: "a file stands where a folder belongs",
    errno.EISDIR: "a folder stands where the file belongs",
    errno.ENAMETOOLONG: "the name is too long for this disk",
    errno.EMFILE: "this process has too many open files (ulimit -n)",
    errno.EIO: "the disk reports a fault",
    errno.ESTALE: "the network disk has gone",
}
"""Error number of the operating system -> the reason in plain words."""

WAYS_OUT = {
    errno.ENOSPC: "Make room there, or name a folder on another disk.",
    errno.EDQUOT: "Make room there, or name a folder on another disk.",
    errno.EMFILE: "Raise the limit, or lower data.workers.",
    errno.ENOENT: "Check the path.",
}
"""Error number -> the remedy, where another folder is not the only one."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a path of the same name, and move the file into place once it is whole and on the disk.

    A reader of `path` finds the old content or the new one, at whatever moment the writer is killed.

    Raises:
        StorageError: the disk cannot take the file; `path` is as it was.
    """
    with replacing(path) as folder:
        write(folder / path.name)


@contextmanager
def replacing(*paths: Path) -> Iterator[Path]:
    """Give a folder to write files of these names into, and move them into place when all are whole and on the disk.

    The files are moved in the order given. The folder lies beside them and belongs to this user alone: no link that
    somebody else has put there is followed. What an earlier, killed writer has left of it is deleted.

    Raises:
        StorageError: the disk cannot take the files.
    """
    first = paths[0]
    folder = first.with_name(f".{first.name}{PARTIAL}")
    with storing(first):
        first.parent.mkdir(parents=True, exist_ok=True)
        remove_file(folder)
        folder.mkdir(mode=0o700)
        try:
            with _raising_disk_errors(folder):
                yield folder
            # All are on the disk before the first one is moved: a full disk must show while the old files are still
            # there.
            for path in paths:
                _flush_to_disk(folder / path.name)
            for path in paths:
                os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        # The renaming itself outlives a power cut only once the folder is on the disk.
        _sync_folder(first.parent)


def _flush_to_disk(path: Path) -> None:
    """Bring a file to the disk, readable as the umask says: some writers make files for their owner alone."""
    # The umask can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_file(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn errors of the disk, within the context, into a `StorageError` about `path`."""
    try:
        with _raising_disk_errors(path.parent):
            yield
    except HalfevenError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise storage_error(error, path) from error


@contextmanager
def _raising_disk_errors(folder: Path) -> Iterator[None]:
    """Raise the error of the operating system where, within the context, a library raises its own instead.

    Libraries that write files lose the reason ("unexpected pos 8064 vs 7960"). A file that is written beside theirs,
    before anything is tidied up, meets it again.
    """
    try:
        yield
    except (HalfevenError, OSError):
        raise
    except Exception as error:
        if refusal := _refused_small_file(folder):
            raise refusal from error
        raise


def storage_error(error: OSError, path: Path | None = None) -> StorageError:
    """Return an error of the operating system as a message: what, where, how much is free, what is safe.

    Args:
        error: the error.
        path: the file that was to be written or read; None: the one that the error names, if any.
    """
    named = path or (Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None)
    while named and named.parent.name.endswith(PARTIAL):  # the user knows the file by its place in the end
        named = named.parents[1] / named.name
    where = f"{named}" if named else "A file"
    reason = REASONS.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
    code = "" if error.errno is None else f" (error {error.errno}, {error.strerror})"
    way = WAYS_OUT.get(error.errno or 0, "Name another folder, or mend that.")
    free = _free_space_sentence(named or Path.cwd())
    return StorageError(
        f"{where} cannot be used: {reason}{code}. {free}Files that were whole before "
        f"are whole still, and a run can be resumed from its last saved state. {way}"
    )


def _free_space_sentence(path: Path) -> str:
    """Return a sentence with the free space on the disk of a path; "" where that cannot be told."""
    folder = path.absolute()
    with contextlib.suppress(OSError):
        while not folder.is_dir():
            folder = folder.parent
        usage = shutil.disk_usage(folder)
        return f"{usage.free / 1e6:.1f} of {usage.total / 1e6:.1f} MB are free on the disk of {folder}. "
    return ""


def _refused_small_file(folder: Path) -> OSError | None:
    """Return the error with which the disk of a folder refuses a small file; None where it takes it."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(os.urandom(PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def json_text(values: Any, indent: int | None = None) -> str:
    """Return values as JSON that any language reads: null for NaN and infinities, which JSON does not have."""
    return json.dumps(json_value(values), indent=indent, allow_nan=False)


def json_value(value: Any) -> Any:
    """Return a value as JSON can hold it: None for NaN and infinities, texts as keys, lists for tuples.

    A number of numpy, or a tensor without axes, is a plain number.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

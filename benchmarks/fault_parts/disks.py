"""Full disks: a message, whole old files, and a run that ends with the same bits once there is room.

A disk is "full" in two ways that an ordinary user can bring about: no file of the process may grow beyond a limit
(`ulimit -f`), which every library meets in its own way; and the operating system's error at the n-th operation of the
process that needs room, and at all later ones.
"""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from faults.tiny_run import differences, write_configs

from .kills import SHORT, check
from .runs import WRITING, Ended, command, generator
from .table import Campaign, Row

NEEDS_ROOM = ("open", "os.rename", "os.mkdir")
REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def fill(campaign: Campaign) -> Row:
    """Run commands on full disks."""
    config = write_configs(campaign.folder)
    runs = {
        "train": ["train", config, *SHORT, "--auto-resume"],
        "ptq": ["ptq", config.with_name("everything.py"), *SHORT, "--ptq.equalize", "on", "--auto-resume"],
    }
    whole = {}
    for name, arguments in runs.items():
        whole[name] = campaign.folder / f"whole-{name}" / "work"
        check(command([*arguments, "--work-dir", whole[name]], campaign.folder / f"whole-{name}"))
    row = Row("full disks")
    met = 0
    wanted = campaign.tries_of(24)
    for number in range(3 * wanted):
        if row.tries >= wanted:
            break
        draw = generator(campaign.seed, "disk", number)
        name = draw.choice(list(runs))
        place = campaign.folder / f"try{number}"
        limited = draw.random() < 0.5
        largest = max(path.stat().st_size for path in whole[name].rglob("*") if path.is_file())
        fault = (
            _limit(int(largest ** draw.uniform(0.3, 1.0)))
            if limited
            else _refuse(draw.randint(1, 60), draw.choice(REASONS), place / "work")
        )
        if draw.random() < 0.3:  # the files of an earlier run are there
            shutil.copytree(whole[name], place / "work")
        before = {path: path.read_bytes() for path in (place / "work").rglob("*.xml")}
        arguments = [*runs[name], "--work-dir", place / "work"]
        ended = _with_a_pipe(arguments, place, fault)
        if ended.code == 0:  # it needed less room
            shutil.rmtree(place)
            continue
        met += 1
        problems = (
            [] if ended.code == 2 and "StorageError" in ended.said else [f"exit {ended.code}: {ended.said[-900:]}"]
        )
        problems += ["a traceback"] if "Traceback" in ended.said else []
        problems += [f"{path.name} is no longer whole" for path, old in before.items() if path.read_bytes() != old]
        again = command(arguments, place)
        problems += [f"with room: exit {again.code}: {again.said[-900:]}"] if again.code else []
        problems += [] if again.code else differences(whole[name], place / "work")
        row.count(f"{number} {name} {'limit' if limited else 'refusal'}", problems)
    return row


def _with_a_pipe(arguments: list[object], place: Path, fault: Callable[[], None]) -> Ended:
    """Run a command on a full disk; what it prints goes to a pipe, which needs no disk."""
    reading, writing = os.pipe()

    def settle() -> None:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        fault()

    ended = command(arguments, place, settle)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as said:
        return Ended(ended.code, said.read())


def _limit(size: int) -> Callable[[], None]:
    def apply() -> None:
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return apply


def _refuse(number: int, reason: int, folder: Path) -> Callable[[], None]:
    """Return what makes the operating system refuse, in a folder, the n-th operation that needs room, and the later."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in NEEDS_ROOM or (event == "open" and not int(arguments[2] or 0) & WRITING):  # type: ignore[call-overload]
            return
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(str(folder)):
            count += 1
            if count >= number:
                raise OSError(reason, os.strerror(reason), os.fsdecode(path))

    return lambda: sys.addaudithook(hook)

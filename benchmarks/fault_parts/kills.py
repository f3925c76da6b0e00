"""SIGKILL in training, post-training quantization and export: every run must end with the bits of a whole one."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.tiny_run import differences, lost_lines, write_configs

from .runs import Ended, command, counting, generator, killed_after, killing_at, start
from .table import Campaign, Row

SHORT = ("--export.verify-samples", "4")
AT_OPERATIONS = 0.6
"""Share of the kills at a chosen operation on a file; the others come at a random time."""
TWICE = 0.25
"""Share of the runs that are killed a second time, while they go on."""
KILLED = -9
MOST_RUNS = 3
"""Largest number of runs for a wanted kill: some end before they are killed."""


@dataclass(frozen=True)
class Victim:
    """A command whose runs are killed."""

    part: str
    tries: int
    config: str
    arguments: tuple[str, ...] = ()
    command: str = "train"


VICTIMS = (
    Victim("kill train w8a8", 80, "tiny.py", ("--quantization.scheme", "w8a8")),
    Victim("kill train w4a4", 70, "everything.py"),
    Victim("kill ptq", 40, "everything.py", ("--ptq.reconstruct", "blocks", "--ptq.equalize", "on"), "ptq"),
    Victim("kill export", 30, "tiny.py", ("--export.formats", "xml"), "export"),
)


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    folder: Path
    operations: int
    seconds: float


def kill(victim: Victim, campaign: Campaign) -> Row:
    """Kill runs of a command, let each go on, and compare its end with that of a whole run."""
    place = campaign.folder / victim.part.replace(" ", "-")
    place.mkdir(parents=True)
    config = write_configs(place).with_name(victim.config)
    given = _arguments(victim, config, place)
    whole = _whole(given, place)
    row = Row(victim.part)
    lost = 0
    wanted = campaign.tries_of(victim.tries)
    for number in range(MOST_RUNS * wanted):
        if row.tries >= wanted:
            break
        folder = place / f"run{number}"
        kills, problems = _survive(victim, given, folder, whole, campaign.seed, number)
        lost += lost_lines(whole.folder, folder / "work")
        row.count(f"run {number}", problems, kills)
        if problems:
            campaign.log(f"{victim.part}, run {number}: {problems}")
        else:
            shutil.rmtree(folder)
    row.notes += [f"{lost} log lines lost", f"{whole.operations} operations on files in a run"]
    return row


def _arguments(victim: Victim, config: Path, place: Path) -> list[object]:
    if victim.command != "export":
        return [victim.command, config, *SHORT, *victim.arguments, "--auto-resume"]
    ended = command(["train", config, *SHORT, "--work-dir", place / "trained"], place / "training")
    check(ended)
    return ["export", config, place / "trained" / "best.safetensors", *SHORT, *victim.arguments]


def _whole(given: Sequence[object], place: Path) -> Whole:
    start_of_run = time.monotonic()
    operations = place / "operations"
    folder = place / "whole" / "work"
    ended = command([*given, "--work-dir", folder], place / "whole", counting(folder, operations))
    check(ended)
    return Whole(folder, int(operations.read_text()), time.monotonic() - start_of_run)


def check(ended: Ended) -> None:
    """End the part where a run that nobody disturbed has failed."""
    if ended.code:
        raise SystemExit(f"A run that nobody killed ended with {ended.code}:\n{ended.said[-3000:]}")


def _survive(
    victim: Victim, given: Sequence[object], folder: Path, whole: Whole, seed: int, number: int
) -> tuple[int, list[str]]:
    """Kill a run once or twice, and let it end. Returns the number of kills, and what is wrong afterwards."""
    draw = generator(seed, victim.part, number)
    arguments = [*given, "--work-dir", folder / "work"]
    wanted = 2 if draw.random() < TWICE else 1
    kills = 0
    for _ in range(wanted):
        if draw.random() < AT_OPERATIONS:
            # A run that goes on has fewer operations before its end, and may end before the one that was drawn.
            at = draw.randint(1, whole.operations)
            kills += command(arguments, folder, killing_at(at, folder / "work")).code == KILLED
        else:
            kills += killed_after(start(arguments, folder), draw.uniform(0, whole.seconds))
    ended = command(arguments, folder)
    if ended.code:
        return kills, [f"ended with {ended.code}: {ended.said[-1500:]}"]
    left = [f"{path.name} is left among the temporary files" for path in (folder / "tmp").iterdir()]
    return kills, [*differences(whole.folder, folder / "work"), *left]

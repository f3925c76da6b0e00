"""Two processes that train together, one of them killed: restarted by `--auto-resume`, they end with the same bits."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from faults.tiny_run import differences, lost_lines, write_configs

from .kills import SHORT
from .runs import Ended, killing_at, nothing, start, waited
from .table import Campaign, Row

SHORTER = ("--training.batch-size", "2", "--pretraining.batch-size", "4")
GRACE = 20.0
"""Seconds that a process has, as torchrun's, to end when the other has died; then it is killed."""


def kill_one(campaign: Campaign) -> Row:
    """Kill one process of two, restart both, and compare with two that nobody killed."""
    config = write_configs(campaign.folder)
    arguments = ["train", config, *SHORT, *SHORTER, "--auto-resume"]
    whole = campaign.folder / "whole" / "work"
    _check(_pair([*arguments, "--work-dir", whole], campaign.folder / "whole", [nothing, nothing]))
    row = Row("two ranks, one killed")
    lost = 0
    for number in range(3 * campaign.tries_of(6)):
        if row.tries >= campaign.tries_of(6):
            break
        place = campaign.folder / f"try{number}"
        work = place / "work"
        given = [*arguments, "--work-dir", work]
        killed = _killed(campaign.seed, number, given, place, work)
        if not killed:
            shutil.rmtree(place)
            continue
        again = _pair(given, place, [nothing, nothing])
        codes = [ended.code for ended in again]
        problems = differences(whole, work) if codes == [0, 0] else [f"then {codes}: {again[0].said[-800:]}"]
        lost += lost_lines(whole, work)
        row.count(str(number), problems)
    row.notes.append(f"{lost} log lines lost")
    return row


def _killed(seed: int, number: int, given: list[object], place: Path, work: Path) -> bool:
    """Start two processes, and kill one of them: the first at an operation on a file, the second at a random time."""
    from .runs import generator

    draw = generator(seed, "ranks", number)
    if draw.random() < 0.5:
        ended = _pair(given, place, [killing_at(draw.randint(20, 200), work), nothing])
    else:
        ended = _pair(given, place, [nothing, nothing], killed=1, after=draw.uniform(2, 12))
    return any(one.code == -signal.SIGKILL for one in ended)


def _pair(
    given: list[object],
    place: Path,
    prepare: list[Callable[[], None]],
    *,
    killed: int | None = None,
    after: float = 0.0,
) -> list[Ended]:
    """Run a command in two processes as torchrun starts them, and end both when one has died. Returns their ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [place / f"rank{number}" for number in range(2)]

    def as_rank(number: int) -> Callable[[], None]:
        def settle() -> None:
            values = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ.update({name: str(value) for name, value in values.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            prepare[number]()

        return settle

    pids = [start(given, places[number], as_rank(number)) for number in range(2)]
    if killed is not None:
        time.sleep(after)
        os.kill(pids[killed], signal.SIGKILL)  # not waited for yet: the number is still its own
    ends: dict[int, Ended] = {}
    deadline = None
    while len(ends) < 2:
        for number in {0, 1} - ends.keys():
            done = os.waitid(os.P_PID, pids[number], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if done:
                ends[number] = waited(pids[number], places[number] / "said.txt")
                if ends[number].code and deadline is None:
                    deadline = time.monotonic() + GRACE
        if deadline and time.monotonic() > deadline:
            for number in {0, 1} - ends.keys():
                os.kill(pids[number], signal.SIGTERM)
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)
    return [ends[0], ends[1]]


def _check(ends: list[Ended]) -> None:
    if any(ended.code for ended in ends):
        raise SystemExit(
            f"Two processes that nobody killed ended with {[e.code for e in ends]}:\n{ends[0].said[-3000:]}"
        )

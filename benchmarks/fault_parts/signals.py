"""SIGTERM and SIGUSR1 at any moment: the run stops with its own exit code, and the same command ends it."""

import os
import shutil
import signal

from faults.tiny_run import differences, lost_lines, write_configs

from .kills import SHORT, check
from .runs import command, counting, generator, on_each_operation
from .table import Campaign, Row

STOPPED = 75


def stop(campaign: Campaign) -> Row:
    """Signal runs at operations on files, let each go on, and compare its end with that of a whole run."""
    config = write_configs(campaign.folder)
    arguments = ["train", config, *SHORT, "--auto-resume"]
    whole = campaign.folder / "whole" / "work"
    operations = campaign.folder / "operations"
    check(command([*arguments, "--work-dir", whole], campaign.folder / "whole", counting(whole, operations)))
    row = Row("signals")
    lost = 0
    for number in range(campaign.tries_of(20)):
        draw = generator(campaign.seed, "signal", number)
        place = campaign.folder / f"try{number}"
        work = place / "work"
        sent = draw.choice((signal.SIGTERM, signal.SIGUSR1))
        at = draw.randint(1, int(operations.read_text()) - 1)

        def send(count: int, at: int = at, sent: signal.Signals = sent) -> None:
            if count == at:
                os.kill(os.getpid(), sent)

        ended = command(
            [*arguments, "--work-dir", work], place, lambda work=work, send=send: on_each_operation(work, send)
        )
        problems = [] if ended.code == STOPPED else [f"{sent.name} at {at}: exit {ended.code}: {ended.said[-600:]}"]
        again = command([*arguments, "--work-dir", work], place)
        problems += [f"then exit {again.code}: {again.said[-600:]}"] if again.code else differences(whole, work)
        lost += lost_lines(whole, work)
        row.count(str(number), problems)
        shutil.rmtree(place)
    row.notes.append(f"{lost} log lines lost")
    return row

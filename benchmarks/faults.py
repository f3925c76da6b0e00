"""Faults of all kinds, on purpose: what halfeven survives, and what is lost.

    python benchmarks/faults.py [--part NAME ...] [--tries N] [--seed S] [--json FILE] [--list]

Runs of a tiny network are killed, signalled and given full disks; checkpoints, states, deployed files and records are
damaged; options, configs, samples and arguments are wrong; and a process works for a long time beside a control. Each
part is a row of the table: tries, survived, lost. The same seed draws the same faults. `tests/faults` holds a small
part of it. It needs an operating system with fork.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HALFEVEN_COMPILE": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "160", "TOKENIZERS_PARALLELISM": "false"}

from fault_parts import disks, kills, mutated, ranks, refused, signals, soak
from fault_parts.runs import forked, waited
from fault_parts.table import Campaign, Row, show
from rich.console import Console

from faults.tiny_run import write_configs

SECONDS_OF_A_PART = 6 * 3600

PARTS: dict[str, Callable[[Campaign], Row]] = {
    **{victim.part: functools.partial(kills.kill, victim) for victim in kills.VICTIMS},
    "signals": signals.stop,
    "two ranks": ranks.kill_one,
    "mutated checkpoints": mutated.checkpoints,
    "mutated states": mutated.states,
    "mutated deployed files": mutated.deployed,
    "mutated records": mutated.records,
    "refused": refused.refuse,
    "full disks": disks.fill,
    "soak": soak.soak,
}
"""The parts by name."""


def main() -> None:
    """Run the parts that were named, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", default=list(PARTS), metavar="NAME", help="parts to run, or parts of names"
    )
    parser.add_argument("--tries", type=int, help="tries of each part, in the place of its usual number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all rows, with everything that was lost")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    arguments = parser.parse_args()
    console = Console(markup=False)
    chosen = [part for part in PARTS if any(name in part for name in arguments.part)]
    if arguments.list or not chosen:
        console.print("\n".join(PARTS))
        sys.exit(0 if arguments.list else 2)
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        import_everything(Path(folder))
        for part in chosen:
            campaign = Campaign(Path(folder) / part.replace(" ", "-"), arguments.seed, arguments.tries, console.print)
            start = time.monotonic()
            rows.append(in_a_process(part, campaign))
            rows[-1].notes.append(f"{time.monotonic() - start:.0f} s")
            show(rows[-1:], console)
            if arguments.json:
                arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    console.print(f"Seed {arguments.seed}")
    show(rows, console)
    sys.exit(any(row.tries > row.survived for row in rows))


def in_a_process(part: str, campaign: Campaign) -> Row:
    """Return the row of a part that runs in a process forked from this one, which has done nothing yet but import."""
    campaign.folder.mkdir()
    result = campaign.folder / "row.json"
    said = campaign.folder / "said.txt"

    def run() -> None:
        row = PARTS[part](campaign)
        result.write_text(json.dumps(dataclasses.asdict(row)))

    ended = waited(forked(run, said, campaign.folder / "tmp"), said, SECONDS_OF_A_PART)
    if ended.code:
        return Row(part, tries=1, lost=[f"the part itself failed: {ended.said[-3000:]}"])
    return Row(**json.loads(result.read_text()))


def import_everything(folder: Path) -> None:
    """Import what commands import on their way, so that a process forked from this one has it."""
    config = write_configs(folder)
    names = folder / "modules.json"

    def run() -> None:
        from halfeven.cli.main import COMMANDS, imported
        from halfeven.cli.main import main as command

        for one in COMMANDS:
            imported(one.run)
        command(["train", str(config), "--work-dir", str(folder / "warm"), "--export.formats", "xml", "onnx"])
        names.write_text(json.dumps(sorted(sys.modules)))

    ended = waited(forked(run, folder / "said.txt", folder / "tmp"), folder / "said.txt")
    if ended.code:
        raise SystemExit(f"The run without any fault ended with {ended.code}:\n{ended.said[-3000:]}")
    for name in json.loads(names.read_text()):
        if not name.startswith("faulty_net"):
            with contextlib.suppress(Exception):  # some modules are parts of one that was imported
                importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()

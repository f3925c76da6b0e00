"""Damaged files: each is refused by an error of halfeven, noticed by verification, or gives the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import halfeven as he
from faults.mutations import IMAGES, PLANS, VALUES, Saved, a_state, damaged, same_state
from faults.tiny_run import write_configs
from halfeven.errors import HalfevenError
from halfeven.training.state import load_state, save_state
from halfeven.verification.report import Report

from .kills import SHORT, check
from .runs import command, forked, generator, waited
from .table import Campaign, Row

BATCH = 20
"""Damaged deployed files that one process opens: a crash of the runtime ends a batch, and names its file."""


def checkpoints(campaign: Campaign) -> Row:
    """Damage checkpoints: bytes, tensors and plans, with the digest and without it."""
    kinds = {
        "observed": Saved(campaign.folder / "observed.safetensors"),
        "learned": Saved(
            campaign.folder / "learned.safetensors", ranges="learned", learn_zero_points=True, quantize_outputs=True
        ),
    }
    for name, saved in kinds.items():
        if not torch.equal(saved.load()(IMAGES), saved.expected):
            raise SystemExit(f"The {name} checkpoint that nobody damaged gives other numbers.")
    row = Row("mutated checkpoints")
    refused = 0
    for number in range(campaign.tries_of(1000)):
        draw = generator(campaign.seed, "checkpoint", number)
        saved = kinds[draw.choice(list(kinds))]
        kind = draw.choice(("bytes", "bytes", "value", "plan"))
        digest = draw.random() < 0.5
        name = kind
        if kind == "bytes":
            saved.path.write_bytes(damaged(saved.whole, draw))
        elif kind == "value":
            name, (ending, value) = draw.choice([*VALUES.items()])
            saved = kinds["observed"]  # a learned scale below zero is one of training's
            saved.write(saved.with_value(ending, value), digest=digest)
        else:
            name = draw.choice([*PLANS])
            saved = kinds["observed"]
            facts = saved.planned(PLANS[name])
            if digest:  # that of the plan before
                facts = {**saved.facts, **facts}
            saved.write(facts=facts, digest=digest)
        problems, was_refused = _outcome(lambda saved=saved: torch.equal(saved.load()(IMAGES), saved.expected))
        refused += was_refused
        row.count(f"{number}: {name}, {'with' if digest else 'without'} digest", problems)
    row.notes.append(f"{refused} refused, {row.survived - refused} harmless")
    return row


def states(campaign: Campaign) -> Row:
    """Damage training states."""
    path = campaign.folder / "state.pt"
    save_state(a_state(), path)
    whole = path.read_bytes()
    row = Row("mutated states")
    refused = 0
    for number in range(campaign.tries_of(300)):
        path.write_bytes(damaged(whole, generator(campaign.seed, "state", number)))
        problems, was_refused = _outcome(lambda: same_state(load_state(path)))
        refused += was_refused
        row.count(str(number), problems)
    row.notes.append(f"{refused} refused, {row.survived - refused} harmless")
    return row


def _outcome(same: Callable[[], bool]) -> tuple[list[str], bool]:
    """Return what is wrong with how a damaged file was met, and True where it was refused."""
    try:
        return ([] if same() else ["loaded in silence, and computes something else"]), False
    except HalfevenError:
        return [], True
    except Exception as error:
        return [f"raw {type(error).__name__}: {error}"], False


def deployed(campaign: Campaign) -> Row:
    """Damage deployed files, and verify them."""
    row = Row("mutated deployed files")
    wanted = campaign.tries_of(200)
    counts = dict.fromkeys(("refused", "reported", "harmless"), 0)
    for first in range(0, wanted, BATCH):
        numbers = range(first, min(first + BATCH, wanted))
        place = campaign.folder / str(first)
        place.mkdir()
        said = place / "said.txt"
        ended = waited(forked(lambda: _verify_batch(place, campaign.seed, numbers), said, place / "tmp"), said)  # noqa: B023
        written = place / "outcomes.txt"
        outcomes = written.read_text().splitlines() if written.is_file() else []
        for number, outcome in zip(numbers, outcomes, strict=False):
            counts.update({outcome: counts.get(outcome, 0) + 1} if outcome in counts else {})
            row.count(str(number), [] if outcome in counts else [outcome])
        for number in numbers[len(outcomes) :][:1]:
            row.count(str(number), [f"the process ended with {ended.code}: {ended.said[:2000]}"])
    row.notes.append(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return row


def _verify_batch(place: Path, seed: int, numbers: range) -> None:
    saved = Saved(place / "q.safetensors")
    qmodel = saved.load()
    whole: dict[str, Any] = {}
    for ending, target in ((".xml", "openvino"), (".onnx", "onnxruntime")):
        path = place / f"model{ending}"
        he.export(qmodel, path, target)
        report = _facts(he.verify(qmodel, path, [IMAGES], target=target, timed=False))
        whole[target] = (path, report, he.load_deployed(path, target)(IMAGES))
    files = {"openvino": (".xml", ".bin"), "onnxruntime": (".onnx",)}
    with (place / "outcomes.txt").open("w", buffering=1) as outcomes:
        for number in numbers:
            draw = generator(seed, "deployed", number)
            target = draw.choice(list(files))
            path, report, outputs = whole[target]
            changed = path.with_suffix(draw.choice(files[target]))
            content = changed.read_bytes()
            changed.write_bytes(damaged(content, draw))
            try:
                outcomes.write(_verified(qmodel, path, target, report, outputs) + "\n")
            finally:
                changed.write_bytes(content)


def _verified(qmodel: Any, path: Path, target: str, whole: dict[str, Any], outputs: torch.Tensor) -> str:
    try:
        report = _facts(he.verify(qmodel, path, [IMAGES], target=target, timed=False))
        if report != whole:
            return "reported"
        return "harmless" if torch.equal(he.load_deployed(path, target)(IMAGES), outputs) else "passed as equal"
    except HalfevenError:
        return "refused"
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error).splitlines()[:1]}"


def _facts(report: Report) -> dict[str, Any]:
    return json.loads(json.dumps(report.to_dict(), default=str))


def records(campaign: Campaign) -> Row:
    """Damage experiment.json, and resume: the run ends as before, or is refused with a message."""
    config = write_configs(campaign.folder)
    work = campaign.folder / "work"
    arguments = ["train", config, "--work-dir", work, *SHORT]
    for more in ([], ["--resume"]):
        check(command([*arguments, *more], campaign.folder / "first"))
    record = work / "experiment.json"
    whole = record.read_bytes()
    row = Row("mutated experiment.json")
    refused = 0
    for number in range(campaign.tries_of(30)):
        record.write_bytes(damaged(whole, generator(campaign.seed, "record", number)))
        ended = command([*arguments, "--resume"], campaign.folder / "resumed")
        refused += ended.code == 2
        wrong = ended.code not in (0, 2) or "Traceback" in ended.said
        row.count(str(number), [f"exit {ended.code}: {ended.said[-800:]}"] if wrong else [])
    row.notes.append(f"{refused} refused")
    return row

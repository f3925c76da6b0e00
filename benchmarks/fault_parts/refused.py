"""Wrong options, configs and images: each ends with exit code 2 and a message, and blocks no folder."""

import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from PIL import Image

from faults.bad_images import DAMAGES
from faults.tiny_run import CONFIG, write_configs
from faults.wrong_runs import OF_TRAINING, WRONG
from halfeven.config import Experiment
from halfeven.options import Options, fits, up_to_date

from .runs import command, generator
from .table import Campaign, Row

VALUES = ("garbage", -1, 0, 10**9, 1e30, math.nan, math.inf, True, None, b"x", (), ("a", 1), {"a": 1}, 2.5, "auto ")
"""Values that most options cannot have."""
ENDINGS = {
    "no experiment": "del experiment",
    "an experiment that is none": "experiment = {}",
    "a syntax error": "experiment = (",
    "an error": "1 / 0",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "sys.exit": "import sys; sys.exit('no')",
    "os.abort's Python form": "raise SystemExit",
    "an end of a generator": "raise GeneratorExit",
    "a missing import": "import no_such_module",
    "a file that is missing": "open('no/such/file')",
    "recursion": "f = lambda: f(); f()",
    "no memory": "raise MemoryError",
    "a null byte": "x = '\0'",
    "an assertion": "assert experiment.seed == 7, 'another seed'",
    "another class": "experiment = type(experiment)",
    "an options class": "experiment = experiment.training",
    "a stop": "raise StopIteration",
    "a text that is no UTF-8": "\udcff",
}
"""What a config ends with."""
RGB = """
from halfeven.config import *
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


experiment = Experiment(
    model=ModelOptions(source="callable", name="rgb:Net"),
    data=DataOptions(root="{root}", image_size=16, resize=18, calibration_samples=3, workers=0),
    pretraining=TrainingOptions(epochs=1, batch_size=2),
    training=TrainingOptions(epochs=1, batch_size=2),
    device=DeviceOptions(kind="cpu", threads=1),
)
"""


def refuse(campaign: Campaign) -> Row:
    """Run commands that cannot be run."""
    config = write_configs(campaign.folder)
    row = Row("wrong options, configs, images")
    faults = [*_arguments(config), *_configs(campaign.folder), *_images(campaign.folder)]
    wanted = campaign.tries_of(160)
    draw = generator(campaign.seed, "refused")
    options = _wrong_fields(config, campaign.folder, draw, max(wanted - len(faults), wanted // 2))
    chosen = draw.sample([*faults, *options], min(wanted, len(faults) + len(options)))
    for number, (name, arguments) in enumerate(chosen):
        work = campaign.folder / f"work{number}"
        ended = command([*arguments, "--work-dir", work], campaign.folder / f"try{number}")
        problems = [] if ended.code == 2 and len(ended.said.strip()) > 20 else [f"exit {ended.code}"]
        problems += ["a traceback"] if "Traceback" in ended.said else []
        problems += ["the folder is there"] if work.exists() else []
        row.count(name, [f"{', '.join(problems)}: {ended.said[-600:]}"] if problems else [])
    row.notes.append(f"{len(faults)} of config, data and images, the others of option fields")
    return row


def _arguments(config: Path) -> Iterator[tuple[str, list[Any]]]:
    for name, arguments in {**WRONG, **OF_TRAINING}.items():
        yield f"train: {name}", ["train", config, *arguments]
    for name, arguments in WRONG.items():
        yield f"ptq: {name}", ["ptq", config, *arguments]


def _configs(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    for number, (name, ending) in enumerate(ENDINGS.items()):
        path = folder / f"wrong{number}.py"
        path.write_bytes(f"{CONFIG}\n{ending}\n".encode(errors="surrogateescape"))
        yield f"config: {name}", ["train", path]
    yield "config: a folder", ["train", folder]
    yield "config: missing", ["train", folder / "missing.py"]
    yield "config: no Python", ["train", folder / "faulty_net"]


def _images(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield runs on a folder of images of which the first is damaged."""
    for number, (name, damage) in enumerate(DAMAGES.items()):
        if name == "a folder":  # no image then, for torchvision
            continue
        root = folder / f"images{number}"
        for part in ("train", "val"):
            for label in ("cat", "dog"):
                place = root / part / label
                place.mkdir(parents=True)
                for image in range(3):
                    pixels = np.random.default_rng(image).integers(0, 255, (20, 20, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{image}.png")
        for part in ("train", "val"):
            damage(root / part / "cat" / "0.png")
        (folder / f"rgb{number}").mkdir()
        path = folder / f"rgb{number}" / "rgb.py"
        path.write_text(RGB.replace("{root}", str(root)))
        yield f"image: {name}", ["train", path]


def _wrong_fields(config: Path, folder: Path, draw: random.Random, count: int) -> list[tuple[str, list[Any]]]:
    """Return runs of configs in which one field of the experiment has a value that its type refuses."""
    wrong = [
        (part, name, value)
        for part, kind in _parts()
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for value in VALUES
        if name in {field.name for field in dataclasses.fields(kind)}
        and not any(fits(hint, now) for now in up_to_date(kind, {name: value}, warn=False).values())
    ]
    found: list[tuple[str, list[Any]]] = []
    for number, (part, name, value) in enumerate(draw.sample(wrong, min(count, len(wrong)))):
        path = folder / f"field{number}.py"
        inner = f"dataclasses.replace(experiment.{part}, {name}={_written(value)})"
        outer = f"dataclasses.replace(experiment, {part}={inner})" if "." not in part else inner
        whole = outer if part else f"dataclasses.replace(experiment, {name}={_written(value)})"
        path.write_text(f"import dataclasses\nimport math\nfrom tiny import experiment\n\nexperiment = {whole}\n")
        found.append((f"{part}.{name}={value!r}", ["train", path]))
    return found


def _written(value: Any) -> str:
    return f"math.{value}" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _parts() -> Iterator[tuple[str, Any]]:
    yield "", Experiment
    for name, kind in get_type_hints(Experiment).items():
        if isinstance(kind, type) and issubclass(kind, Options):
            yield name, kind
            for inner, part in get_type_hints(kind).items():
                if isinstance(part, type) and issubclass(part, Options):
                    yield f"{name}.{inner}", part

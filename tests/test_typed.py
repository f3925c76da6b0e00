"""Type checkers see through the door: keywords, their types, and every line of Python in README and docs."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import halfeven
from halfeven.pipelines import QuantizeFields
from halfeven.placement.options import QuantizationFields, QuantizationOptions
from halfeven.ptq.options import PTQFields, PTQOptions
from halfeven.quantization.observers import LOGITS, OBSERVERS, ObserverName
from processes import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

GIVEN = """# mypy: allow-untyped-defs, allow-untyped-calls, allow-subclassing-any, disable-error-code=no-redef
# The reader's own functions may be without types, and these names are the reader's.
from typing import Any

import halfeven as he

model: Any
qmodel: Any
loader: Any
example: Any
images: Any
labels: Any
optimizer: Any
train: Any
accuracy: Any
batches: Any
steps: Any
session: Any
my_images: Any
my_validation_images: Any

"""

DOOR = """
import torch
from torch import nn

import halfeven as he
from halfeven.config import PTQOptions, TrainingOptions

model = nn.ReLU()
images = torch.ones(1)

he.prepare(model, images, scheme="w4a4", per_channel=False, first_and_last_bits="auto", batchnorm="fold live")
he.prepare(model, images, schem="w4a4")  # type: ignore[call-arg]
he.prepare(model, images, scheme=8)  # type: ignore[arg-type]
he.prepare(model, images, batchnorm="fused")  # type: ignore[arg-type]
he.quantize(model, [images], scheme="w4a4", reconstruct="layers", iterations=100, log=print)
he.quantize(model, [images], reconstruct="layer")  # type: ignore[arg-type]
he.quantize(model, [images], iteration=100)  # type: ignore[call-arg]
he.export(model, "model.xml", target=3)  # type: ignore[arg-type]
he.calibrate(model, [images], batch=3)  # type: ignore[call-arg]
he.Rule(patern="fc")  # type: ignore[call-arg]
TrainingOptions(optimizer="SGD")  # type: ignore[arg-type]
TrainingOptions(epohcs=3)  # type: ignore[call-arg]
PTQOptions(equalize=False)  # type: ignore[arg-type]
"""


def snippets(page):
    """The Python of a page, one block after the other."""
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(text for _, text in blocks)


def test_python_in_the_pages_and_the_doors_keywords_pass_mypy_strict(tmp_path):
    """All in one run, with the cache that checking the sources has filled."""
    for page in PAGES:
        if text := snippets(page):
            name = page.relative_to(ROOT).with_suffix("").as_posix().replace("/", "_")
            (tmp_path / f"page_{name}.py").write_text(GIVEN + text)
    (tmp_path / "door.py").write_text(DOOR)
    done = run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *sorted(map(str, tmp_path.glob("*.py")))],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": f"{ROOT}/src:{ROOT}/configs/qat"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (QuantizationFields, (QuantizationOptions,)),
        (PTQFields, (PTQOptions,)),
        (QuantizeFields, (QuantizationOptions, PTQOptions)),
    ],
)
def test_keywords_are_those_of_the_option_classes(fields, options):
    expected = {name: kind for one in options for name, kind in get_type_hints(one).items()}
    assert get_type_hints(fields) == expected
    assert sum(len(dataclasses.fields(one)) for one in options) == len(expected), "no name has two meanings"


def test_observers_that_options_may_name_are_those_that_exist():
    assert set(get_args(ObserverName)) == set(OBSERVERS) - {LOGITS}


def test_marked_as_typed():
    assert (Path(halfeven.__file__).parent / "py.typed").exists()

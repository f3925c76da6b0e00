"""The core does its main job without the packages of the extras, and names the extra where something needs one."""

import os
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from processes import run

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

WITHOUT_EXTRAS = '''
import sys

class Without:
    """A finder of modules that does not find the missing ones."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

MISSING = set(sys.argv[1].split(","))
sys.meta_path[:] = map(Without, sys.meta_path)

def refused(act, *words):
    try:
        act()
    except HalfevenError as error:
        assert all(word in str(error) for word in words), error
        return
    raise SystemExit(f"nothing said that {words} is missing")

import torch
from torch import nn

import halfeven as he
from halfeven.config import DataOptions, ModelOptions, TrainingOptions
from halfeven.errors import HalfevenError
from halfeven.evaluation import evaluate
from halfeven.tasks import Classification
from halfeven.training.accelerator import DeviceOptions, make_accelerator
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.models import create_model

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
loader = [torch.randn(4, 3, 8, 8) for _ in range(3)]
qmodel = he.quantize(model, loader)
he.export(qmodel, "model.xml")
assert he.verify(qmodel, "model.xml", loader, timed=False).integer_layers == 2
assert not MISSING & {name.partition(".")[0] for name in sys.modules}

install = "pip install 'halfeven[train]'"
for source in ("timm", "torchvision"):
    refused(lambda: create_model(ModelOptions(source=source)), f'model.source="{source}"', source, install)
refused(lambda: create_model(ModelOptions(source="transformers")), "pip install 'halfeven[text]'")
refused(lambda: create_model(ModelOptions(source="effdet")), "pip install 'halfeven[detection]'")
refused(lambda: load_datasets(DataOptions(source="digits")), "sklearn", install)
refused(lambda: Classification(3).metrics(), "torchmetrics", install)
refused(lambda: evaluate(model, [], Classification(3)), "accelerate", install)
refused(lambda: make_accelerator(DeviceOptions(kind="cpu")), "accelerate", install)

from halfeven.cli.main import main
main(["--version"])
try:
    main(["ptq", "config.py"])
except SystemExit as end:
    assert end.code == 2
else:
    raise SystemExit("the command line ran without its packages")
'''


def of_extras():
    """Modules that only extras bring: the packages of [train], [text] and [detection] that the core does not name."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = [name for extra in ("train", "text", "detection") for name in project["optional-dependencies"][extra]]
    wanted = {name.split(">")[0].lower() for name in extras}
    modules = packages_distributions().items()
    return {module for module, owners in modules if {owner.lower() for owner in owners} & wanted}


def test_the_core_quantizes_exports_and_verifies_alone(tmp_path):
    """In one process without the extras' packages: the whole way, then the messages that name the extra."""
    missing = of_extras()
    assert {"timm", "torchvision", "torchmetrics", "tensorboard", "sklearn", "tyro", "accelerate"} <= missing
    done = run(
        [sys.executable, "-c", WITHOUT_EXTRAS, ",".join(sorted(missing))],
        cwd=tmp_path,
        env={**os.environ, "HALFEVEN_COMPILE": "0"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The command line cannot be used: No module named 'tyro'" in done.stderr
    assert "pip install 'halfeven[train]'" in done.stderr

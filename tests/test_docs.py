"""What README and documentation say is so: commands, options, fields, files, links and Python."""

import dataclasses
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest
import timm
import torch
from torch import nn

import halfeven
from halfeven.cli import main as cli
from halfeven.config import Experiment
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.recipe import decide
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.options import QATOptions
from halfeven.qat.recipe import decide as decide_training
from runtimes.parity import SCHEME

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
QUICKSTART = "configs/quickstart/digits.py"
PARTS = {field.name: get_type_hints(Experiment)[field.name] for field in dataclasses.fields(Experiment)}


def ids(values):
    return [value.relative_to(ROOT).as_posix() for value in values]


def blocks(page, language):
    """The code blocks of a page in a language, those inside other blocks included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [text for _, text in found]


NAMES = "|".join(command.name for command in cli.COMMANDS)
STANDING_FOR = {"CONFIG": QUICKSTART, "CKPT": "best.safetensors", "FILE": "model.xml"}
"""What the pages write for a path."""


def commands():
    """Every command line of halfeven in the pages, as (page, words)."""
    for page in PAGES:
        shell = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
        lines = shell.splitlines() + re.findall(r"`([^`\n]+)`", page.read_text())
        for line in lines:
            for part in line.split("&&"):
                found = re.search(rf"(?:halfeven|tools/(?=\w+\.py)) ?({NAMES})(?:\.py)? (\S.*)", part)
                if found:
                    yield pytest.param([found[1], *shlex.split(found[2])], id=f"{page.stem}: {part.strip()}")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words, capsys):
    command, *arguments = [STANDING_FOR.get(word, word) for word in words]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            cli.parse(command, arguments)
        assert ended.value.code == 0
    else:
        parsed = cli.parse(command, arguments)
        assert command == "init" or isinstance(parsed.experiment, Experiment)


def options():
    """Every option of a halfeven command, with - for _."""
    names = {"--help"}
    for command in cli.COMMANDS:
        names |= {f"--{field.name}" for field in dataclasses.fields(cli.imported(command.arguments))} | {"--version"}
    for part, kind in PARTS.items():
        names.add(f"--{part}")
        if dataclasses.is_dataclass(kind):
            names |= {f"--{part}.{field.name}" for field in dataclasses.fields(kind)}
    return {name.replace("_", "-") for name in names}


FOREIGN = (
    "pip",
    "accelerate",
    "torchrun",
    "mkdocs",
    "mypy",
    "opt_in_out",
    "pytest",
    "python benchmarks/",
    "ruff",
    "trtexec",
)
"""Programs whose options the pages name, besides halfeven's own."""


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_options_and_fields_exist(page):
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    for span in code:
        for option in re.findall(r"(?<!\S)--[a-z][\w.-]*", span):
            foreign = span.startswith(FOREIGN)
            # `--epochs` is named as the mistake that it is.
            assert foreign or option == "--epochs" or option.replace("_", "-") in options(), option
        if field := re.fullmatch(rf"({'|'.join(PARTS)})\.(?!xml|bin|onnx|safetensors)(\w+)(=.*)?", span):
            assert field[2] in {f.name for f in dataclasses.fields(PARTS[field[1]])}, span
        if name := re.match(r"(halfeven(?:\.\w+)+)", span):
            assert resolves(name[1]), span


def resolves(name):
    """Whether a dotted name of halfeven is a module, or something in one."""
    if name.startswith("halfeven.") and name.count(".") == 1 and hasattr(halfeven, name.split(".")[1]):
        return True
    import importlib

    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False
    except halfeven.HalfevenError as error:
        return "pip install 'halfeven[" in str(error)  # it is there, and needs an extra


def test_the_api_page_names_what_exists():
    named = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert [name for name in named if name != "halfeven.errors" and not resolves(name)] == []
    assert set(halfeven.__all__) - {"HalfevenError"} <= {name.rpartition(".")[2] for name in named}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_files_named_exist(page):
    paths = re.findall(r"(?<![\w/.-])((?:configs|tools|docs|tests|benchmarks|src)/[\w./]+\.\w+)", page.read_text())
    places = ("NAME", "litert")  # of runtimes to come
    assert [path for path in paths if not (ROOT / path).is_file() and Path(path).stem not in places] == []


def test_files_of_the_architecture_exist():
    """The page of the rooms names files by their place below `src/halfeven`."""
    named = re.findall(r"`([\w/]+/\w+\.py)`", (ROOT / "docs/architecture.md").read_text())
    found = [name for name in named if (ROOT / "src/halfeven" / name).is_file() or (ROOT / name).is_file()]
    assert len(found) > 20
    assert set(named) - set(found) <= {"src/halfeven/targets/litert.py"}


def anchors(page):
    """Anchors of a page's headings, as MkDocs makes them."""
    for title, given in re.findall(r"^#+ (.*?)(?: \{ #(\S+) \})?$", page.read_text(), flags=re.MULTILINE):
        yield given or re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


SCHEMES_OF_PICTURES = ("only-light", "only-dark")
"""Behind "#", these show a picture in light or in dark pages alone."""


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        places = SCHEMES_OF_PICTURES if target.suffix == ".png" else anchors(target) if anchor else ()
        assert not anchor or anchor in places, link


def test_every_page_is_in_the_menu_and_in_the_index_for_language_models():
    folder = ROOT / "docs"
    pages = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.suffix in (".md", ".ipynb")]
    menu, index = (path.read_text() for path in (ROOT / "mkdocs.yml", folder / "llms.txt"))
    assert [page for page in pages if page not in menu or f"]({page})" not in index] == []
    assert [link for link in re.findall(r"\]\((\S+?)\)", index) if not (folder / link).is_file()] == []


def test_every_config_is_described():
    described = (ROOT / "docs/configs.md").read_text()
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py")]
    assert [path for path in paths if path not in described] == []


def test_installed_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {name for page in PAGES for name in re.findall(r"-e \"\.\[(\w+)\]\"", page.read_text())}
    assert named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_python_is_valid(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


class Net(nn.Module):
    """A network that takes no time."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


@pytest.mark.usefixtures("unfused")
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    (block,) = blocks(ROOT / "README.md", "python")
    given = {"model": Net(), "loader": loader, "train": lambda model: model.train()(loader[0][0]).sum().backward()}
    exec(block, given)
    said = capsys.readouterr().out
    assert "Plan for openvino, w8a8" in said
    assert "layers executed in integers" in said
    assert sum(bool(line) for line in block.splitlines()) <= 12


@pytest.mark.usefixtures("unfused")
def test_the_quickstart_runs_and_prints_the_plan_it_shows(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs/quickstart.md"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in blocks(page, "python"):
        exec(block, names)
    said = capsys.readouterr().out
    (plan,) = blocks(page, "text")
    assert plan.strip() in said
    assert os.path.getsize("model.bin") > 0


@pytest.mark.usefixtures("unfused")
def test_the_page_about_sizes_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in blocks(ROOT / "docs/sizes.md", "python"):
        exec(block, names)
    assert "layers executed in integers" in capsys.readouterr().out
    assert os.path.getsize("model.onnx") > 0


def test_the_choices_shown_are_those_that_are_made():
    """The page shows what the pipeline decides for MobileNetV2 at 8 bits."""
    (shown,) = blocks(ROOT / "docs/ptq.md", "text")
    model = timm.create_model("mobilenetv2_100", in_chans=1, num_classes=10).eval()
    qmodel = halfeven.prepare(model, torch.randn(2, 1, 32, 32), batchnorm="fold")
    assert shown.strip() == str(decide(qmodel, PTQOptions(), data=True))


def test_the_recipe_shown_is_the_one_that_is_chosen():
    """The page shows what training chooses for MobileNetV2 at 4 bits."""
    (shown,) = blocks(ROOT / "docs/qat.md", "text")
    model = timm.create_model("mobilenetv2_100", in_chans=1, num_classes=10).eval()
    qmodel = halfeven.prepare(model, torch.randn(2, 1, 32, 32), scheme="w4a4")
    assert shown.strip() == str(decide_training(qmodel, QATOptions(), ScheduleOptions()))


@pytest.mark.usefixtures("unfused")
def test_the_report_of_the_readme_has_the_lines_that_verify_prints(tmp_path):
    (report,) = blocks(ROOT / "README.md", "text")
    model, images = Net(), torch.randn(2, 3, 8, 8)
    qmodel = halfeven.quantize(model, [images], scheme=SCHEME)
    halfeven.export(qmodel, tmp_path / "model.xml")
    printed = str(halfeven.verify(qmodel, tmp_path / "model.xml", [images], timed=False))

    def labels(text):
        return [re.split(r"  +", line.strip())[0] for line in text.splitlines()[1:] if line.strip()]

    assert labels(report) == labels(printed)

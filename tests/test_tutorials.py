"""The notebooks of docs/tutorials are stored with their outputs, and run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_ran(path):
    """Cells ran once, in their order, and the menu has the page."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    forms = {form for cell in cells for output in cell["outputs"] for form in output.get("data", {})}
    assert forms & {"image/png", "image/svg+xml"}
    assert path.stat().st_size < 300_000
    assert f"tutorials/{path.name}" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_name_no_folder_of_the_machine_that_ran_it(path):
    """A reader would look for it; and the page would change in each run."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = json.dumps([{**output.get("data", {}), "image/png": ""} for cell in cells for output in cell["outputs"]])
    printed = json.dumps([output.get("text", "") for cell in cells for output in cell["outputs"]])
    assert not re.findall(r"(?<![\w./<])/(?:tmp|home|root|Users|work|var)/[^ \"]*", shown + printed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_runs(path):
    """In a process of its own, with the kernel that `.[docs]` installs; its cells assert what they show."""
    pytest.importorskip("nbclient", reason='The notebooks are run by what pip install -e ".[docs]" brings.')
    command = [sys.executable, "tools/run_notebooks.py", "--check", path.stem]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

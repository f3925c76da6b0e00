"""Run the notebooks of docs/tutorials and store their outputs: `python tools/run_notebooks.py [NAME ...]`."""

import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat

TUTORIALS = Path(__file__).parents[1] / "docs/tutorials"


def executed(path: Path) -> nbformat.NotebookNode:
    """Run all cells of a notebook in a new process and an empty folder, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the day, which differ in each run
        if cell.cell_type == "code":
            cell.outputs = [kept(output) for output in cell.outputs if not on_stderr(output)]
    return notebook


def on_stderr(output: nbformat.NotebookNode) -> bool:
    """Return whether an output is of stderr, and print it: it names paths of this machine, and is not for the page."""
    if output.get("name") == "stderr":
        print(output.text, file=sys.stderr)
    return output.get("name") == "stderr"


def kept(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an output in its richest form alone: the others would double the file."""
    for form in ("text/html", "image/svg+xml", "image/png"):
        if form in output.get("data", {}):
            output.data = {form: output.data[form]}
    return output


def main(arguments: list[str]) -> None:
    """Run the notebooks of these names, or all, and print what each took; with --check, store nothing."""
    names = [name for name in arguments if name != "--check"]
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        if not names or path.stem in names:
            begin = time.perf_counter()
            notebook = executed(path)
            if "--check" not in arguments:
                nbformat.write(notebook, path)
            print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1e3:.0f} KB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The house holds: imports point down, siblings do not know each other, files and functions stay small."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "halfeven"
FILES = sorted(SOURCE.rglob("*.py"))

FLOORS = [
    {"errors"},
    {"scheme", "distributed"},
    {"arithmetic"},
    {"observers"},
    {"quantizer"},
    {"evaluation", "zoo"},
    {"graph"},
    {"placement"},
    {"ptq", "qat", "training"},
    {"export"},
    {"pipelines"},
    {"config"},
    {"commands"},
    {"cli"},
]
"""From the ground up. `export` stands on `ptq` for one thing only: what a batch is (`ptq.calibration.inputs_of`)."""

HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """All modules of the package that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("halfeven."):
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "halfeven":
            found += [f"halfeven.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("halfeven.")]
    return found


def name(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent != SOURCE], ids=name)
def test_imports_point_down(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert own in HEIGHT, f"{own} has no floor: give it one"
    for module in imports(path):
        other = room_of(module)
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{name(path)} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{node.name} has {size} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_forbidden_is_used(path):
    text = path.read_text()
    assert "torch.ao" not in text, "deprecated, and going to be deleted"
    for call in [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]:
        called = ast.unparse(call.func)
        assert called not in {"pickle.load", "pickle.loads", "pickle.Unpickler"}
        if called == "torch.load":
            assert "weights_only=True" in ast.unparse(call), "a file must not run code"
    assert path.stem not in {"utils", "common", "base", "helpers"}


@pytest.mark.parametrize("path", [f for f in FILES if f.read_text().strip()], ids=name)
def test_each_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))

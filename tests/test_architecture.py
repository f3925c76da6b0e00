"""The house: imports point strictly down, siblings do not know each other, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "halfeven"

FLOORS = [
    {"cli"},
    {"config"},
    {"pipelines"},
    {"verification"},
    {"runtimes"},
    {"ptq", "qat"},
    {"deployment"},
    {"checkpoint"},
    {"training"},
    {"layerwise"},
    {"placement"},
    {"targets"},
    {"zoo"},
    {"evaluation"},
    {"tasks"},
    {"graph"},
    {"quantization"},
    {"options", "imports", "distributed", "files", "decision", "moved", "renamed"},
    {"nearest"},
    {"errors"},
]
"""From the roof to the ground; rooms on one floor do not import each other."""

FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(SOURCE.rglob("*.py"))
PRIVATE_FX = {"runtimes/exact_model.py": {"_codegen"}, "graph/rebuild.py": {"_codegen"}}
"""Private names of torch.fx in use, file by file: none is to be added."""


def relative(path):
    return path.relative_to(SOURCE).as_posix()


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    """Modules that a file imports, anywhere in it, with the names taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative imports hide the direction"
            yield from ((node.module, alias.name) for alias in node.names)


def rooms_imported(path):
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] != "halfeven":
            continue
        if len(parts) > 1:
            yield parts[1]
        elif name is not None and (SOURCE / f"{name}.py").exists() | (SOURCE / name).is_dir():
            yield name


def test_every_room_has_its_floor():
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert rooms <= set(FLOOR_OF), "a new room needs a floor in the design first"
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_strictly_down(path):
    if relative(path) == "__init__.py":
        return
    mine = room(path)
    for other in set(rooms_imported(path)) - {mine}:
        assert FLOOR_OF[other] > FLOOR_OF[mine], f"{relative(path)} imports {other}, which is not below it"


def test_importing_it_takes_little_longer_than_importing_torch():
    """The large packages are imported where they are used: together they take several times as long as torch."""
    large = {"torchmetrics", "torchvision", "timm", "transformers", "openvino", "onnxruntime", "onnxscript", "sklearn"}
    program = f"import sys, halfeven.cli.main; print({large} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def cycles(graph):
    """A module that reaches itself, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for other in graph.get(module, ()):
            if (found := visit(other)) is not None:
                return found
        done.add(path.pop())
        return None

    return next((found for module in graph if (found := visit(module)) is not None), None)


def test_no_import_cycles_inside_a_room():
    modules = {
        "halfeven." + relative(p).removesuffix(".py").replace("/", "."): p for p in FILES if p.name != "__init__.py"
    }
    graph = {}
    for name, path in modules.items():
        taken = {m for m, _ in imports(path)} | {f"{m}.{n}" for m, n in imports(path) if n}
        graph[name] = sorted((taken & set(modules)) - {name})
    assert cycles(graph) is None
    assert cycles({"a": ["b"], "b": ["a"]}) == ["a", "b", "a"]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_none_of_torch_ao_nor_of_torch_fxs_private_names(path):
    for module, name in imports(path):
        full = f"{module}.{name}" if name else module
        assert not full.startswith(("torch.ao", "torchao", "torch.quantization", "torch.fx._")), full
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    private = used & {"_codegen", "_graph", "_root", "_copy_attr", "_assign_attr", "_prev", "_next", "_modules_dict"}
    assert private <= PRIVATE_FX.get(relative(path), set())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short_and_so_are_functions(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_says_what_it_is_for(path):
    if path.name == "__init__.py" and not path.read_text().strip():
        return
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_drawers_for_odds_and_ends():
    drawers = {"utils", "util", "common", "base", "helpers", "helper", "misc", "core"}
    found = {part.removesuffix(".py") for path in FILES for part in path.relative_to(SOURCE).parts}
    assert not found & drawers


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_unpickled(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") == "True"
            assert not ast.unparse(node.func).startswith(("pickle.load", "pickle.Unpickler"))
    taken = {f"{module}.{name}" if name else module for module, name in imports(path)}
    assert not taken & {"pickle.load", "pickle.loads", "pickle.Unpickler", "dill", "cloudpickle", "joblib"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_marked_as_typed_and_free_of_leftovers(path):
    text = path.read_text()
    assert not any(word in text for word in ("TODO", "FIXME", "XXX", "breakpoint(", 'print(f"debug'))
    assert (SOURCE / "py.typed").exists()

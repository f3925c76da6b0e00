"""The house: imports point strictly down, siblings do not know each other, files and functions stay small."""

import ast
import functools
import itertools
import re
import sys
from pathlib import Path

import torch

from processes import run

SOURCE = Path(__file__).parent.parent / "src" / "halfeven"

FLOORS = [
    {"cli", "integrations"},
    {"config"},
    {"mixed_precision"},
    {"pipelines"},
    {"diagnosis"},
    {"reporting"},
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
    {"checked_arguments", "progress_bar", "tables", "temporary"},
    {"options", "imports", "distributed", "files", "integrity", "decision", "moved"},
    {"nearest"},
    {"errors", "renamed"},
]
"""From the roof to the ground; rooms on one floor do not import each other."""

FORBIDDEN = {("training", "placement"), ("training", "zoo")}
"""Rooms below that a room does not know all the same: the trainer trains any model."""

FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(SOURCE.rglob("*.py"))
PRIVATE_DOOR = "graph/torch_private.py"
"""The one file that uses private names of other packages."""


@functools.cache
def syntax_tree(path):
    return ast.parse(path.read_text())


def of_every_file(check):
    """Make a check of a file a test of all of them, which fails with the names of those that do not pass."""

    def test():
        failures = {}
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                failures[relative(path)] = str(error)
        assert not failures

    test.__name__ = check.__name__
    return test


def relative(path):
    return path.relative_to(SOURCE).as_posix()


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    """Modules that a file imports, anywhere in it, with the names taken from them."""
    for node in ast.walk(syntax_tree(path)):
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


def test_the_picture_shows_the_rooms_on_their_floors():
    picture = (SOURCE.parents[1] / "docs" / "assets" / "floors.svg").read_text()
    heights = {name: int(y) for y, name in re.findall(r'class="name" x="\d+" y="(\d+)">(\w+)<', picture)}
    assert set(heights) == set(FLOOR_OF)
    lowest = [max(heights[room] for room in floor) for floor in FLOORS]
    highest = [min(heights[room] for room in floor) for floor in FLOORS]
    assert all(above <= below for above, below in itertools.pairwise(lowest))
    assert all(above <= below for above, below in zip(lowest, highest[1:], strict=False))


@of_every_file
def test_imports_point_strictly_down(path):
    if relative(path) == "__init__.py":
        return
    mine = room(path)
    for other in set(rooms_imported(path)) - {mine}:
        assert FLOOR_OF[other] > FLOOR_OF[mine], f"{relative(path)} imports {other}, which is not below it"
        assert (mine, other) not in FORBIDDEN, f"{relative(path)} imports {other}, of which {mine} must know nothing"


def test_importing_it_takes_little_longer_than_importing_torch():
    """The large packages are imported where they are used: together they take several times as long as torch."""
    large = {"torchmetrics", "torchvision", "timm", "transformers", "openvino", "onnxruntime", "onnxscript", "sklearn"}
    program = f"import sys, halfeven.cli.train, halfeven.verification.verify; print({large} & set(sys.modules))"
    done = run([sys.executable, "-c", program], check=True)
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


@of_every_file
def test_none_of_torch_ao(path):
    for module, name in imports(path):
        full = f"{module}.{name}" if name else module
        assert not full.startswith(("torch.ao", "torchao", "torch.quantization")), full


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_private_names(tree):
    """Private functions, classes, variables and attributes of `self` that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


OWN = {name for path in FILES for name in own_private_names(syntax_tree(path)) if is_private(name)}
TORCH_MODULE_INTERNALS = {name for name in dir(torch.nn.Module()) if is_private(name)}


def foreign_private_names(source, own):
    """Private names that a file takes from other packages: imported, read as attributes, overridden, or as strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            full = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            yield from (n for n in full if not n.startswith("halfeven") and any(map(is_private, n.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            # `aten._softmax` is an operator's name in every exported graph, as public as `aten.softmax`.
            if node.attr not in own and not ast.unparse(node).startswith(("aten.", "torch.ops.aten.")):
                yield ast.unparse(node)
        elif isinstance(node, ast.FunctionDef) and node.name in TORCH_MODULE_INTERNALS:
            yield node.name
        elif isinstance(node, ast.Constant) and node.value in TORCH_MODULE_INTERNALS:
            yield node.value


@of_every_file
def test_private_names_of_other_packages_stand_in_one_file(path):
    if relative(path) == PRIVATE_DOOR:
        return
    found = set(foreign_private_names(path.read_text(), OWN | {"_replace"}))  # the public method of a NamedTuple
    assert not found


def test_a_private_name_is_found_however_it_is_used():
    for source in (
        "import torch._inductor",
        "from torch.utils import _pytree as pytree",
        "from torch._ops import OpOverload",
        "layer._conv_forward(x)",
        "torch._foreach_copy_(a, b)",
        "getattr(module, '_buffers')",
        "class A(nn.Module):\n    def _load_from_state_dict(self): ...",
    ):
        assert list(foreign_private_names(source, OWN)), source
    assert not list(foreign_private_names("self._range(aten._softmax.default)", {"_range"}))


@of_every_file
def test_files_are_short_and_so_are_functions(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


@of_every_file
def test_every_module_says_what_it_is_for(path):
    if path.name == "__init__.py" and not path.read_text().strip():
        return
    assert ast.get_docstring(syntax_tree(path))


def test_no_drawers_for_odds_and_ends():
    drawers = {"utils", "util", "common", "base", "helpers", "helper", "misc", "core"}
    found = {part.removesuffix(".py") for path in FILES for part in path.relative_to(SOURCE).parts}
    assert not found & drawers


@of_every_file
def test_nothing_is_unpickled(path):
    tree = syntax_tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") == "True"
            assert not ast.unparse(node.func).startswith(("pickle.load", "pickle.Unpickler"))
    taken = {f"{module}.{name}" if name else module for module, name in imports(path)}
    assert not taken & {"pickle.load", "pickle.loads", "pickle.Unpickler", "dill", "cloudpickle", "joblib"}


@of_every_file
def test_marked_as_typed_and_free_of_leftovers(path):
    text = path.read_text()
    assert not any(word in text for word in ("TODO", "FIXME", "XXX", "breakpoint(", 'print(f"debug'))
    assert (SOURCE / "py.typed").exists()


RUNTIME_NAMES = ("openvino", "onnxruntime", "tensorrt")
NAMING_A_RUNTIME = {
    "runtimes/runtime.py": "the table itself",
    "placement/options.py": "the default target",
    "moved.py": "names of version 0.1",
}
"""Files outside the runtimes' own rooms whose code names one, and why."""
ROOMS_OF_RUNTIMES = ("runtimes/openvino/", "runtimes/onnxruntime/", "runtimes/tensorrt/", "runtimes/onnx/", "targets/")


def code_strings(tree):
    """The strings of a file that are no documentation."""
    documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in documentation]


def runtimes_named(path):
    tree = syntax_tree(path)
    words = [str(node.value) for node in code_strings(tree) if isinstance(node.value, str) and " " not in node.value]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, ast.Name):
            words.append(node.id)
    words += [part for module, name in imports(path) for part in (*module.split("."), name or "")]
    return {name for name in RUNTIME_NAMES for word in words if name in word.lower().replace("_", "")}


@of_every_file
def test_no_file_outside_a_runtimes_rooms_knows_it(path):
    if relative(path) not in NAMING_A_RUNTIME and not relative(path).startswith(ROOMS_OF_RUNTIMES):
        assert not runtimes_named(path)
    if relative(path) in NAMING_A_RUNTIME:
        assert runtimes_named(path), "it is no exception any more"


@of_every_file
def test_only_the_table_imports_a_runtimes_folder(path):
    folders = {module.split(".")[2] for module, _ in imports(path) if module.startswith("halfeven.runtimes.")}
    if relative(path) != "runtimes/runtime.py":
        own = relative(path).split("/")[1] if relative(path).startswith("runtimes/") else ""
        assert not folders & {*RUNTIME_NAMES} - {own}

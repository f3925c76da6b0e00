"""The public names: those of the design, each with a docstring, and nothing more."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven import errors
from processes import run

PUBLIC = {
    *("quantize", "plan", "prepare", "plan_of", "set_rules", "calibrate", "exact", "export", "verify", "save", "load"),
    *("load_deployed", "diagnose", "search"),
    *("HalfevenError", "Observer", "Plan", "QuantizationOptions", "Quantizer", "Rule", "SearchResult"),
}


def test_the_public_names_are_these():
    assert set(he.__all__) == PUBLIC
    assert he.__all__ == sorted(he.__all__)
    assert all(hasattr(he, name) for name in he.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstrings_name_every_argument_that_needs_words(name):
    thing = getattr(he, name)
    assert thing.__doc__
    first = thing.__doc__.strip().splitlines()[0]
    assert first[0].isupper() or first[0] == '"'
    assert inspect.getmodule(thing).__name__.startswith("halfeven")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_signatures_are_typed(name):
    thing = getattr(he, name)
    if inspect.isclass(thing):
        return
    signature = inspect.signature(thing)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


def test_version_is_the_packages():
    from importlib.metadata import version

    assert he.__version__ == version("halfeven")
    assert re.fullmatch(r"\d+\.\d+\.\d+", he.__version__)


def test_every_error_is_a_halfeven_error():
    own = [thing for thing in vars(errors).values() if getattr(thing, "__module__", "") == errors.__name__]
    classes = [thing for thing in own if inspect.isclass(thing) and issubclass(thing, Exception)]
    found = [thing for thing in classes if not issubclass(thing, Warning)]
    assert {error.__name__ for error in found} == set(re.findall(r"\w+Error", errors.__doc__)), "those of its tree"
    for error in found:
        assert issubclass(error, he.HalfevenError)
        assert error.__doc__


@pytest.mark.usefixtures("fused")
def test_the_designs_example(tmp_path):
    """Section 2 of the design, as it stands there."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    loader = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    example = loader[0]

    qmodel = he.quantize(model, loader, target="openvino")
    he.export(qmodel, tmp_path / "model.xml")
    assert "100.0000 %" in str(he.verify(qmodel, tmp_path / "model.xml", loader))

    qmodel = he.prepare(model, example, target="openvino", scheme="w4a8")
    assert "w4a8" in str(he.plan_of(qmodel))
    he.calibrate(qmodel, loader, batches=32)
    qmodel.train()(example).sum().backward()
    he.save(qmodel, tmp_path / "q.safetensors")
    qmodel = he.load(tmp_path / "q.safetensors", model, example)
    assert qmodel(example).shape == (4, 3)


def test_the_door_that_mypy_sees_is_the_one_that_opens():
    """The imports under TYPE_CHECKING and the table that serves them at run time name the same modules."""
    tree = ast.parse(Path(he.__file__).read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: statement.module.removeprefix("halfeven.") for statement in typed.body for alias in statement.names
    }
    assert seen == he._MODULES
    assert set(seen) == set(he.__all__)
    assert set(he.__all__) <= set(dir(he))


def test_importing_halfeven_does_not_import_torch():
    """`halfeven --help` shall answer at once; a public name brings torch with it."""
    program = """
import sys, halfeven
assert halfeven.__version__ and "quantize" in dir(halfeven)
assert "torch" not in sys.modules
try:
    halfeven.quantise
except AttributeError as error:
    assert "quantise" in str(error)
else:
    raise SystemExit("a name that does not exist")
assert "torch" not in sys.modules
assert callable(halfeven.export) and "torch" in sys.modules
from halfeven.errors import HalfevenError
assert halfeven.HalfevenError is HalfevenError
"""
    run([sys.executable, "-W", "error::DeprecationWarning:halfeven", "-c", program], check=True)

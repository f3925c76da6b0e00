"""The examples end with a verified file; each takes some seconds, so all run with --exhaustive alone."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "digits")


def test_they_are_short():
    assert NAMES == ["own_loop", "timm_style", "with_accelerate", "with_lightning", "with_transformers"]
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60 for name in NAMES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_it_ends_with_a_verified_file(name, tmp_path, monkeypatch):
    if name == "with_lightning":
        pytest.importorskip("lightning", reason='needs the extra "lightning"')
    monkeypatch.syspath_prepend(EXAMPLES)
    report = importlib.import_module(name).main(tmp_path)
    assert report.weights_match
    assert report.integer_layers == report.quantizable_layers
    assert report.alone_match == 1 or report.overflows
    if report.accuracy:
        assert report.accuracy["deployed"] > 90

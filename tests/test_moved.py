"""Module names of version 0.1: each still imports, with a warning that names the new place."""

import importlib
import sys

import pytest

import halfeven as he
from halfeven.moved import EXPORT, MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_gives_the_module_in_its_new_place(old):
    sys.modules.pop(f"halfeven.{old}", None)
    new = f"halfeven.{MOVED[old]}"
    with pytest.warns(DeprecationWarning, match=f"halfeven.{old} is now {new}"):
        found = importlib.import_module(f"halfeven.{old}")
    assert found is importlib.import_module(new)
    assert found.__spec__.name == new


@pytest.mark.parametrize("name", sorted(EXPORT))
def test_the_old_folder_export_gives_what_it_gave(name):
    with pytest.warns(DeprecationWarning, match=EXPORT[name]):
        found = getattr(importlib.import_module("halfeven.export"), name)
    assert found.__module__ == f"halfeven.{EXPORT[name]}"
    assert callable(he.export)


def test_a_name_that_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("halfeven.export.nothing")
    with pytest.raises(ImportError):
        from halfeven.export import nothing  # noqa: F401

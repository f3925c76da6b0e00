"""The public door: the names that stay."""

import inspect

import halfeven as he


def test_the_promised_names_are_there():
    promised = {"quantize", "prepare", "plan_of", "calibrate", "export", "verify", "save", "load"}
    assert promised <= set(he.__all__)


def test_all_names_exist_sorted_and_documented():
    classes = sorted(n for n in he.__all__ if n[0].isupper())
    functions = sorted(n for n in he.__all__ if n[0].islower())
    assert he.__all__ == classes + functions
    for name in he.__all__:
        assert inspect.getdoc(getattr(he, name)), name


def test_nothing_else_leaks():
    public = {name for name, value in vars(he).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(he.__all__)


def test_errors_of_the_user_share_a_root():
    from halfeven import errors

    kinds = [c for c in vars(errors).values() if inspect.isclass(c)]
    assert len(kinds) == 8
    assert all(issubclass(kind, he.HalfevenError) for kind in kinds)

"""Option classes take only values that their fields can have, and say what was meant by others."""

import copy
import dataclasses
import math
import pickle
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfeven.errors import ConfigError
from halfeven.options import (
    Auto,
    Options,
    PositiveInt,
    Share,
    Switch,
    above,
    also_spelled,
    below,
    formerly,
    renamed_from,
)


@dataclass(frozen=True, kw_only=True)
class Inner(Options):
    """Options inside of others."""

    share: Share = 0.5
    """A share."""


@dataclass(frozen=True, kw_only=True)
class Sample(Options):
    """A field of every kind."""

    count: PositiveInt = 1
    rate: Annotated[float, above(0), below(10)] = 0.1
    flag: bool = True
    samples: Annotated[PositiveInt | Auto, renamed_from("images"), formerly(0)] = 512
    name: str = "w8a8"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    switch: Switch = "auto"
    steps: Annotated[PositiveInt | Auto, formerly(0)] = "auto"
    formats: Annotated[tuple[Literal["xml", "onnx"], ...] | Auto, formerly(())] = "auto"
    colours: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axis: int | None = None
    arguments: dict[str, bool | int | float | str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


RIGHT = {
    "count": st.integers(min_value=1),
    "rate": st.floats(0, 10, exclude_min=True, exclude_max=True) | st.integers(1, 9),
    "flag": st.booleans(),
    "name": st.text(),
    "optimizer": st.sampled_from(["sgd", "adamw"]),
    "switch": st.sampled_from(["auto", "on", "off"]),
    "steps": st.just("auto") | st.integers(min_value=1),
    "formats": st.just("auto") | st.lists(st.sampled_from(["xml", "onnx"]), min_size=1).map(tuple),
    "colours": st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3),
    "axis": st.none() | st.integers(),
    "arguments": st.dictionaries(st.text(), st.booleans() | st.integers() | st.text()),
    "inner": st.builds(Inner, share=st.floats(0, 1)),
}
WRONG = {
    "count": st.integers(max_value=0) | st.booleans() | st.floats() | st.text() | st.none(),
    "rate": st.sampled_from([0, 10, -1.0, math.nan, math.inf, -math.inf, True, "1", None]),
    "flag": st.integers() | st.text() | st.none(),
    "name": st.integers() | st.none() | st.booleans() | st.binary(),
    "optimizer": st.text().filter(lambda text: text not in ("sgd", "adamw")) | st.booleans() | st.none(),
    "switch": st.booleans() | st.none() | st.integers() | st.just("On"),
    "steps": st.floats() | st.just("") | st.none() | st.booleans() | st.integers(max_value=-1),
    "formats": st.sampled_from(["xml", "", ("xml", "json"), ["json"], None, 0]),
    "colours": st.sampled_from([(0.0, 0.0), (0.0,) * 4, (0.0, math.nan, 0.0), [0.0, 0.0], 0.0]),
    "axis": st.floats() | st.text() | st.booleans(),
    "arguments": st.sampled_from([{1: 2}, {"a": None}, {"a": [1]}, (), None]),
    "inner": st.sampled_from([None, {"share": 0.5}, Sample()]),
}
KEYWORDS = st.fixed_dictionaries({}, optional=RIGHT)
MISTAKES = st.sampled_from(sorted(WRONG)).flatmap(lambda name: st.tuples(st.just(name), WRONG[name]))


@settings(max_examples=40, deadline=None)
@given(KEYWORDS, KEYWORDS, MISTAKES)
def test_right_values_are_kept_and_wrong_ones_refused_also_by_replace(first, second, mistake):
    name, wrong = mistake
    made = dataclasses.replace(Sample(**first), **second)
    for key, value in {**first, **second}.items():
        assert getattr(made, key) == value
    for refuse in (lambda: Sample(**{**first, name: wrong}), lambda: dataclasses.replace(made, **{name: wrong})):
        with pytest.raises(ConfigError, match=f"Sample.{name}="):
            refuse()


def refusal(**values):
    with pytest.raises(ConfigError) as caught:
        Sample(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("count", 0, "1"),
        ("count", 2.5, "2"),
        ("count", "8", "8"),
        ("flag", "false", "False"),
        ("flag", 1, "True"),
        ("optimizer", "SGD", '"sgd"'),
        ("optimizer", "adam", '"adamw"'),
        ("switch", False, '"off"'),
        ("switch", "True", '"on"'),
        ("steps", "aut", '"auto"'),
        ("steps", "12", "12"),
        ("formats", "xml", '("xml",)'),
        ("formats", ["xml", "onx"], '("xml", "onnx")'),
    ],
)
def test_the_nearest_right_value_is_named(name, value, meant):
    assert refusal(**{name: value}).endswith(f"Did you mean {meant}?")


def test_a_list_stands_for_a_tuple():
    made = Sample(formats=["xml"], colours=[1.0, 2.0, 3.0])
    assert made.formats == ("xml",)
    assert made.colours == (1.0, 2.0, 3.0)
    assert dataclasses.replace(made, formats=["onnx", "xml"]).formats == ("onnx", "xml")


def test_choices_bounds_and_types_are_named():
    assert 'must be "sgd" or "adamw". Its default is "sgd".' in refusal(optimizer="lion")
    assert "must be an integer (at least 1)." in refusal(count=-3)
    assert "must be a finite number (above 0 and below 10)." in refusal(rate=math.nan)
    assert 'must be a text (str). Its default is "w8a8".' in refusal(name=8)
    assert "must be Inner(...)." in refusal(inner={"share": 1})
    assert "must be a tuple of 3 values, each a finite number." in refusal(colours=(0.0,))


def test_all_mistakes_are_told_at_once():
    said = refusal(count=0, optimizer="SGD", flagg=True)
    assert said.startswith("3 options cannot be used, so nothing was started:")
    assert all(name in said for name in ("Sample.count=0", 'Sample.optimizer="SGD"', "flagg"))


def test_a_field_that_does_not_exist_names_the_nearest_or_all():
    assert 'Sample has no option "optimiser". Did you mean optimizer?' in refusal(optimiser="sgd")
    assert "There are count, rate, flag" in refusal(zzz=1)
    with pytest.raises(ConfigError, match="by its name, and 1 came without"):
        Sample(3)


def test_a_required_field_is_asked_for():
    @dataclass(frozen=True, kw_only=True)
    class Needy(Options):
        model: str

    with pytest.raises(ConfigError, match=r"Needy\.model must be given"):
        Needy()


def test_the_old_spelling_of_auto_is_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r'Sample\.steps=0 is now written "auto"') as told:
        assert Sample(steps=0).steps == "auto"
    assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="formats"):
        assert dataclasses.replace(Sample(), formats=()).formats == "auto"
    refusal(steps=False)


@dataclass(frozen=True, kw_only=True)
class Spelled(Options):
    """A choice with further spellings."""

    ranges: Annotated[Literal["learned", "clipped", "lsq"], also_spelled(lsq="learned")] = "clipped"


def test_a_further_spelling_is_the_choice_that_it_stands_for(recwarn):
    assert Spelled(ranges="lsq") == Spelled(ranges="learned")
    assert dataclasses.replace(Spelled(), ranges="lsq").ranges == "learned"
    assert not recwarn.list
    with pytest.raises(ConfigError, match=r'ranges="LSQ" must be "learned", "clipped" or "lsq"\. Did you mean "lsq"'):
        Spelled(ranges="LSQ")


def test_the_old_name_of_a_field_is_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Sample\.images is now samples; the next version refuses it") as told:
        assert Sample(images=3) == Sample(samples=3)
    assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="images is now samples"):
        assert dataclasses.replace(Sample(count=2), axis=1, images=3) == Sample(count=2, axis=1, samples=3)
    with pytest.warns(DeprecationWarning, match="images is now samples") as told:
        assert Sample(samples=4).images == 4
    assert told[0].filename == __file__


def test_values_under_an_old_name_are_brought_up_to_date_and_checked():
    with pytest.warns(DeprecationWarning, match="next version refuses it") as told:
        assert Sample(images=0).samples == "auto"
    assert [str(one.message).partition(" is now")[0] for one in told] == ["Sample.images", "Sample.samples=0"]
    with pytest.warns(DeprecationWarning, match="images is now samples"):
        assert "Sample.samples=-1 must be an integer (at least 1)" in refusal(images=-1)


def test_a_new_name_gives_no_warning(recwarn):
    assert dataclasses.replace(Sample(), samples=3).samples == 3
    assert not recwarn


@pytest.mark.parametrize("names", [("images", "samples"), ("samples", "images")])
def test_an_old_and_a_new_name_at_once_are_refused_also_by_replace(names):
    values = dict.fromkeys(names, 5)
    said = "Sample.images is the old name of Sample.samples, and both are given. Leave Sample.images out."
    assert refusal(**values).endswith(said)
    with pytest.raises(ConfigError, match=r"old name of Sample\.samples"):
        dataclasses.replace(Sample(), **values)


def test_an_attribute_that_never_was_is_an_error():
    with pytest.raises(AttributeError, match="'Sample' object has no attribute 'pictures'"):
        _ = Sample().pictures


def test_rules_between_fields_see_only_checked_values():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Pair(Options):
        low: int = 0
        high: int = 1

        def __post_init__(self):
            seen.append((self.low, self.high))

    with pytest.raises(ConfigError):
        Pair(low="0")
    assert seen == []
    assert Pair(high=3) == Pair(low=0, high=3)


def test_copies_and_pickles_are_equal():
    sample = Sample(inner=Inner(share=1))
    assert copy.deepcopy(sample) == pickle.loads(pickle.dumps(sample)) == sample

"""Misspelt names and paths: the nearest right one, for messages."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.nearest import did_you_mean_path, joined_by_or, nearest_path


@pytest.mark.parametrize(
    "wrong",
    ["work_dir/digits/best.safetensors", "work_dirs/digit/best.safetensor", "work_dirs/digits/Best.safetensors"],
)
def test_the_nearest_path_is_found_folder_by_folder(wrong, tmp_path, monkeypatch):
    right = tmp_path / "work_dirs" / "digits" / "best.safetensors"
    right.parent.mkdir(parents=True)
    right.touch()
    assert nearest_path(tmp_path / wrong) == right
    monkeypatch.chdir(tmp_path)
    relative = right.relative_to(tmp_path)
    assert did_you_mean_path(relative.parent.parent / wrong.split("/", 1)[1]) == f" Did you mean {relative}?"


def test_no_path_is_near(tmp_path):
    (tmp_path / "file").touch()
    for wrong in ("xyz", "xyz/file", "file/inside"):
        assert nearest_path(tmp_path / wrong) is None
        assert did_you_mean_path(tmp_path / wrong) == ""


def test_a_list_in_a_sentence():
    assert [joined_by_or(words) for words in ("a", "ab", "abc")] == ["a", "a or b", "a, b or c"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 4}, r'Did you mean scheme\? .*"w4a8"'),
        ({"dtype": "int8"}, r"Did you mean scheme\?"),
        ({"ignored_scope": ["head"]}, r"Did you mean rules\? Rule\(pattern="),
        ({"device": "CPU"}, r"Did you mean target\?"),
        ({"dataset": []}, r"Did you mean loader\?"),
        ({"subset_size": 300}, r"Did you mean batches\?"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_another_tools_option_is_told_by_its_name_here(wrong, message):
    with pytest.raises(ConfigError, match=message):
        he.quantize(nn.Identity(), [], **wrong)


def test_a_rule_names_the_bits_of_weights():
    with pytest.raises(ConfigError, match=r"Did you mean weight_bits\?"):
        he.Rule(pattern="head", bits=4)


def test_options_that_resemble_none_are_followed_by_a_single_list_of_all():
    with pytest.raises(ConfigError) as caught:
        he.quantize(nn.Identity(), [], unheard=1, bits=4, oddly=2)
    told = str(caught.value)
    assert told.count("There are target, scheme, ") == 1
    assert (
        told.index('"unheard"') < told.index("Did you mean scheme?") < told.index('"oddly"') < told.index("There are")
    )


def test_options_in_a_message_show_what_is_not_default():
    """All eleven fields of a rule, twice, hid what was wrong with it."""
    with pytest.raises(ConfigError) as caught:
        he.QuantizationOptions(rules=he.Rule(pattern="head", weight_bits=4))
    assert 'rules=Rule(pattern="head", weight_bits=4) must be a tuple' in str(caught.value)
    assert 'Did you mean (Rule(pattern="head", weight_bits=4),)?' in str(caught.value)


def test_batches_in_another_argument_name_the_right_one():
    with pytest.raises(ConfigError, match=r"cannot use batches: .* Did you mean loader\?"):
        he.quantize(nn.Identity(), batches=[torch.randn(2, 4)])

"""Misspelt names and paths: the nearest right one, for messages."""

import pytest

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

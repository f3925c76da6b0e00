"""Texts in tab-separated files: tokens, labels, and what is said of files that do not fit."""

import pytest
import torch

from halfeven.errors import ConfigError
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions, TextOptions
from scenes import write_bert, write_glue


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(write_bert(tmp_path_factory.mktemp("bert")))


def texts(root, bert, **changes):
    return load_datasets(
        DataOptions(source="texts", root=str(root), text=TextOptions(tokenizer=bert, max_length=12, **changes))
    )


def test_tokens_and_labels(tmp_path, bert):
    data = texts(write_glue(tmp_path, train=20, dev=5), bert)
    assert (len(data.train), len(data.validation), data.num_classes) == (20, 5, 2)
    inputs, label = data.train[3]
    assert {name: (tokens.shape, tokens.dtype) for name, tokens in inputs.items()} == {
        name: ((12,), torch.int64) for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    line = (tmp_path / "train.tsv").read_text().splitlines()[4].split("\t")
    assert int(label) == int(line[1])
    assert int(inputs["attention_mask"].sum()) == min(12, len(line[0].split()) + 2)
    example = data.example()
    assert example["input_ids"].shape == (2, 12)


def test_pairs_and_labels_in_words(tmp_path, bert):
    """As QNLI and MRPC have them; quotation marks are part of the text."""
    rows = ["first\tsecond\tanswer", 'the "film\tgood scene\tyes', "bad plot\tthe actor\tno"]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    data = texts(tmp_path, bert, columns=("first", "second"), label_column="answer")
    assert [int(data.train[index][1]) for index in range(2)] == [1, 0]
    assert data.train[0][0]["token_type_ids"].max() == 1


def test_what_does_not_fit_is_named(tmp_path, bert):
    with pytest.raises(ConfigError, match=r"no file .*train\.tsv"):
        texts(tmp_path, bert)
    write_glue(tmp_path, train=4, dev=4)
    with pytest.raises(ConfigError, match=r"no column words; it has sentence, label"):
        texts(tmp_path, bert, columns=("words",))
    with pytest.raises(ConfigError, match="tokenizer is not set"):
        texts(tmp_path, "")
    with pytest.raises(ConfigError, match="There is no tokenizer"):
        texts(tmp_path, str(tmp_path / "nothing"))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe film\t7\n")
    with pytest.raises(ConfigError, match=r"labels 7 of dev\.tsv do not occur"):
        texts(tmp_path, bert)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe film\n")
    with pytest.raises(ConfigError, match=r"Line 2 of .*dev\.tsv has fewer fields"):
        texts(tmp_path, bert)


@pytest.mark.parametrize("given", [dict(max_length=0), dict(columns=()), dict(columns=("a", "b", "c"))])
def test_options_that_give_no_text(given):
    with pytest.raises(ConfigError, match=r"TextOptions\.max_length=0|data\.text\.columns="):
        TextOptions(**given)

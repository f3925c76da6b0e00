"""Labelled texts in tab-separated files, as GLUE has them, for models of transformers."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.nearest import did_you_mean_path
from halfeven.zoo.options import DataOptions


class Texts(Dataset[Any]):
    """Pairs of token tensors by name, [max_length] each, and a label."""

    def __init__(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        self.tokens = tokens
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {name: rows[index].long() for name, rows in self.tokens.items()}, self.labels[index]


def texts(options: DataOptions) -> tuple[Texts, Texts, list[str]]:
    """Read root/train.tsv and root/dev.tsv, whose first line has the names of the columns.

    Returns:
        The training texts, the validation texts, and the classes.

    Raises:
        ConfigError: a file, column or label is not there, or transformers is not installed.
    """
    tokenizer = _load_tokenizer(options)
    train, validation = (_read_rows(Path(options.root) / name, options) for name in ("train.tsv", "dev.tsv"))
    column = options.text.label_column
    classes = sorted({row[column] for row in train})
    if unknown := sorted({row[column] for row in validation} - set(classes)):
        raise ConfigError(
            f"The labels {', '.join(unknown[:5])} of dev.tsv do not occur in train.tsv (which has "
            f"{', '.join(classes[:5])}), so no model can learn them. Check data.text.label_column."
        )
    return (
        _encode_texts(train, classes, tokenizer, options),
        _encode_texts(validation, classes, tokenizer, options),
        classes,
    )


def _load_tokenizer(options: DataOptions) -> Any:
    with extra("text", 'data.source="texts"'):
        from transformers import AutoTokenizer
    if not options.text.tokenizer:
        raise ConfigError(
            "data.text.tokenizer is not set, so texts cannot become tokens. Set it to the model's folder or name."
        )
    try:
        return AutoTokenizer.from_pretrained(options.text.tokenizer)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"There is no tokenizer {options.text.tokenizer}, so texts cannot become tokens: {reason} Set "
            "data.text.tokenizer to a folder with tokenizer.json or vocab.txt, or to a name of transformers' hub."
        ) from error


def _read_rows(path: Path, options: DataOptions) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError(
            f"There is no file {path}, so there are no texts.{did_you_mean_path(path)} Set data.root to a folder with "
            "train.tsv and dev.tsv."
        )
    with path.open(encoding="utf-8", newline="") as file:
        # GLUE's files do not quote: a quotation mark is a character of the text.
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = list(reader)
    wanted = (*options.text.columns, options.text.label_column)
    if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
        raise ConfigError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}. Set "
            "data.text.columns and data.text.label_column to columns that it has."
        )
    # Line 1 has the names of the columns.
    short = [number for number, row in enumerate(rows, 2) if any(row[name] is None for name in wanted)]
    if short:
        raise ConfigError(
            f"Line {short[0]} of {path} has fewer fields than the first line, so its text or label is missing. "
            "Correct the file."
        )
    return rows


def _encode_texts(rows: list[dict[str, str]], classes: list[str], tokenizer: Any, options: DataOptions) -> Texts:
    columns = [[row[name] for row in rows] for name in options.text.columns]
    length = options.text.max_length
    tokens = tokenizer(*columns, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    number = {label: index for index, label in enumerate(classes)}
    labels = torch.tensor([number[row[options.text.label_column]] for row in rows], dtype=torch.int64)
    # Half the memory; items become int64, which models take, where they are read.
    return Texts({name: ids.to(torch.int32) for name, ids in tokens.items()}, labels)

"""The nearest right name to a misspelt one, for messages."""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

OTHER_WORDS = {
    **dict.fromkeys(("false", "no", "none", "0", "never"), "off"),
    **dict.fromkeys(("true", "yes", "1", "always"), "on"),
    "gpu": "cuda",
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}
"""Other tools' words for choices of ours, in lower case."""


OTHER_OPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        (
            *(
                "bits",
                "num_bits",
                "n_bits",
                "nbits",
                "bit_width",
                "bitwidth",
                "dtype",
                "precision",
                "quant_type",
                "preset",
            ),
            *("weight_bits", "w_bits", "wbits", "activation_bits", "act_bits", "a_bits", "abits"),
        ),
        (
            ("scheme", 'It names the bits of weights and activations, such as "w8a8" or "w4a8".'),
            ("weight_bits", "activation_bits are those of its output."),
        ),
    ),
    **dict.fromkeys(
        ("ignored_scope", "ignore", "ignored", "exclude", "excluded", "skip", "skip_layers", "nodes_to_exclude"),
        (("rules", 'Rule(pattern="features.0", quantize=False) keeps an operator in float.'),),
    ),
    **dict.fromkeys(
        ("backend", "runtime", "engine", "device", "target_device"),
        (("target", 'It names the runtime, such as "openvino" or "onnxruntime".'),),
    ),
    **dict.fromkeys(
        ("data", "dataset", "dataloader", "calibration_dataset", "calib_data", "calibration_data"),
        (("loader", "It is the second argument."),),
    ),
    **dict.fromkeys(
        ("subset_size", "num_samples", "calibration_samples", "num_batches", "calibrate_steps"),
        (("batches", "It is the largest number of batches that are read."),),
    ),
    **dict.fromkeys(("granularity", "per_tensor", "channel_wise"), (("per_channel", "It holds for weights."),)),
    **dict.fromkeys(("fold_bn", "fold_batchnorm", "fold_batch_norm", "fuse"), (("batchnorm", ""),)),
    **dict.fromkeys(("fast_bias_correction", "bias_correction"), (("correct_biases", ""),)),
    **dict.fromkeys(("smooth_quant", "smoothquant"), (("smooth", ""),)),
    **dict.fromkeys(("adaround", "learn_rounding", "brecq", "qdrop"), (("reconstruct", ""),)),
    **dict.fromkeys(("cle", "cross_layer_equalization"), (("equalize", ""),)),
}
"""Other tools' names of options -> ours, the first that the function takes, each with a sentence about it."""


def shown(value: object) -> str:
    """Return a value as it is written in Python, texts in double quotes; of an options object, what is not default."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        written = (f"{field.name}={shown(held)}" for field, held in given if held is not field.default)
        return f"{type(value).__name__}({', '.join(written)})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def nearest(value: object, choices: Sequence[Any]) -> Any:
    """Return the choice that a misspelt or mistyped value most likely means, or None."""
    by_name = {_lower_case(choice): choice for choice in choices}
    word = _lower_case(value)
    words = [word, OTHER_WORDS.get(word, word)]
    if found := [by_name[one] for one in words if one in by_name]:
        return found[0]
    near = similar(word, by_name, 1)
    return by_name[near[0]] if near else None


def unknown_options(owner: str, names: Iterable[str], options: Sequence[str]) -> str:
    """Return the sentences about names that are no options; all options are listed once, if a name resembles none.

    Args:
        owner: the function or class that was given them.
        names: the wrong names.
        options: the right names.
    """
    hints = {name: did_you_mean_option(name, options) for name in names}
    told = [f'{owner} has no option "{name}". {hint}'.rstrip() for name, hint in hints.items()]
    return " ".join([*told, *([] if all(hints.values()) else [f"There are {', '.join(options)}."])])


def did_you_mean_option(name: str, options: Sequence[str]) -> str:
    """Return the sentences that name the option which a wrong name most likely means; "" where no option is near.

    Args:
        name: the wrong name, which may be another tool's.
        options: the right names.
    """
    for option, note in OTHER_OPTIONS.get(name.lower(), ()):
        if option in options:
            return f"Did you mean {option}? {note}".rstrip()
    return did_you_mean(name, options, otherwise="")


def did_you_mean(name: str, choices: Iterable[str], most: int = 1, otherwise: str | None = None) -> str:
    """Return the sentence that names the nearest choices.

    Args:
        name: the misspelt name.
        choices: the right names.
        most: largest number of names in the sentence.
        otherwise: the sentence where no name is near; None: it lists all choices.
    """
    choices = list(choices)
    if near := similar(name, choices, most):
        return f"Did you mean {joined_by_or(near)}?"
    return f"There are {', '.join(choices)}." if otherwise is None else otherwise


def similar(name: str, choices: Iterable[str], most: int, cutoff: float = 0.6) -> list[str]:
    """Return the most similar names, at most `most`, the nearest first.

    Args:
        name: the misspelt name.
        choices: the right names.
        most: largest number of names.
        cutoff: smallest similarity, from 0 to 1.
    """
    return difflib.get_close_matches(name, list(choices), n=most, cutoff=cutoff)


MAX_COMPARED_NAMES = 2000
"""Largest number of names in a folder that are compared with a misspelt one."""


def did_you_mean_path(path: Path) -> str:
    """Return the sentence that names the existing path which a wrong one most likely means, with a space before it.

    It is empty where no path is near.
    """
    near = nearest_path(path)
    return "" if near is None else f" Did you mean {near}?"


def nearest_path(path: Path) -> Path | None:
    """Return the existing path whose names are nearest to those of a wrong one, folder by folder; None without any."""
    found = Path(path.anchor)
    for name in path.relative_to(path.anchor).parts:
        there = found / name
        try:
            if not there.exists():
                names = [one.name for one in islice(found.iterdir(), MAX_COMPARED_NAMES)]
                there = found / similar(name, names, 1)[0]
        except (OSError, IndexError):  # a file, a folder that cannot be read, or no name that is near
            return None
        found = there
    return found


def joined_by_or(words: Iterable[str]) -> str:
    """Return words as a list in a sentence: "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _lower_case(value: object) -> str:
    return str(value).lower()

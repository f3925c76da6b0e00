"""Read files of float weights without running code, and rename the layers that other libraries name differently."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from halfeven.errors import CheckpointError

MOBILENET_V2_REPEATS = (1, 2, 3, 4, 3, 3, 1)
"""Inverted residual blocks of each stage of MobileNetV2."""


def _mobilenet_v2_names() -> list[tuple[str, str, str]]:
    """List the names of each module of MobileNetV2 in timm, torchvision and OpenMMLab."""
    names = [
        ("conv_stem", "features.0.0", "conv1.conv"),
        ("bn1", "features.0.1", "conv1.bn"),
        ("conv_head", "features.18.0", "conv2.conv"),
        ("bn2", "features.18.1", "conv2.bn"),
        ("classifier", "classifier.1", "fc"),
    ]
    flat = 1
    for stage, repeats in enumerate(MOBILENET_V2_REPEATS):
        for block in range(repeats):
            # The first block has no expansion, so its depthwise convolution comes first.
            timm = ["conv_dw", "conv_pw"] if stage == 0 else ["conv_pw", "conv_dw", "conv_pwl"]
            last = len(timm) - 1
            for i, conv in enumerate(timm):
                in_timm = f"blocks.{stage}.{block}"
                in_torchvision = f"features.{flat}.conv"
                in_openmmlab = f"layer{stage + 1}.{block}.conv.{i}"
                # torchvision nests each convolution with its BatchNorm, except the last.
                vision = (f"{i}.0", f"{i}.1") if i < last else (f"{i}", f"{i + 1}")
                names.append((f"{in_timm}.{conv}", f"{in_torchvision}.{vision[0]}", f"{in_openmmlab}.conv"))
                names.append((f"{in_timm}.bn{i + 1}", f"{in_torchvision}.{vision[1]}", f"{in_openmmlab}.bn"))
            flat += 1
    return names


def _with_table(column: int, to: int) -> Callable[[str], str]:
    table = {row[column]: row[to] for row in _mobilenet_v2_names()}

    def rename(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        return f"{table.get(module, module)}.{leaf}"

    return rename


def _same(key: str) -> str:
    return key


RENAMINGS: dict[str, Callable[[str], str]] = {
    "as they are": _same,
    "MobileNetV2, torchvision to timm": _with_table(1, 0),
    "MobileNetV2, OpenMMLab to timm": _with_table(2, 0),
    "MobileNetV2, timm to torchvision": _with_table(0, 1),
    "MobileNetV2, OpenMMLab to torchvision": _with_table(2, 1),
}
"""Functions from a tensor's name in one library to its name in another. ResNets have the same names everywhere, once
OpenMMLab's two prefixes are removed."""

WRAPPERS = (("module.", ""), ("_orig_mod.", ""), ("backbone.", ""), ("head.fc.", "fc."))
"""Prefixes that DDP, torch.compile and OpenMMLab put before a model's own names -> their replacements."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a .pth / .pt file without unpickling any code.

    Raises:
        CheckpointError: the file is missing, of an unknown kind, or has more in it than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"There is no weights file {path}, so the model would start from random numbers. Give the path of an "
            'existing .safetensors or .pth file, "pretrained" for the library\'s own weights, or "" '
            "to start from random ones."
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}), so there are no weights for the model. Download or "
                "write it again."
            ) from error
    if path.suffix not in {".pth", ".pt", ".tar", ".bin"}:
        raise CheckpointError(
            f"The weights file {path} ends with {path.suffix or 'nothing'!r}, so its format is not known. Give a "
            ".safetensors file, or a .pth / .pt file written by torch.save."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"The weights file {path} cannot be read as tensors alone: {str(error).splitlines()[0]} Anything else in "
            "it would be code, which halfeven never runs. Load it where you trust it, and save its state_dict alone: "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.pth").'
        ) from error
    return _state_dict_of(content, path)


def _state_dict_of(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"The file {path} has no state_dict, so there are no weights for the model: it is neither a dict of "
            'tensors by name, nor has it one under "state_dict" or "model". Save model.state_dict() with torch.save.'
        )
    return dict(content)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load float weights into `model`, renaming timm's, torchvision's or OpenMMLab's names to the model's own.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not the model's; the message lists the differences.
    """
    written = read_weights(path)
    found = {_unwrap(key): tensor for key, tensor in written.items()}
    wanted = model.state_dict()
    # A detector has a "backbone" of its own, so the names may be right as they were written.
    candidates = [written, *({rename(key): one for key, one in found.items()} for rename in RENAMINGS.values())]
    best = min(candidates, key=lambda state: len(state.keys() ^ wanted.keys()))
    # Checkpoints from before BatchNorm counted its batches lack the counter, which has no effect on the model.
    for key in wanted.keys() - best.keys():
        if key.endswith("num_batches_tracked"):
            best[key] = wanted[key]
    problem = differences(best, wanted)
    if problem:
        raise CheckpointError(
            f"The weights of {path} are not the model's:\n{problem}\nLoading a part of them would leave the others "
            "random. Give a file of this architecture, with its number of classes and of input channels."
        )
    model.load_state_dict(best)


def _unwrap(key: str) -> str:
    for prefix, instead in WRAPPERS:
        if key.startswith(prefix):
            key = instead + key.removeprefix(prefix)
    return key


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor], shown: int = 8) -> str:
    """Return lines of missing, unexpected and differently shaped tensors; "" where two state dicts match."""
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    parts = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "another shape": shapes,
    }
    return "\n".join(
        f"  {title} ({len(keys)}): {', '.join(keys[:shown])}{', ...' if len(keys) > shown else ''}"
        for title, keys in parts.items()
        if keys
    )

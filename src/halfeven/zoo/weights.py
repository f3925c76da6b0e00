"""Read files of float weights without running code, and rename the layers that other libraries name differently."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from halfeven.errors import CheckpointError, HalfevenError, HalfevenWarning, named
from halfeven.integrity import check_facts, check_tensors, listed, wrong_values
from halfeven.nearest import did_you_mean_path
from halfeven.zoo.torch_files import read_torch_file

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


def _same_name(key: str) -> str:
    return key


RENAMINGS: dict[str, Callable[[str], str]] = {
    "as they are": _same_name,
    "MobileNetV2, torchvision to timm": _with_table(1, 0),
    "MobileNetV2, OpenMMLab to timm": _with_table(2, 0),
    "MobileNetV2, timm to torchvision": _with_table(0, 1),
    "MobileNetV2, OpenMMLab to torchvision": _with_table(2, 1),
}
"""Functions from a tensor's name in one library to its name in another. ResNets have the same names everywhere, once
OpenMMLab's two prefixes are removed."""

WRAPPERS = (("module.", ""), ("model.", ""), ("ema.", ""), ("backbone.", ""), ("head.fc.", "fc."))
"""Prefixes that DDP, Lightning, averages and OpenMMLab put before a model's own names -> their replacements."""
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names of torch.compile, FSDP and activation checkpointing, which may wrap any module of a model."""

ENTRIES = (
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
"""Keys of the weights in files of several libraries, the first of which is read if the user names none."""
TORCH_ENDINGS = (".pth", ".pt", ".ckpt", ".tar", ".bin")
"""Endings of the files of torch.save: ".ckpt" is Lightning's, ".bin" that of older transformers."""
STEP_COUNTERS = ("steps", "n_averaged")
"""Numbers of steps that mmengine and torch keep beside averaged weights, which are named "module.NAME" there."""
MAX_SHOWN_NAMES = 8
"""Largest number of names in a line of a message."""


def read_weights(path: str | Path, entry: str = "auto") -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a file of torch.save without running any code of it.

    Args:
        path: the file.
        entry: key of the weights in a .pth file that holds several; "auto": the first of `ENTRIES`, with a warning
            where there are further ones.

    Raises:
        CheckpointError: the file is missing, damaged, of an unknown kind, or has no weights in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"There is no weights file {path}, so the model would start from random numbers.{did_you_mean_path(path)} "
            'Give the path of an existing .safetensors or .pth file, "pretrained" for the library\'s own weights, or '
            '"" to start from random ones.'
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            check_facts(facts, path)
            check_tensors(tensors, facts, path)
            return tensors
        except (HalfevenError, MemoryError):
            raise
        except Exception as error:  # a damaged header meets whatever its reader stumbles over
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}), so there are no weights for the model. Download or "
                "write it again."
            ) from error
    if path.suffix not in TORCH_ENDINGS:
        raise CheckpointError(
            f"The weights file {path} ends with {path.suffix or 'nothing'!r}, so its format is not known. Give a "
            f".safetensors file, or a file written by torch.save that ends with {', '.join(TORCH_ENDINGS)}."
        )
    content, left_out = read_torch_file(path)
    tensors = _state_dict_of(content, path, entry, left_out)
    if left_out:
        warnings.warn(
            f"{path} holds objects of {named(left_out)} beside its weights. They were left out, because reading "
            "them would run code; the weights are whole.",
            HalfevenWarning,
            stacklevel=2,
        )
    return tensors


def _state_dict_of(content: Any, path: Path, entry: str, left_out: tuple[str, ...]) -> dict[str, Tensor]:
    found = [key for key in ENTRIES if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if entry != "auto" and not (isinstance(content, dict) and isinstance(content.get(entry), dict)):
        raise CheckpointError(
            f'{path} has no weights under "{entry}", as model.weights_entry asks. '
            f"{f'It has them under {_quoted_keys(found)}.' if found else 'Leave model.weights_entry out.'}"
        )
    if entry == "auto" and len(found) > 1:
        warnings.warn(
            f'{path} holds several sets of weights: {_quoted_keys(found)}. "{found[0]}" is read; set '
            'model.weights_entry to read another. (Averaged weights are under "state_dict" in mmengine\'s files, and '
            'under "state_dict_ema" or "model_ema" in those of timm and torchvision.)',
            HalfevenWarning,
            stacklevel=2,
        )
    if isinstance(content, dict) and (found or entry != "auto"):
        content = _innermost(content[found[0] if entry == "auto" else entry])
    if not isinstance(content, dict) or not content or not any(isinstance(v, Tensor) for v in content.values()):
        objects = f" It holds objects of {named(left_out)}, which only code can read." if left_out else ""
        raise CheckpointError(
            f"The file {path} has no state_dict, so there are no weights for the model: it is neither a dict of "
            f'tensors by name, nor has it one under "state_dict" or "model".{objects} Save model.state_dict() with '
            "torch.save."
        )
    content = {key: value for key, value in content.items() if not _is_step_counter(key, content)}
    # A tensor that code would have to make is none here.
    strange = [str(key) for key, one in content.items() if not (isinstance(key, str) and isinstance(one, Tensor))]
    if strange:
        raise CheckpointError(
            f"The state_dict in {path} holds {', '.join(strange[:MAX_SHOWN_NAMES])}, which are not plain tensors, so "
            "the weights are not whole. Convert them to tensors where the file was made."
        )
    return dict(content)


def _innermost(content: Any) -> Any:
    """Return the weights in an entry of a file: the average of some libraries holds them in an entry of its own."""
    while inner := [key for key in ENTRIES if isinstance(content, dict) and isinstance(content.get(key), dict)]:
        content = content[inner[0]]
    return content


def _is_step_counter(key: Any, content: dict[Any, Any]) -> bool:
    """Return True for a number of steps beside averaged weights, all of which are under "module." there."""
    before, _, last = str(key).rpartition(".")
    if last not in STEP_COUNTERS:
        return False
    beside = f"{before}." if before else ""
    others = [str(name) for name in content if str(name).startswith(beside) and name != key]
    counters = tuple(f"{beside}{name}" for name in STEP_COUNTERS)
    return all(name.startswith(f"{beside}module.") for name in others if name not in counters)


def _quoted_keys(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)


def load_weights(model: nn.Module, path: str | Path, entry: str = "auto") -> None:
    """Load float weights into `model`, renaming timm's, torchvision's or OpenMMLab's names to the model's own.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not the model's; the message lists the differences.
    """
    wanted = model.state_dict()
    written = _network_in(read_weights(path, entry), wanted, path)
    # A detector has a "backbone" of its own, and its names may be in wrappers: each level is a candidate.
    candidates = [
        {rename(key): one for key, one in level.items()}
        for level in _unwrapped_levels(written)
        for rename in RENAMINGS.values()
    ]
    # The names with the fewest differences are the right ones, or make the shortest message.
    best = min(candidates, key=lambda state: len(state.keys() ^ wanted.keys()))
    # Checkpoints from before BatchNorm counted its batches lack the counter, which has no effect on the model.
    for key in wanted.keys() - best.keys():
        if key.endswith("num_batches_tracked"):
            best[key] = wanted[key]
    problem = key_differences(best, wanted)
    if problem:
        raise CheckpointError(
            f"The weights of {path} are not the model's:\n{problem}\nLoading a part of them would leave the others "
            "random. Give a file of this architecture, with its number of classes and of input channels."
        )
    if wrong := wrong_values(best, wanted):
        raise CheckpointError(
            f"The weights of {path} cannot be used:\n{listed(wrong)}\nAll results would be NaN or wrong. Download the "
            "file again, or train the model again."
        )
    model.load_state_dict(best)


def _network_in(written: dict[str, Tensor], wanted: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the weights of the one module that has exactly the wanted names, with a warning of what is beside it.

    A training module holds a loss with weights, or metrics, beside its network. Where none or several have the names,
    all weights are returned.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in written.items():
        module, _, name = _without_inner_wrappers(key).partition(".")
        modules.setdefault(module, {})[name] = tensor
    fitting = [module for module, part in modules.items() if part.keys() == wanted.keys()]
    if len(fitting) != 1 or len(modules) == 1:
        return written
    beside = [f"{module}.{name}" for module, part in modules.items() if module != fitting[0] for name in part]
    warnings.warn(
        f"{path} holds tensors beside those of the model, which were left out: {named(beside)}.",
        HalfevenWarning,
        stacklevel=3,
    )
    return modules[fitting[0]]


def _unwrapped_levels(written: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return weights under the names as they were written, and without each of the wrappers that they were saved in."""
    plain = {_without_inner_wrappers(key): tensor for key, tensor in written.items()}
    levels = [written, plain]
    while True:
        peeled = _without_outermost(levels[-1])
        # Of two sets of weights, in wrappers of their own, neither may hide the other.
        if peeled.keys() == levels[-1].keys() or len(peeled) < len(written):
            return levels
        levels.append(peeled)


def _without_inner_wrappers(key: str) -> str:
    for part in INNER_WRAPPERS:
        key = key.replace(part, "")
    return key


def _without_outermost(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the module that all of them are in, or else without a library's prefix each."""
    outermost = {key.partition(".")[0] for key in state}
    if len(outermost) == 1 and all("." in key for key in state):
        return {key.partition(".")[2]: tensor for key, tensor in state.items()}
    return {_without_prefix(key): tensor for key, tensor in state.items()}


def _without_prefix(key: str) -> str:
    return next((instead + key.removeprefix(prefix) for prefix, instead in WRAPPERS if key.startswith(prefix)), key)


def key_differences(found: dict[str, Tensor], wanted: dict[str, Tensor], shown: int = MAX_SHOWN_NAMES) -> str:
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

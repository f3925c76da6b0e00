"""Checkpoints of quantized models: safetensors with the plan as JSON; no code of a file is ever run."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halfeven.errors import CheckpointError
from halfeven.files import write_atomically
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan
from halfeven.zoo.weights import differences

FORMAT = "1"


def save(qmodel: nn.Module, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a quantized model: its state dict, its plan, and the versions that wrote it.

    Args:
        extra: further JSON-able facts, such as the accuracy that was reached; `read_facts` gives them back.
    """
    facts = {"plan": json.dumps(plan_of(qmodel).to_dict()), "extra": json.dumps(extra or {})}
    write_tensors(qmodel.state_dict(), Path(path), facts)


def restore(path: str | Path, rebuild: Callable[[Plan], nn.Module]) -> nn.Module:
    """Make the quantized model of a checkpoint.

    Args:
        rebuild: makes the quantized model of a plan, with any weights, for the checkpoint's to be loaded into.

    Raises:
        CheckpointError: a file of something else, or of another model; the message lists what differs.
    """
    state, facts = read_tensors(Path(path))
    if "plan" not in facts:
        raise CheckpointError(
            f"{path} holds weights without a plan, so nothing says how they are quantized. Give a checkpoint that "
            "halfeven.save or a training run wrote (best.safetensors, last.safetensors); for float weights set "
            "model.weights."
        )
    qmodel = rebuild(Plan.from_dict(json.loads(facts["plan"])))
    load_strictly(qmodel, state, path)
    return qmodel


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict that must fit entirely.

    Raises:
        CheckpointError: it does not; the message lists what differs.
    """
    problem = differences(state, model.state_dict())
    if problem:
        raise CheckpointError(
            f"{path} is not a checkpoint of this model:\n{problem}\nLoading a part of it would give another model. "
            "Give the float model, number of classes and example input that it was trained with."
        )
    model.load_state_dict(state)


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts that were saved with a checkpoint: `plan`, `extra`, and the versions `halfeven` and `torch`."""
    facts: dict[str, Any] = dict(read_metadata(Path(path)))
    return facts | {key: json.loads(facts[key]) for key in ("plan", "extra") if key in facts}


def save_weights(model: nn.Module, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a float model's state dict."""
    write_tensors(model.state_dict(), path, {"extra": json.dumps(extra or {})})


def write_tensors(state: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """Write tensors and facts atomically. Tensors that are one and the same (tied weights) are written once."""
    names: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in names:
            same[name] = names[place]
        else:
            names[place] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
    versions = {"format": FORMAT, "halfeven": version("halfeven"), "torch": str(torch.__version__)}
    metadata = versions | {"same": json.dumps(same)} | facts
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """The JSON metadata of a safetensors file that halfeven wrote."""
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint {path}. Without it there is no quantized model. Give the path of a "
            "best.safetensors "
            "or last.safetensors in the --work-dir of a training run."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. No model can be made of it. "
            "Give a best.safetensors or last.safetensors (state.pt is for --resume alone)."
        ) from error
    if metadata.get("format") not in (FORMAT, "pt", None):
        raise CheckpointError(
            f"{path} has format {metadata['format']}, written by halfeven {metadata.get('halfeven', '?')}; this "
            "version reads "
            f"format {FORMAT}. Its parts would be misread. Load it with that version of halfeven."
        )
    return metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and facts of a file that `write_tensors` wrote."""
    metadata = read_metadata(path)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    for name, kept in json.loads(metadata.get("same", "{}")).items():
        state[name] = state[kept]
    return state, metadata

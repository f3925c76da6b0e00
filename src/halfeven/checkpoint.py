"""Read and write checkpoints of quantized models: safetensors with the plan as JSON, which cannot contain code."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import CheckpointError, HalfevenError
from halfeven.files import json_text, write_atomically
from halfeven.graph.wrappers import unwrapped
from halfeven.integrity import check_facts, check_tensors, listed, sealed, wrong_values
from halfeven.nearest import did_you_mean_path
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan
from halfeven.placement.plan_in_file import read_plan
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.stored_ranges import wrong_ranges
from halfeven.zoo.torch_files import is_torch_file
from halfeven.zoo.weights import key_differences

FORMAT = "1"
"""Version of the files' layout; a file of another version is refused."""

CONVERSIONS = {torch.bfloat16: nn.Module.bfloat16, torch.float16: nn.Module.half, torch.float64: nn.Module.double}


@checked_arguments(CheckpointError)
def save(qmodel: nn.Module, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a quantized model to a safetensors file: state dict, plan, versions that wrote it, and a digest of all.

    Args:
        qmodel: a model from `prepare`, `quantize` or `load`; it is saved without a wrapper such as `torch.compile`'s
            or DistributedDataParallel.
        path: the file; an existing file is replaced atomically, when the new file is complete.
        extra: further JSON-able facts, for example the accuracy reached; `read_facts` returns them, with None for NaN.

    Raises:
        CheckpointError: a bit schedule has not come down to the bits of the plan yet.
    """
    qmodel = unwrapped(qmodel)
    plan = plan_of(qmodel)
    _check_bits(qmodel, plan)
    facts = {"plan": json_text(plan.to_dict()), "extra": json_text(extra or {})}
    write_tensors(qmodel.state_dict(), Path(path), facts)


def _check_bits(qmodel: nn.Module, plan: Plan) -> None:
    planned = {weight.quantizer_name: weight.scheme.bits for weight in plan.weights}
    planned |= {tensor.quantizer_name: tensor.scheme.bits for tensor in plan.tensors}
    for quantizer in quantizers(qmodel).values():
        bits = planned.get(quantizer.name, quantizer.scheme.bits)
        if bits != quantizer.scheme.bits:
            raise CheckpointError(
                f"{quantizer.name} has {quantizer.scheme.bits} bits at present, and {bits} in the plan, by which the "
                "file would be read: its scales would belong to another grid. Save the model when the stages with more "
                "bits (qat.progress) are over."
            )


def restore(path: str | Path, rebuild: Callable[[Plan], nn.Module]) -> nn.Module:
    """Return the quantized model of a checkpoint.

    Args:
        path: a file that `save` wrote.
        rebuild: returns the quantized model of a plan, with any weights; the weights of the file are loaded into it.

    Raises:
        CheckpointError: the file is no such checkpoint, is damaged, or belongs to another model; the message lists the
            differences.
    """
    # First what is in the file, then the model that its plan describes, then whether both fit.
    state, facts = read_tensors(Path(path))
    if "plan" not in facts:
        raise CheckpointError(
            f"{path} has weights without a plan, so it does not say how they are quantized. Give a checkpoint that "
            "halfeven.save or a training run wrote (best.safetensors, last.safetensors). For float weights, set "
            "model.weights."
        )
    qmodel = _rebuild_checked(read_plan(facts["plan"], Path(path)), rebuild, path)
    _convert_like(qmodel, state)
    load_strictly(qmodel, without_own_tensors(state, qmodel), path)
    if problems := wrong_ranges(qmodel):
        raise _unusable_values(path, problems)
    return qmodel


def _convert_like(qmodel: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model the precision of the weights in a file, in place, where all of them are in one: after `bfloat16()`.

    A model is made in float32. Scales stay so, whatever the precision of the weights.
    """
    scales = tuple(f"{name}." for name in quantizers(qmodel))
    names = [name for name, p in qmodel.named_parameters() if p.is_floating_point() and not name.startswith(scales)]
    found = {state[name].dtype for name in names if name in state}
    if len(found) == 1 and (convert := CONVERSIONS.get(found.pop())) is not None:
        convert(qmodel)


def without_own_tensors(state: dict[str, Tensor], qmodel: nn.Module) -> dict[str, Tensor]:
    """Return a state dict without the tensors that quantizers of the user's own classes have beyond `Quantizer`'s.

    A file contains no code, so such a quantizer is a plain one after loading: its range is all that its integers need.
    """
    found = {f"{name}.": module.state_dict() for name, module in quantizers(qmodel).items() if module.own_class}

    def is_own(key: str) -> bool:
        return any(key.startswith(path) and key[len(path) :] not in kept for path, kept in found.items())

    return {key: tensor for key, tensor in state.items() if not is_own(key)}


def _rebuild_checked(plan: Plan, rebuild: Callable[[Plan], nn.Module], path: str | Path) -> nn.Module:
    try:
        return rebuild(plan)
    except HalfevenError:
        raise
    except Exception as error:  # a plan for another model meets whatever its graph stumbles over
        raise CheckpointError(
            f"The plan in {path} cannot be followed in this model ({type(error).__name__}: {error}), so its weights "
            "have no place. Give the float model and the example input that it was trained with."
        ) from error


def _unusable_values(path: str | Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} holds values that no quantized model has, so its results would mean nothing:\n{listed(problems)}\n"
        "The file was changed after it was written, or training had failed before. Use another checkpoint."
    )


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict that must have exactly the model's names and shapes.

    Args:
        path: the file that the state dict comes from, for the message.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or a value cannot be; the message lists them.
    """
    wanted = model.state_dict()
    problem = key_differences(state, wanted)
    if problem:
        raise CheckpointError(
            f"{path} is not a checkpoint of this model:\n{problem}\nLoading a part of its weights would make another "
            "model. Give the float model, number of classes and example input that it was trained with."
        )
    # `load_state_dict` would convert dtypes without a word.
    dtypes = [(key, tensor.dtype, wanted[key].dtype) for key, tensor in state.items()]
    if others := [f"{key} is {found} instead of {right}" for key, found, right in dtypes if found != right]:
        raise CheckpointError(
            f"{path} holds tensors of other dtypes than the model:\n{listed(others)}\nConverted, they would be other "
            "numbers. Give the float model in the precision of the file: model.float() or model.bfloat16()."
        )
    if problems := wrong_values(state, wanted):
        raise _unusable_values(path, problems)
    model.load_state_dict(state)


@checked_arguments(CheckpointError)
def read_facts(path: str | Path) -> dict[str, Any]:
    """Return the facts saved with a checkpoint: `plan`, `extra`, and the versions of `halfeven` and `torch`."""
    facts: dict[str, Any] = dict(read_metadata(Path(path)))
    return facts | {key: _parse_json(facts[key], key, path) for key in ("plan", "extra") if key in facts}


def _parse_json(text: str, key: str, path: str | Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its {key} is not JSON ({type(error).__name__}). Use another checkpoint."
        ) from error


def save_weights(model: nn.Module, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a float model's state dict to a safetensors file, with JSON-able facts about it."""
    write_tensors(model.state_dict(), path, {"extra": json_text(extra or {})})


def write_tensors(state: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """Write tensors and facts atomically.

    Tied weights, which are the same tensor under several names, are written once.
    """
    # Not `safetensors.torch.save_model`: it leaves out each tensor that shares memory with a written tensor, even a
    # different part or layout of it, and only a model with the same sharing can read its file.
    names: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in state.items():
        # Tensors in the same memory, with the same layout, are one tensor under two names.
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in names:
            same[name] = names[place]
        else:
            names[place] = name
            # A contiguous copy: safetensors refuses tensors that share memory, as the parts of one weight do.
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
    versions = {"format": FORMAT, "halfeven": version("halfeven"), "torch": str(torch.__version__)}
    metadata = sealed(tensors, versions | {"same": json.dumps(same)} | facts)
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, JSON by key; {} for a file of another library.

    Raises:
        CheckpointError: there is no such file, it is damaged, or another version of halfeven wrote it.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint {path}, so there is no quantized model.{did_you_mean_path(path)} Give the path of "
            "a best.safetensors or last.safetensors in the --work-dir of a run."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        if is_torch_file(path):
            raise CheckpointError(
                f"{path} is not a whole safetensors file: torch.save wrote it, so it is no checkpoint of a quantized "
                "model. Give a best.safetensors or last.safetensors. (Float weights belong to model.weights, and "
                "state.pt to --resume.)"
            ) from error
        raise CheckpointError(
            f"{path} is not a whole safetensors file, so it cannot be loaded: {error}. Give a best.safetensors or "
            "last.safetensors."
        ) from error
    # Other libraries write "pt" or nothing there.
    if metadata.get("format") not in (FORMAT, "pt", None):
        raise CheckpointError(
            f"{path} has format {metadata['format']}, written by halfeven {metadata.get('halfeven', '?')}; this "
            f"version reads format {FORMAT} and would misread it. Load it with the version that wrote it."
        )
    check_facts(metadata, path)
    return metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, by name, and the facts of a file that `write_tensors` wrote.

    Raises:
        CheckpointError: there is no such file, it is damaged, or another version of halfeven wrote it.
    """
    metadata = read_metadata(path)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        check_tensors(state, metadata, path)
        for name, kept in json.loads(metadata.get("same", "{}")).items():
            state[name] = state[kept]
    except (HalfevenError, MemoryError):
        raise
    except Exception as error:  # a damaged header meets whatever its reader stumbles over
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}), so it cannot be loaded. Use another checkpoint."
        ) from error
    return state, metadata

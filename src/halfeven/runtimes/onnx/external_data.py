"""ONNX models that are larger than a protobuf message may be: their tensors lie in a file beside the model's."""

from pathlib import Path
from typing import Any

from halfeven.files import replacing

LARGEST_PROTO = 2_000_000_000
"""Bytes of tensors that one file may hold: a protobuf message ends at 2 GiB, and its nodes need a little."""

SUFFIX = ".data"
"""Ending of the file of tensors, behind the model's name."""


def needed(model: Any) -> bool:
    """Return True for an `onnx_ir.Model` whose tensors do not fit in one file."""
    values = (value.const_value for value in model.graph.initializers.values())
    size: int = sum(tensor.nbytes for tensor in values if tensor is not None)
    return size > LARGEST_PROTO


def write(model: Any, path: Path, save: Any) -> None:
    """Write a model and, first, the file of its tensors: a reader never finds a model without its tensors.

    Args:
        model: an `onnx_ir.Model`; its tensors are those in the file afterwards.
        path: where the model's file goes.
        save: checks the model and writes its own file at a path beside the tensors.
    """
    from onnx_ir import external_data

    tensors = path.with_name(path.name + SUFFIX)
    with replacing(tensors, path) as folder:
        external_data.unload_from_model(model, folder, tensors.name)
        save(folder / path.name)

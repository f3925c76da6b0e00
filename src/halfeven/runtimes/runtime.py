"""The runtimes that can be asked: one way to run a file and to learn what was executed, whatever the target."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfeven.deployment.exported_program import example_of
from halfeven.errors import ConfigError
from halfeven.evaluation import evaluating
from halfeven.runtimes.layer_execution import Executed
from halfeven.runtimes.onnxruntime.session import ONNXRuntimeFile, TensorRTFile
from halfeven.runtimes.openvino.session import OpenVINOFile


class DeployedFile(Protocol):
    """A file opened in its runtime, on the CPU, with what is not integer in float32."""

    runtime: str
    """The runtime's name."""

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors asked for that the file has."""
        ...

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The model's outputs, of the file as it runs when no tensor is asked for; and the tensors asked for by name,
        of a second run: to be outputs keeps operators from being fused."""
        ...

    def executed_layers(self, layers: Sequence[str]) -> list[Executed]:
        """What the runtime made of each named layer; "unknown" where it does not mention one."""
        ...

    def executed_products(self) -> list[Executed]:
        """What the runtime made of the products of two activations."""
        ...

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """The integer weights that the file holds for the named layers, in the order of the model's."""
        ...

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """A function that does nothing but compute the model on these inputs."""
        ...


RUNTIMES: dict[str, Callable[[Path, Sequence[str]], DeployedFile]] = {
    "openvino": OpenVINOFile,
    "onnxruntime": ONNXRuntimeFile,
    "tensorrt": TensorRTFile,
}
"""Target -> what opens its files."""


def open_deployed(path: str | Path, target: str, tensors: Sequence[str] = ()) -> DeployedFile:
    """Open a file in its target's runtime, with the named tensors at hand besides its outputs.

    Raises:
        ConfigError: a target without a runtime.
        VerificationError: no such file, or none that the runtime can read.
    """
    if target not in RUNTIMES:
        raise ConfigError(f'There is no runtime "{target}". Choose one of {", ".join(RUNTIMES)}.')
    return RUNTIMES[target](Path(path), tensors)


def load_deployed(path: str | Path, target: str = "openvino", qmodel: nn.Module | None = None) -> Callable[..., Any]:
    """A deployed file as a function from tensors to tensors, on the CPU.

    Args:
        path: an `.xml` or `.onnx` file.
        target: the runtime to run it in.
        qmodel: the model that the file was written from: the function then takes inputs by name as it does, and returns
            outputs in the same dicts, lists or classes.

    Returns:
        A function of the model's inputs; without `qmodel` they are given in their order, and it returns one tensor, or
        a tuple where the model has several outputs.
    """
    opened = open_deployed(path, target)
    names, leaves, form = _form_of(qmodel) if qmodel is not None else ((), (), None)

    def run(*inputs: Tensor, **named: Tensor) -> Any:
        outputs, _ = opened.run([*inputs, *(named[name] for name in names if name in named)])
        if form is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        given = iter(outputs)
        return pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)

    return run


def _form_of(qmodel: nn.Module) -> tuple[tuple[str, ...], list[Any], pytree.TreeSpec]:
    """The names of a model's keyword inputs, and what it returns: the parts, and what holds them."""
    args, kwargs = example_of(qmodel)
    with torch.no_grad(), evaluating(qmodel):
        leaves, form = pytree.tree_flatten(copy.deepcopy(qmodel).cpu()(*args, **kwargs))
    return tuple(kwargs), leaves, form

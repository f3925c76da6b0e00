"""One row per runtime: its rules, the files that it reads, how a model is prepared for it, and how it is run.

This file alone imports the runtimes' folders: a new runtime is its folder, its target and its row.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.deployment.deployed import Deployed
from halfeven.deployment.exported_program import example_of
from halfeven.deployment.file_interface import FloatPrecision
from halfeven.errors import ConfigError, VerificationError
from halfeven.evaluation import evaluating
from halfeven.graph.copying import copy_model
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.nearest import did_you_mean
from halfeven.runtimes.cpu import adds_pairs_in_16_bits
from halfeven.runtimes.deployed_inputs import model_arguments, tensors_in_order
from halfeven.runtimes.layer_execution import KernelTime, LayerExecution
from halfeven.runtimes.onnx import writer as onnx_writer
from halfeven.runtimes.onnx.file import read as read_onnx
from halfeven.runtimes.onnx.interface import facts_in
from halfeven.runtimes.onnx.literal import LiteralInterpreter
from halfeven.runtimes.onnxruntime import passes as onnxruntime_passes
from halfeven.runtimes.onnxruntime import writer as onnxruntime_writer
from halfeven.runtimes.onnxruntime.exact import ONNXRuntimeInterpreter
from halfeven.runtimes.onnxruntime.session import ONNXRuntimeFile
from halfeven.runtimes.openvino import passes as openvino_passes
from halfeven.runtimes.openvino import writer as openvino_writer
from halfeven.runtimes.openvino.exact import OpenVINOInterpreter
from halfeven.runtimes.openvino.exact_values import LOST_ZERO_POINT
from halfeven.runtimes.openvino.session import OpenVINOFile
from halfeven.runtimes.simulation import Simulation
from halfeven.runtimes.tensorrt import passes as tensorrt_passes
from halfeven.runtimes.tensorrt import writer as tensorrt_writer
from halfeven.runtimes.tensorrt.session import TensorRTFile
from halfeven.targets.onnxruntime import ONNXRUNTIME
from halfeven.targets.openvino import OPENVINO
from halfeven.targets.target import Target
from halfeven.targets.tensorrt import TENSORRT


class DeployedFile(Protocol):
    """A file opened in its runtime, on the CPU, with what is not integer in the precision that the file says."""

    runtime: str
    """The runtime's name."""

    settings: Sequence[str]
    """The settings of the runtime that the file needs, as `name=value`; those that its default session lacks."""

    float_precision: FloatPrecision
    """The precision, of what stays float, that the file was written for and is run with."""

    @property
    def threads(self) -> int:
        """The number of threads that compute a sample; 0 where the runtime does not say."""
        ...

    @property
    def input_names(self) -> list[str]:
        """The names of the model's inputs, in their order."""
        ...

    @property
    def tensors(self) -> list[str]:
        """The names of the requested tensors that the file has."""
        ...

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the model's outputs, of the file as users run it, and the requested tensors by name.

        The tensors are those of a second run: a tensor that is an output keeps operators from being fused.
        """
        ...

    def run_with(self, settings: Collection[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the model's outputs in a session with these of `settings` alone; with none, the default session."""
        ...

    def executed_layers(self, layers: Sequence[str]) -> list[LayerExecution]:
        """Return the execution of each named layer; precision "unknown" where the runtime mentions none."""
        ...

    def executed_products(self) -> list[LayerExecution]:
        """Return the executions of the products of two activations."""
        ...

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the integer weights of the named layers in the file, in the order of the model's weights."""
        ...

    def timed(self, inputs: Sequence[Tensor], settings: Collection[str] | None = None) -> Callable[[], object]:
        """Return a function that computes the model on these inputs, and does nothing else.

        With `settings`, in a session with these of `settings` alone; with none, in the default session.
        """
        ...

    def kernel_times(self, inputs: Sequence[Tensor], runs: int = 10) -> list[KernelTime]:
        """Return the runtime's own profile of some runs, kernel by kernel; empty where it is not run here."""
        ...


Writer = Callable[[torch.export.ExportedProgram, Deployed, Path], None]
"""Writes the program of a deployed model as one file."""

Interpreter = Callable[[CapturedModule, Simulation], fx.Interpreter]
"""Makes what computes a captured region of a deployed model; the integers of its quantizers go to the simulation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """All facts about a runtime. Each stands in the runtime's row; a default is that of a runtime that computes what is
    not integer in float32."""

    target: Target
    """The operators that it executes in integers, and where it wants quantizers."""
    writers: Mapping[str, Writer]
    """Ending of a file that it reads -> the writer of such files; the usual ending comes first."""
    clips_integers: bool
    """Grids of fewer than 8 bits are clipped in integers, by an operator that the writer adds; else in float, by an
    operator of the model."""
    prepare_graph: Callable[[Deployed], None]
    """Gives the graph of a deployed model the form that the runtime's optimizer needs, in place."""
    open_file: Callable[..., DeployedFile]
    """Opens a file by its path, with the named tensors at hand besides its outputs, in a session with the settings that
    the file lists; with `float_precision="f32"`, in one with those of float32."""
    exact: Interpreter | None
    """Computes the runtime's integers exactly; None where its arithmetic is not specified."""
    settings: Sequence[str]
    """Settings that a session needs to compute what was verified, as `name=value`; the file lists them."""
    sums_in_16_bits: Callable[[], bool]
    """True where the runtime's kernels, on this processor, add pairs of 8-bit products in 16 bits."""
    settings_of_own_precision: Sequence[str] | None = None
    """Settings of a session that computes what is not integer in the precision of the runtime's choice; None where the
    runtime has float32 alone."""
    round_to_file: Callable[[Deployed], None] | None = None
    """Rounds a deployed model, in place, to the precision that its file holds in place of float32; None where the
    precision is the session's choice."""

    lowest_end_taken_for_0: float = 0.0
    """A range whose lower end is negative and nearer to 0 than this has no zero point in the runtime."""

    def settings_for(self, precision: FloatPrecision) -> Sequence[str]:
        """Return the settings that a file of this precision lists.

        Raises:
            ConfigError: the runtime computes what is not integer in float32 alone.
        """
        if precision == "f32":
            return self.settings
        if self.settings_of_own_precision is None:
            raise ConfigError(
                f'float_precision="runtime" leaves the precision of float operators to {self.name}, which computes '
                'them in float32 alone, so nothing would change. Use float_precision="f32".'
            )
        return self.settings_of_own_precision

    @property
    def name(self) -> str:
        """The name that users write: the target's name."""
        return self.target.name

    @property
    def interpreter(self) -> Interpreter:
        """The exact arithmetic; where it is not specified, ONNX's definitions of the operators."""
        return self.exact or LiteralInterpreter

    def check_ending(self, path: Path) -> None:
        """Refuse a file with an ending that the runtime does not read.

        Raises:
            ConfigError: it has one; the message names the runtimes that read it.
        """
        if path.suffix in self.writers:
            return
        readers = [name for name, row in RUNTIMES.items() if path.suffix in row.writers]
        raise ConfigError(
            f'The file "{path}" ends with "{path.suffix}", which {self.name} cannot read, so it could not '
            f"be run. Name a file with {' or '.join(self.writers)}"
            + (f", or the target that reads this one: {' or '.join(readers)}." if readers else ".")
        )


RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime(
            target=OPENVINO,
            lowest_end_taken_for_0=LOST_ZERO_POINT,
            writers={".xml": openvino_writer.write, ".onnx": onnx_writer.write},
            clips_integers=False,
            prepare_graph=openvino_passes.prepare_graph,
            open_file=OpenVINOFile,
            exact=OpenVINOInterpreter,
            settings=OpenVINOFile.settings,
            sums_in_16_bits=adds_pairs_in_16_bits,
            settings_of_own_precision=OpenVINOFile.settings_of_own_precision,
        ),
        Runtime(
            target=ONNXRUNTIME,
            writers={".onnx": onnxruntime_writer.write},
            clips_integers=True,
            prepare_graph=onnxruntime_passes.prepare_graph,
            open_file=ONNXRuntimeFile,
            exact=ONNXRuntimeInterpreter,
            settings=ONNXRuntimeFile.settings,
            sums_in_16_bits=adds_pairs_in_16_bits,
            settings_of_own_precision=ONNXRuntimeFile.settings_of_own_precision,
        ),
        Runtime(
            target=TENSORRT,
            writers={".onnx": tensorrt_writer.write},
            clips_integers=False,
            prepare_graph=tensorrt_passes.prepare_graph,
            open_file=TensorRTFile,
            exact=None,  # TensorRT reserves the order of its float operations
            settings=(),
            sums_in_16_bits=lambda: False,  # its file is evaluated in float, not run
            settings_of_own_precision=(),
            round_to_file=tensorrt_passes.round_to_half,
        ),
    )
}
"""The runtimes by name."""


def runtime_named(name: str) -> Runtime:
    """Return the runtime of a name.

    Raises:
        ConfigError: there is no such runtime.
    """
    if name not in RUNTIMES:
        raise ConfigError(
            f'There is no runtime "{name}", so nothing says how to quantize for it. {did_you_mean(name, RUNTIMES)}'
        )
    return RUNTIMES[name]


def runtime_of_file(path: Path, target: str | None, otherwise: str | None = None) -> Runtime:
    """Return the runtime of a deployed file: the one that it was written for.

    Args:
        path: the file.
        target: the runtime's name as the user gives it; None: as the file says.
        otherwise: the runtime of a file that does not say it; None: the first that reads such files.

    Raises:
        ConfigError: there is no such runtime, it does not read files with this ending, or the file is for another.
    """
    written_for = target_in_file(path)
    runtime = runtime_named(target or written_for or otherwise or next(iter([*_readers(path), *RUNTIMES])))
    runtime.check_ending(path)
    if written_for not in (None, runtime.name):
        raise ConfigError(
            f"{path} was written for {written_for}, and target names {runtime.name}, whose files have another form, so "
            f'it would not be run as it was meant. Leave target out, or export the model with target="{runtime.name}".'
        )
    return runtime


def _readers(path: Path) -> list[str]:
    return [name for name, row in RUNTIMES.items() if path.suffix in row.writers]


def target_in_file(path: Path) -> str | None:
    """Return the runtime that a file was written for; None where it does not say it, or is not there.

    Raises:
        VerificationError: the file is damaged.
    """
    readers = _readers(path)
    if not path.is_file() or not readers:
        return None
    # Files that several runtimes read are ONNX, and say it.
    return readers[0] if len(readers) == 1 else facts_in(read_onnx(path)).get("target")


@checked_arguments(VerificationError)
def load_deployed(path: str | Path, target: str | None = None, qmodel: nn.Module | None = None) -> Callable[..., Any]:
    """Return a deployed file as a function from tensors to tensors, on the CPU, with the settings that it needs.

    Threads may call the function at once; each call gets the outputs of its own inputs.

    Args:
        path: an `.xml` or `.onnx` file.
        target: the runtime to run it in; None: the one that the file was written for.
        qmodel: the model that the file was written from: the function then takes inputs as it does, by name, in lists
            and dicts, and returns outputs in the same dicts, lists or classes.

    Returns:
        A function of the model's inputs, by position or by name; without `qmodel` names are the file's, and it returns
        one tensor, or a tuple where the model has several outputs.

    Raises:
        ConfigError: there is no such runtime, it does not read files with this ending, or the file is for another.
        VerificationError: there is no such file, or the runtime cannot read it; in a call: it does not take the inputs.
    """
    runtime = runtime_of_file(Path(path), target)
    opened = runtime.open_file(Path(path), ())
    leaves, form = _output_form(qmodel) if qmodel is not None else ((), None)
    # With the model at hand inputs are taken by its names and in its form, not by the file's.
    taken = dict.fromkeys(opened.input_names) if qmodel is None else model_arguments(qmodel, opened.input_names)

    @checked_arguments(VerificationError)
    def run(*inputs: Any, **named: Any) -> Any:
        outputs, _ = opened.run(tensors_in_order(inputs, named, taken, path))
        if form is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        # A file has the tensors alone: what else the model returns is that of the example.
        given = iter(outputs)
        return pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)

    return run


def _output_form(qmodel: nn.Module) -> tuple[list[Any], pytree.TreeSpec]:
    """Return a model's outputs for its example: the leaves, and the structure that holds them."""
    args, kwargs = example_of(qmodel)
    with torch.no_grad(), evaluating(qmodel):
        leaves, form = pytree.tree_flatten(copy_model(qmodel).cpu()(*args, **kwargs))
    return leaves, form

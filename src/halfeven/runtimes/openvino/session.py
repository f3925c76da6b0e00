"""OpenVINO: running a deployed file on the CPU, and reading its integers."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfeven.deployment.file_interface import FloatPrecision
from halfeven.deployment.quantize_op import WEIGHT_SUFFIX
from halfeven.errors import VerificationError, last_line
from halfeven.nearest import did_you_mean_path
from halfeven.runtimes.layer_execution import KernelTime, LayerExecution
from halfeven.runtimes.onnx.file import read as read_onnx
from halfeven.runtimes.onnx.interface import float_precision_in as onnx_float_precision
from halfeven.runtimes.openvino.executed import executed_layers, executed_products, kernel_times, layer_of
from halfeven.runtimes.openvino.interface import GROUP_SIZE, float_precision_in
from halfeven.runtimes.openvino.telemetry import silently
from halfeven.runtimes.openvino.writer import LAYER_TYPES, convert
from halfeven.temporary import temporary_folder

SETTINGS = {"EXECUTION_MODE_HINT": "ACCURACY"}
"""Without it the plugin computes in bfloat16 what is not integer, and quantizes the inputs of some linear layers on its
own: nothing could be compared."""


@functools.cache
def _core() -> Any:
    """Return the only `openvino.Core` of the process.

    Where there is AVX-512 each one's plugin gives its thread a stack for signal handlers (sigaltstack). Of several that
    end in another order than the reverse of their making one that is freed stays, and the next signal that Python
    handles is a segmentation fault: Ctrl-C, or a data loader's worker that ends.
    """
    import openvino

    return openvino.Core()


@silently()
def read(path: str | Path) -> Any:
    """Return the `openvino.Model` of a file.

    Raises:
        VerificationError: no such file, or none that OpenVINO can read.
    """
    path = Path(path)
    if not path.is_file():
        raise VerificationError(
            f"There is no file {path} to run.{did_you_mean_path(path)} Write it with halfeven.export(qmodel, path)."
        )
    try:
        return _core().read_model(path)
    except RuntimeError as error:
        weights = path.with_suffix(".bin")
        if "bin file" in str(error) and not weights.is_file():
            raise VerificationError(
                f"{path} has its weights in {weights.name}, which is not beside it, so it cannot be run. Copy both "
                "files."
            ) from error
        raise VerificationError(
            f"OpenVINO cannot read {path}: {last_line(error)} The file is damaged or of another "
            "kind: write it again with halfeven.export(qmodel, path)."
        ) from error


@silently()
def as_file(model: Any) -> Any:
    """Return a converted model as OpenVINO reads it from a file: with integer weights."""
    import openvino

    with temporary_folder() as folder:
        path = folder / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        # In memory: a file that is mapped cannot be removed everywhere.
        return _core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


@silently()
def compile_model(model: Any, config: Mapping[str, str] | None = None) -> Any:
    """Return a model ready to run on the CPU, in float32 where it is not integer unless `config` says otherwise.

    Raises:
        VerificationError: OpenVINO has no kernel for the model.
    """
    try:
        return _core().compile_model(model, "CPU", dict(SETTINGS if config is None else config))
    except RuntimeError as error:
        raise VerificationError(
            f"OpenVINO reads the model and cannot compile it: {last_line(error)} So it cannot be run. Write the file "
            "again with halfeven.export(qmodel, path); if that does not help, leave the named operator in float with a "
            "Rule, and report this message."
        ) from error


def run_compiled(compiled: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return all outputs of a compiled model as tensors of their own; threads may call it at once.

    Each call has a request of its own: the one that a compiled model shares holds the tensors of a single call.

    Raises:
        VerificationError: the model does not take these inputs.
    """
    request = compiled.create_infer_request()
    _check_indices(compiled, inputs)
    try:
        # Inputs are read where they lie. Outputs lie in the request's memory, so they are copied below.
        result = request.infer([np.asarray(x.detach().cpu().numpy(), order="C") for x in inputs], share_inputs=True)
    except (RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in inputs)
        taken = ", ".join(
            f"{port.get_any_name()} {port.get_element_type().get_type_name()} {port.get_partial_shape()}"
            for port in compiled.inputs
        )
        raise VerificationError(
            f"OpenVINO cannot run the file on these inputs ({given}): {last_line(error)} It takes {taken}. Give the "
            "inputs that the model was prepared with, of the sizes that are free in the file."
        ) from error
    return [torch.from_numpy(np.array(result[i])) for i in range(len(compiled.outputs))]


def _check_indices(compiled: Any, inputs: Sequence[Tensor]) -> None:
    """Refuse numbers in the place of indices, which the runtime would cut off without a word."""
    for port, x in zip(compiled.inputs, inputs, strict=False):
        if x.is_floating_point() and port.get_element_type().is_integral():
            kind = port.get_element_type().get_type_name()
            raise VerificationError(
                f'The input "{port.get_any_name()}" is of {kind} in the file, and was given {x.dtype}, whose fractions '
                f"would be lost. Give a tensor of integers."
            )


def function_of(program: torch.export.ExportedProgram) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]:
    """Return the first output of a program without quantizers as a function, which the runtime computes, of its inputs.

    Constants are the program's own: the plugin makes other kernels where they are not known.
    """
    compiled = compile_model(convert(program, []))
    return lambda inputs, constants: run_compiled(compiled, inputs)[0]


def request_with(compiled: Any, inputs: Sequence[Tensor]) -> Any:
    """Return an `openvino.InferRequest` whose inputs are set: `request.infer()` computes and does nothing else."""
    import openvino

    request = compiled.create_infer_request()
    for index, x in enumerate(inputs):
        request.set_input_tensor(index, openvino.Tensor(np.array(x.detach().numpy(), order="C")))
    return request


def with_outputs(model: Any, names: Sequence[str]) -> dict[str, int]:
    """Make the named tensors outputs of a model, after its own; return the numbers of their outputs by name.

    A tensor that the model returns has the output's name alone: it is found by the name of the operator that makes it.
    """
    ports = [port for node in model.get_ordered_ops() for port in node.outputs()]
    found = {port.get_node().get_friendly_name(): port for port in ports}
    # Where a tensor and an operator have the same name, the tensor is meant.
    found |= {name: port for port in ports for name in port.get_names()}
    return {name: _output_of(model, found[name]) for name in names if name in found}


def _output_of(model: Any, port: Any) -> int:
    """Return the number of a model's output of this tensor, which is added where there is none."""
    readers = [reader.get_node() for reader in port.get_target_inputs()]
    # A tensor that the model returns is an output already.
    own = [reader.get_name() for reader in readers if reader.get_type_name() == "Result"]
    if not own:
        model.add_outputs(port)
        return len(model.outputs) - 1
    return [result.get_name() for result in model.get_results()].index(own[0])


def products_of(model: Any) -> set[str]:
    """Return the names of a model's products of two activations: neither factor is made of constants alone."""
    computed: set[str] = set()  # from the model's inputs
    found = set()
    for node in model.get_ordered_ops():
        sources = [port.get_source_output().get_node().get_name() in computed for port in node.inputs()]
        if any(sources) or node.get_type_name() == "Parameter":
            computed.add(node.get_name())
        if node.get_type_name() == "MatMul" and all(sources):
            found.add(layer_of(node.get_friendly_name()))
    return found


def stored_integers(model: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the integer weights of the named layers in a file.

    The converter renames a layer whose BatchNorm stands in another part of the model, when it merges the two: the
    weight of such a layer is returned under the layer's new name.
    """
    found: dict[str, Tensor] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in LAYER_TYPES:
            continue
        names = [layer_of(node.get_friendly_name())]
        source = node.input_value(1).get_node()
        while source.get_type_name() != "Constant" and source.get_input_size():
            # The ONNX front end names a transposed convolution anew; its weight keeps the name it had.
            names.append(source.get_friendly_name().removesuffix(WEIGHT_SUFFIX))
            source = source.input_value(0).get_node()
        layer = next((name for name in names if name in layers), node.get_friendly_name())
        if source.get_type_name() == "Constant" and source.get_element_type().is_integral_number():
            integers = torch.from_numpy(_integers(source))
            # A MatMul has its weight as [inputs, outputs] unless it transposes it; the model's layers have [outputs,
            # inputs].
            turned = node.get_type_name() == "MatMul" and not node.get_attributes()["transpose_b"]
            found[layer] = integers.t() if turned and integers.ndim == 2 else integers
    return found


def _integers(constant: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the values of a constant of integers; two of 4 bits lie in a byte, the first in its lower half."""
    values = np.array(constant.get_data())
    if constant.get_element_type().get_type_name() == "i4":
        # To the left and back: the shift to the right repeats the sign of the lower half.
        halves = np.stack([values.view(np.int8) << 4 >> 4, values.view(np.int8) >> 4], axis=-1)
        values = halves.reshape(-1)[: int(np.prod(constant.shape))].reshape(tuple(constant.shape))
    return values.astype(np.float32)


def _float_precision(path: Path, model: Any) -> FloatPrecision:
    """Return the precision that a file says; the runtime does not hand out the facts of an ONNX file."""
    return onnx_float_precision(read_onnx(path)) if path.suffix == ".onnx" else float_precision_in(model)


def _config(settings: Collection[str]) -> dict[str, str]:
    """Return settings, each `name=value`, as a compiled model takes them."""
    return dict(setting.split("=", 1) for setting in settings)


class OpenVINOFile:
    """A file opened in OpenVINO; see `halfeven.runtimes.runtime.DeployedFile`."""

    runtime = "OpenVINO"
    settings: Sequence[str] = tuple(f"{name}={value}" for name, value in SETTINGS.items())
    settings_of_own_precision: Sequence[str] = (f"{GROUP_SIZE}=0",)

    def __init__(self, path: Path, tensors: Sequence[str] = (), float_precision: FloatPrecision | None = None) -> None:
        self.path = path
        opened = read(path)
        self.float_precision = float_precision or _float_precision(path, opened)
        if self.float_precision == "runtime":
            self.settings = self.settings_of_own_precision
        self.config = _config(self.settings)
        self.output_index = with_outputs(opened, tensors)
        self.compiled = compile_model(opened, self.config)

    @property
    def input_names(self) -> list[str]:
        return [port.get_any_name() for port in self.compiled.inputs]

    @property
    def threads(self) -> int:
        """The number of threads of a request."""
        return int(self.compiled.get_property("INFERENCE_NUM_THREADS"))

    @property
    def tensors(self) -> list[str]:
        return list(self.output_index)

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        outputs = run_compiled(self.plain, inputs)
        if not self.output_index:
            return outputs, {}
        watched = run_compiled(self.compiled, inputs)
        return outputs, {name: watched[index] for name, index in self.output_index.items()}

    def run_with(self, settings: Collection[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        return run_compiled(compile_model(read(self.path), _config(settings)), inputs)

    def executed_layers(self, layers: Sequence[str]) -> list[LayerExecution]:
        return executed_layers(self.plain, layers)

    def executed_products(self) -> list[LayerExecution]:
        return executed_products(self.plain, products_of(read(self.path)))

    def kernel_times(self, inputs: Sequence[Tensor], runs: int = 10) -> list[KernelTime]:
        counting = compile_model(read(self.path), self.config | {"PERF_COUNT": "YES"})
        return kernel_times(counting, request_with(counting, inputs), runs)

    @functools.cached_property
    def plain(self) -> Any:
        """The file as users run it: further outputs would keep operators from being fused."""
        return self.compiled if not self.output_index else compile_model(read(self.path), self.config)

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        return stored_integers(read(self.path), layers)

    def timed(self, inputs: Sequence[Tensor], settings: Collection[str] | None = None) -> Callable[[], object]:
        compiled = self.compiled if settings is None else compile_model(read(self.path), _config(settings))
        request = request_with(compiled, inputs)
        return lambda: request.infer(share_inputs=True, share_outputs=True)  # no copy of either is timed

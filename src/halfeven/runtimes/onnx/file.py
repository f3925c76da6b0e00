"""ONNX files: opening them, running them in ONNX Runtime, and reading the weights that they hold."""

import importlib
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfeven.deployment.file_interface import FloatPrecision
from halfeven.deployment.quantize_op import WEIGHT_SUFFIX
from halfeven.errors import VerificationError, last_line
from halfeven.nearest import did_you_mean_path
from halfeven.runtimes.cpu import physical_cores
from halfeven.runtimes.onnx.interface import float_precision_in

WEIGHT_BIAS = "disabled_optimizers=WeightBiasQuantization"
"""This optimizer quantizes layers that the plan leaves in float."""

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level=1"
"""Products of weights alone stay in float32; by default the runtime quantizes their inputs too."""

SETTINGS = (WEIGHT_BIAS, ACCURACY_LEVEL)
"""The settings that keep a session to its file, as `name=value`."""

BFLOAT16_PRODUCTS = "mlas.enable_gemm_fastmath_arm64_bfloat16=1"
"""Products in float may be computed in bfloat16, by ARM processors under Linux: x86 has no such kernel."""

OPTIMIZED_TENSORS = "session.optimized_model_external_initializers_file_name"
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def onnxruntime() -> Any:
    """Import ONNX Runtime, with its telemetry off unless the user has decided about it.

    It reads the variable when it is imported. Without it, it keeps a device's id and a queue of events in the user's
    home, and sends them to its makers.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


def read(path: Path) -> Any:
    """Return the ONNX model of a file; tensors that lie in a file beside it stay there.

    Raises:
        VerificationError: there is no such file, or it is incomplete.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise VerificationError(
            f"There is no file {path} to run.{did_you_mean_path(path)} Write it with halfeven.export(qmodel, path)."
        )
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
        _names(model.graph)  # a damaged name shows when it is read
    except (DecodeError, onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise VerificationError(
            f"{path} is not a complete ONNX file: {last_line(error)} It is incomplete, damaged or "
            "of another format, so it cannot be run. Write it again with halfeven.export(qmodel, path)."
        ) from error
    return model


def session(
    model: Any,
    *,
    folder: Path | None = None,
    optimized: Path | None = None,
    literal: bool = False,
    settings: Collection[str] = SETTINGS,
    profile: Path | None = None,
) -> Any:
    """Return a session on the CPU.

    Args:
        model: an `onnx.ModelProto`.
        folder: where the tensors lie that are not in the model itself.
        optimized: where the optimized graph is written.
        literal: no optimizer at all: every operator as it is written, in float.
        settings: those of `SETTINGS` that are made, which keep to the file, and `BFLOAT16_PRODUCTS`.
        profile: how the name of the file begins that the session's profile is written to, if it is.

    Raises:
        VerificationError: ONNX Runtime cannot run the model.
    """
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    # Errors only: the optimizer warns about things that no user can act on.
    options.log_severity_level = 3
    if literal:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # Its tensors beside it, since they may be too many for one file.
        options.add_session_config_entry(OPTIMIZED_TENSORS, f"{optimized.name}.data")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if folder is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(folder.resolve()))
    # Two of the settings are entries of the session's options; WeightBiasQuantization is an optimizer, which is
    # disabled by its name.
    for entry in (ACCURACY_LEVEL, BFLOAT16_PRODUCTS):
        if entry in settings:
            options.add_session_config_entry(*entry.split("="))
    disabled = [WEIGHT_BIAS.split("=")[1]] if WEIGHT_BIAS in settings else []
    try:
        return runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # its exceptions have no common class
        raise VerificationError(
            f"ONNX Runtime cannot load the file: {last_line(error)} So it cannot be run. Write it again with "
            "halfeven.export(qmodel, path); if that does not help, report this message."
        ) from error


def _names(graph: Any) -> list[str]:
    """Return all names in a graph."""
    named = (*graph.node, *graph.initializer, *graph.input, *graph.output)
    tensors = (name for node in graph.node for name in (*node.input, *node.output))
    return [*(one.name for one in named), *tensors]


class ONNXFile:
    """An ONNX file opened in ONNX Runtime: what is common to all `DeployedFile`s of this format."""

    settings: Sequence[str] = SETTINGS
    settings_of_own_precision: Sequence[str] = (*SETTINGS, BFLOAT16_PRODUCTS)
    literal = False
    """No optimizer at all: every operator is evaluated as it is written, in float."""

    def __init__(self, path: Path, tensors: Sequence[str] = (), float_precision: FloatPrecision | None = None) -> None:
        import onnx

        self.path = path
        self.model = read(path)
        self.float_precision = float_precision or float_precision_in(self.model)
        if self.float_precision == "runtime":
            self.settings = self.settings_of_own_precision
        graph = self.model.graph
        self.own_outputs = [output.name for output in graph.output]
        made = {name for node in graph.node for name in node.output}
        self.tensors = [name for name in tensors if name in made]
        asked = onnx.ModelProto()
        asked.CopyFrom(self.model)
        for name in self.tensors:
            if name not in self.own_outputs:
                # The optimizer may rename or remove any tensor that is no output of the graph, so watched tensors
                # become outputs.
                asked.graph.output.append(onnx.helper.make_tensor_value_info(name, _float_type(self.model), None))
        self.watched = self._session(asked)
        # More outputs than its own keep operators from being fused: this is what users run.
        self.session = self.watched if self.literal or not self.tensors else self._session(self.model)
        self.input_names = [found.name for found in self.session.get_inputs()]

    def _session(self, model: Any) -> Any:
        return session(model, folder=self.path.parent, literal=self.literal, settings=self.settings)

    @property
    def threads(self) -> int:
        """The number of threads of an operator."""
        return int(self.session.get_session_options().intra_op_num_threads) or physical_cores()

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        outputs = self._computed(self.session, self.own_outputs, inputs)
        tensors = self._computed(self.watched, self.tensors, inputs) if self.tensors else []
        # Inside a file of float16 the watched tensors have its type.
        return outputs, {name: x.float() for name, x in zip(self.tensors, tensors, strict=True)}

    def run_with(self, settings: Collection[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        opened = session(self.model, folder=self.path.parent, settings=settings)
        return self._computed(opened, self.own_outputs, inputs)

    def _computed(self, opened: Any, names: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            return [torch.from_numpy(x) for x in opened.run(names, self._fed(inputs))]
        except Exception as error:  # its exceptions have no common class
            given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in inputs)
            taken = ", ".join(f"{found.name} {found.type} {found.shape}" for found in opened.get_inputs())
            raise VerificationError(
                f"ONNX Runtime cannot run {self.path} on these inputs ({given}): {last_line(error)} It takes {taken}. "
                "Give the inputs that the model was prepared with, of the sizes that are free in the file."
            ) from error

    def _fed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {name: x.detach().cpu().numpy() for name, x in zip(self.input_names, inputs, strict=True)}

    def stored_integers(self, layers: Sequence[str]) -> dict[str, Tensor]:
        return stored_integers(self.model, layers, self.path.parent)

    def timed(self, inputs: Sequence[Tensor], settings: Collection[str] | None = None) -> Callable[[], object]:
        opened = self.session
        if settings is not None:
            opened = session(self.model, folder=self.path.parent, settings=settings, literal=self.literal)
        # Inputs and outputs are bound once, so that a timed call copies nothing from or to Python.
        binding = opened.io_binding()
        for name, x in self._fed(inputs).items():
            binding.bind_cpu_input(name, np.asarray(x, order="C"))  # a number keeps its zero axes
        for name in self.own_outputs:
            binding.bind_output(name, "cpu")
        return lambda: opened.run_with_iobinding(binding)


def _float_type(model: Any) -> int:
    """Return the type of the tensors behind DequantizeLinear, which is that of the scales."""
    import onnx

    types = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    scales = (types.get(node.input[1]) for node in model.graph.node if node.op_type == "DequantizeLinear")
    return next((found for found in scales if found is not None), onnx.TensorProto.FLOAT)


def stored_integers(model: Any, layers: Sequence[str], folder: Path = Path()) -> dict[str, Tensor]:
    """Return the integer weights of the named layers, in the order of the model's weights.

    Args:
        model: an `onnx.ModelProto`.
        layers: their names.
        folder: where the tensors lie that are not in the model itself.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    found: dict[str, Tensor] = {}
    for node in model.graph.node:
        layer = node.name.removesuffix(WEIGHT_SUFFIX)
        if layer == node.name or layer not in layers or node.input[0] not in constants:
            continue
        integers = torch.from_numpy(numpy_helper.to_array(constants[node.input[0]], str(folder)).astype(np.float32))
        reader = readers[node.output[0]]
        # torch's linear weight is [outputs, inputs]. MatMul reads [inputs, outputs], and Gemm does unless transB is
        # set.
        turned = reader.op_type == "MatMul" or (reader.op_type == "Gemm" and not _is_set(reader, "transB"))
        found[layer] = integers.t() if turned and integers.ndim == 2 else integers
    return found


def _is_set(node: Any, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)

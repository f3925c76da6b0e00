"""Make old module names importable for this version, with a warning that names the new place."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MOVED = {
    "arithmetic": "quantization.arithmetic",
    "choice": "decision",
    "commands": "cli",
    "commands.checkpoints": "cli.test",
    "commands.delivery": "cli.deliver",
    "commands.float_model": "cli.float_model",
    "commands.ptq": "cli.ptq",
    "commands.task": "cli.task",
    "commands.training": "cli.train",
    "commands.work": "cli.run",
    "compilation": "quantization.compile",
    "export.deployment": "deployment.deployed",
    "export.exact": "runtimes.exact_model",
    "export.exact_onnxruntime": "runtimes.onnxruntime.exact",
    "export.exact_openvino": "runtimes.openvino.exact",
    "export.executed": "runtimes.layer_execution",
    "export.exporting": "runtimes.export",
    "export.float_operators": "runtimes.float_operators",
    "export.forms": "runtimes.onnxruntime.passes",
    "export.integer_layers": "runtimes.integer_layers",
    "export.integer_share": "verification.integer_macs",
    "export.latency": "verification.latency",
    "export.onnx": "runtimes.onnx.writer",
    "export.onnx_runtime": "runtimes.onnxruntime.session",
    "export.openvino": "runtimes.openvino.writer",
    "export.openvino_runtime": "runtimes.openvino.session",
    "export.operators": "deployment.quantize_op",
    "export.processor": "runtimes.cpu",
    "export.report": "verification.report",
    "export.runtime": "runtimes.runtime",
    "export.simulation": "runtimes.simulation",
    "export.sums": "runtimes.openvino.residual_add",
    "export.telemetry": "runtimes.openvino.telemetry",
    "export.tensors": "runtimes.openvino.exact_values",
    "export.verify": "verification.verify",
    "fake_quantization": "quantization.fake_quantize",
    "graph.lowering": "graph.rewrite",
    "graph.mutation": "graph.functionalize",
    "graph.restoration": "graph.rebuild",
    "observers": "quantization.observers",
    "observers.extremes": "quantization.observers.minmax",
    "observers.histogram": "quantization.observers.histogram",
    "observers.logits": "quantization.observers.cross_entropy",
    "observers.search": "quantization.observers.search",
    "placement.changes": "placement.graph_edits",
    "placement.demands": "placement.requests",
    "placement.fusion": "placement.execution_graph",
    "placement.layers": "placement.quantized_layers",
    "placement.live_folding": "placement.folded_batchnorm",
    "placement.planning": "placement.make_plan",
    "placement.rescaling": "placement.channel_affine",
    "placement.targets": "runtimes.runtime",
    "ptq.absorption": "ptq.equalization.bias_absorption",
    "ptq.cache": "layerwise.cache",
    "ptq.calibration": "layerwise.calibrate",
    "ptq.distributions": "ptq.data_free.moments",
    "ptq.gaussian": "ptq.data_free.calibrate",
    "ptq.learning": "ptq.reconstruction.optimize",
    "ptq.links": "ptq.equalization.layer_pairs",
    "ptq.norms": "ptq.transformers.layernorms",
    "ptq.preservation": "layerwise.float_equivalence",
    "ptq.products": "ptq.reconstruction.conv_as_matmul",
    "ptq.propagation": "ptq.data_free.moment_propagation",
    "ptq.resumption": "ptq.reconstruction.resume",
    "ptq.rounding": "ptq.reconstruction.adaround",
    "ptq.smoothing": "ptq.transformers.smoothing",
    "ptq.steps": "ptq.pipeline",
    "ptq.streams": "layerwise.activations",
    "ptq.units": "layerwise.blocks",
    "qat.averaging": "qat.ema",
    "qat.batchnorm": "qat.batchnorm_schedule",
    "qat.course": "qat.session",
    "qat.progression": "qat.bit_schedule",
    "quantizer": "quantization.quantizer",
    "scheme": "quantization.scheme",
    "tasks.detectors": "tasks.detection_by_library",
    "training.checkpoint": "checkpoint",
    "zoo.dense": "zoo.detection_segmentation",
    "zoo.detectors": "zoo.tensor_part",
    "zoo.splits": "zoo.leakage",
}
"""Old name -> new name, both below `halfeven`."""

EXPORT = {
    "Report": "verification.report",
    "exact": "runtimes.exact_model",
    "export": "runtimes.export",
    "load_deployed": "runtimes.runtime",
    "verify": "verification.verify",
}
"""Name in the old folder `export` -> the module that has it now."""


def install() -> None:
    """Register the old names with the import system, when halfeven is imported."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedFinder())  # `halfeven.observers` is a folder with files of the same names
    # As a loaded module: if the import system loaded it on demand, it would overwrite the function `halfeven.export`.
    sys.modules.setdefault("halfeven.export", _OldExport("halfeven.export"))


class _OldExport(ModuleType):
    """The folder `halfeven.export` of version 0.1."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system would overwrite the function with the module `halfeven.export.exact`.
        if name not in EXPORT:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in EXPORT:
            raise AttributeError(f"module 'halfeven.export' has no attribute '{name}'")
        _warn_of_move(f"halfeven.export.{name}", f"halfeven.{EXPORT[name]}.{name}")
        return getattr(importlib.import_module(f"halfeven.{EXPORT[name]}"), name)


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a moved module from its new place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old module name, None for every other name."""
        package, _, name = fullname.partition(".")
        if package != "halfeven" or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the module in its new place."""
        new = f"halfeven.{MOVED[spec.name.partition('.')[2]]}"
        _warn_of_move(spec.name, new)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module, which is already loaded, its own spec back."""
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, module.__loader__)


def _warn_of_move(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the next version removes the old name. Import options from halfeven.config, and the "
        "public functions from halfeven.",
        DeprecationWarning,
        stacklevel=2,
    )

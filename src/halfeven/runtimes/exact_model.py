"""The exact simulation: a deployed model computed with the target's own integer arithmetic.

Products of integers are summed exactly; the requantization follows the runtime's formulas, in its order of float32
operations (`exact_openvino`, `exact_onnxruntime`). Functions that the runtime computes in float it computes here, too
(`float_operators`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import PlacementError
from halfeven.graph.rebuild import CapturedModule
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import regions
from halfeven.runtimes.export import exportable
from halfeven.runtimes.onnxruntime.exact import LiteralInterpreter, ONNXRuntimeInterpreter
from halfeven.runtimes.openvino.exact import OpenVINOInterpreter
from halfeven.runtimes.simulation import Simulation

INTERPRETERS: dict[str, Callable[[CapturedModule, Simulation], fx.Interpreter]] = {
    "openvino": OpenVINOInterpreter,
    "onnxruntime": ONNXRuntimeInterpreter,
    "tensorrt": LiteralInterpreter,
}
"""Target -> what computes a region as it does."""

SPECIFIED = ("openvino", "onnxruntime")
"""Targets whose integers are known; TensorRT reserves the order of its float operations."""


def exact(qmodel: nn.Module, target: str | None = None) -> "ExactModel":
    """A quantized model as its runtime computes it, integer for integer: a module to evaluate, called like the model.

    It runs on the CPU and has no gradients. What the runtime computes in float (a GELU, a normalization) it is asked
    for, operator by operator: the last bits are its own. After a call, `levels` holds the integers of every quantizer
    by name. The file is simulated as it runs for users; where its tensors are watched, single integers may be others.

    Args:
        qmodel: a calibrated model; it is not changed.
        target: the runtime; None: the one that the model was made for.

    Raises:
        CalibrationError: a range is not set yet.
        PlacementError: a target whose arithmetic is not specified.
    """
    target = target or plan_of(qmodel).options.target
    if target not in SPECIFIED:
        raise PlacementError(
            f"{target} does not specify the order of its float operations, so no exact simulation of it exists. The "
            f"quantized model itself is the closest. Exact targets: {', '.join(SPECIFIED)}."
        )
    return ExactModel(exportable(qmodel, target)[0], target)


class ExactModel(nn.Module):
    """A deployed model whose captured regions compute as the target does; called like the model.

    `simulation` says how, and keeps what was computed.
    """

    def __init__(self, exported: nn.Module, target: str = "openvino") -> None:
        super().__init__()
        self.target = target
        self.simulation = Simulation()
        found = regions(exported)
        if "" in found:
            exported = self._exact(found[""])
        else:
            for name, region in found.items():
                parent, _, attribute = name.rpartition(".")
                setattr(exported.get_submodule(parent), attribute, self._exact(region))
        self.model = exported

    @property
    def levels(self) -> dict[str, Tensor]:
        """The integers of every quantizer, by its name, after a call."""
        return self.simulation.levels

    def _exact(self, region: CapturedModule) -> "_ExactRegion":
        return _ExactRegion(region, INTERPRETERS[self.target](region, self.simulation))

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.simulation.begin()
        return self.model(*args, **kwargs)


class _ExactRegion(nn.Module):
    def __init__(self, region: CapturedModule, interpreter: fx.Interpreter) -> None:
        super().__init__()
        self.region = region
        self.interpreter = [interpreter]  # in a list: it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        codegen = self.region.graph._codegen
        flat = self.region.flat_inputs(*args, **kwargs)
        result = self.interpreter[0].run(*flat, enable_io_processing=False)
        return codegen.process_outputs(result)

"""The exact simulation: a deployed model computed with the target's own integer arithmetic.

Products of integers are summed exactly; the requantization follows the runtime's formulas, in its order of float32
operations (`exact.py` in the runtime's folder). Functions that the runtime computes in float it computes here, too
(`float_operators`).
"""

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.deployment.deployed import Deployed
from halfeven.errors import InputError, PlacementError
from halfeven.graph.inline import without_autocast
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.size_relations import check_call
from halfeven.graph.torch_private import pytree
from halfeven.placement.make_plan import regions
from halfeven.runtimes.deploy import deploy, runtime_of
from halfeven.runtimes.runtime import RUNTIMES, Interpreter
from halfeven.runtimes.simulation import Simulation


@checked_arguments(PlacementError)
def exact(qmodel: nn.Module, target: str | None = None) -> "ExactModel":
    """Return the exact simulation of a quantized model: a module called like it, with its runtime's own integers.

    It runs on the CPU and has no gradients. Operators that the runtime computes in float (a GELU, a normalization) are
    run in the runtime itself, because the last bits depend on its kernels. After a call, `codes` holds the integers of
    every quantizer by name. The file is simulated as it runs for users; where its tensors are watched, single integers
    may differ.

    Args:
        qmodel: a calibrated model; it is not changed.
        target: the runtime; None: the one that the model was made for.

    Raises:
        CalibrationError: a range is not set yet.
        PlacementError: a target whose arithmetic is not specified.
    """
    runtime = runtime_of(qmodel, target)
    if runtime.exact is None:
        specified = [row.name for row in RUNTIMES.values() if row.exact is not None]
        raise PlacementError(
            f"{runtime.name} does not specify the order of its float operations, so no exact simulation of it exists. "
            f"The quantized model itself is the closest. Exact targets: {', '.join(specified)}."
        )
    return ExactModel(deploy(qmodel, runtime), runtime.interpreter)


class ExactModel(nn.Module):
    """A deployed model whose captured regions compute as the target does; called like the model.

    `simulation` says how, and keeps what was computed.

    Args:
        deployed: the model, whose regions are exchanged in place.
        interpreter: makes what computes a region.
    """

    def __init__(self, deployed: Deployed, interpreter: Interpreter) -> None:
        super().__init__()
        self.simulation = Simulation()
        model = deployed.model
        found = regions(model)
        for name, region in found.items():
            exact_region = _ExactRegion(region, interpreter(region, self.simulation))
            if not name:
                # The region is the whole model.
                model = exact_region
                break
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, exact_region)
        self.model = model

    @property
    def codes(self) -> dict[str, Tensor]:
        """The integers of every quantizer, by its name, after a call."""
        return self.simulation.codes

    @property
    def levels(self) -> dict[str, Tensor]:
        """The old name of `codes`."""
        warnings.warn(
            "ExactModel.levels is ExactModel.codes now; the old name goes with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.codes

    @checked_arguments(InputError)
    @without_autocast()  # it computes in float32, as the file does
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.simulation.begin(pytree.tree_leaves((args, kwargs)))
        return self.model(*args, **kwargs)


class _ExactRegion(nn.Module):
    def __init__(self, region: CapturedModule, interpreter: fx.Interpreter) -> None:
        super().__init__()
        self.region = region
        self.interpreter = [interpreter]  # in a list: it is no submodule

    def __getattr__(self, name: str) -> Any:
        """Return a part of the region, which Python code outside of it may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not set yet, as in a copy that is being made: to look it up again would never end.
            if name == "region":
                raise
            return getattr(self.region, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.region.flat_inputs(*args, **kwargs)
        check_call(self.region, flat)
        # The values are those of the placeholders already: torch.fx must not flatten them once more.
        result = self.interpreter[0].run(*flat, enable_io_processing=False)
        return self.region.graph.process_outputs(result)

"""The float simulation, which is what was trained, with the integers of each of its quantizers at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.torch_private import pytree
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Quantizer
from halfeven.verification.outputs import named_outputs


class FloatSimulation:
    """A quantized model, run as it was trained.

    Args:
        qmodel: the model.
        calls: quantizer of the model -> names of the tensors that it quantizes, in the order of the graph.
        grids: the quantizers of the deployed model by the names of their tensors.
    """

    def __init__(
        self, qmodel: nn.Module, calls: Mapping[str, Sequence[str]], grids: Mapping[str, ExportedQuantizer]
    ) -> None:
        self.qmodel = qmodel
        self.calls = calls
        self.grids = grids

    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], given: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the outputs and the integers of each tensor, by name, on the CPU.

        Args:
            args: positional inputs.
            kwargs: keyword inputs.
            given: real values that replace those of the named tensors, so that each layer is computed alone.
        """
        codes: dict[str, Tensor] = {}
        with self._recording_codes(codes, given or {}):
            outputs = outputs_of(self.qmodel, args, kwargs)
        return outputs, codes

    @contextmanager
    def _recording_codes(self, codes: dict[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[None]:
        handles = [
            quantizer.register_forward_hook(self._recording_hook(self.calls[name], codes, given))
            for name, quantizer in quantizers(self.qmodel).items()
            if name in self.calls
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _recording_hook(
        self, names: Sequence[str], codes: dict[str, Tensor], given: Mapping[str, Tensor]
    ) -> Callable[..., Any]:
        # A shared quantizer is called once for each of its tensors, in the order of the graph, which is that of
        # `names`.
        waiting = iter(names)

        def hook(module: Quantizer, inputs: Any, output: Tensor) -> Tensor | None:
            name = next(waiting)
            codes[name] = codes_of(output.cpu().float(), self.grids[name])
            if name not in given:
                return None
            # A mean over positions keeps or loses their axes: the runtime's form may be another than the model's.
            return given[name].reshape(output.shape).to(output)

        return hook


def outputs_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the outputs of a model by name, on the CPU, for inputs on any device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (tuple(args), dict(kwargs)))
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    return {name: output.cpu() for name, output in named_outputs(outputs).items()}


def codes_of(real: Tensor, quantizer: ExportedQuantizer) -> Tensor:
    """Return the integers of real numbers on a quantizer's grid, counted from the smallest integer of its type."""
    # The numbers lie on the grid already: to round takes away no more than the error of the division.
    return torch.round(real / quantizer.scale) + quantizer.zero_point - (-128 if quantizer.signed else 0)

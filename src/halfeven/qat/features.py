"""The outputs of named layers of a model, kept at each forward pass for distillation to compare."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfeven.errors import AlgorithmError, ConfigError
from halfeven.graph.view import module_calls
from halfeven.nearest import did_you_mean
from halfeven.placement.make_plan import regions
from halfeven.quantization.quantizer import Quantizer


class Features:
    """Keeps the last outputs of some layers of a model."""

    def __init__(self, model: nn.Module, whose: str, wanted: tuple[str, ...], *, with_gradients: bool) -> None:
        layers = _called_layers(model) if wanted else {}
        self.whose = whose
        self.with_gradients = with_gradients
        self.names = [_resolve_layer(name, layers, whose) for name in wanted]
        # A container and its last layer are two names of one tensor.
        if len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"distillation.features={list(wanted)} are the layers {self.names} of the {whose}, one of them twice, "
                "which would count double. Name each layer once."
            )
        self.modules = [layers[name] for name in self.names]
        self.store: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def open(self) -> None:
        for name, module in zip(self.names, self.modules, strict=True):
            self.handles.append(module.register_forward_hook(_Catch(self.store, name, self.with_gradients)))

    def take(self) -> list[Tensor]:
        missing = [name for name in self.names if name not in self.store]
        if missing:
            raise AlgorithmError(
                f"The {self.whose} gave nothing at {', '.join(missing)}, so there is no feature to compare: it was not "
                f"run{' with gradients' if self.with_gradients else ''} before the loss, it runs without calling that "
                "module, or that module gives no tensor, or the distillation was closed. Call loss(...) once after "
                "each forward pass of the student, and name a layer that is called."
            )
        found = [self.store[name] for name in self.names]
        self.store.clear()
        return found

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.store.clear()


class _Catch:
    """A forward hook that keeps a layer's output. A copy of it, made with the layer, does nothing."""

    def __init__(self, store: dict[str, Tensor] | None, name: str, with_gradients: bool) -> None:
        self.store = store
        self.name = name
        self.with_gradients = with_gradients

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # Validation needs no features. The mode does not tell (a frozen layer is in eval mode); gradients do.
        if self.store is None or (self.with_gradients and not torch.is_grad_enabled()):
            return
        if isinstance(output, Tensor):
            self.store[self.name] = output.clone()  # a later `ReLU(inplace=True)` may change it

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Catch":
        # A copied model (the average of the weights, a checkpoint) must not write into the store of this distillation.
        return _Catch(None, self.name, self.with_gradients)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Catch, (None, self.name, self.with_gradients)


def _called_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with parameters or statistics that a model calls, by name, in the order of their last calls.

    Where a model is Python, its calls are not known beforehand: there all modules count.
    """
    captured = regions(model)
    found: dict[str, nn.Module] = {}
    for prefix, region in captured.items():
        inside: dict[str, nn.Module] = {}
        for call in module_calls(region.graph):
            if _is_layer(call.module):
                name = f"{prefix}.{call.path}" if prefix else call.path
                inside.pop(name, None)  # the last call of a layer decides on its place
                inside[name] = call.module
        # A layer that was captured on its own is a graph that calls no module.
        found |= inside or {prefix: region}
    for name, module in model.named_modules():
        if name and _is_layer(module) and not any(f"{name}.".startswith(f"{p}." if p else "") for p in captured):
            found[name] = module
    return found


def _is_layer(module: nn.Module) -> bool:
    return not isinstance(module, Quantizer) and any(True for _ in chain(module.parameters(), module.buffers()))


def _resolve_layer(name: str, layers: dict[str, nn.Module], whose: str) -> str:
    """Return the name of a layer, or for a container the name of the last layer in it."""
    inside = [layer for layer in layers if layer.startswith(f"{name}.")]
    if name not in layers and not inside:
        # Containers of the layers too, so that the message can suggest them.
        parents = {layer.rsplit(".", depth)[0] for layer in layers for depth in range(1, layer.count(".") + 1)}
        several = f"There are {', '.join(list(layers)[:8])}, ..."
        raise ConfigError(
            f'distillation.features names "{name}", and the {whose} calls no layer with parameters of that name or '
            "inside of it, so there is nothing to compare (a folded BatchNorm is part of the layer before). "
            f"{did_you_mean(name, [*layers, *sorted(parents)], most=3, otherwise=several)}"
        )
    found = name if name in layers else inside[-1]
    live: Any = getattr(layers[found], "live_norms", ())
    if live:
        norm = next((other for other, layer in layers.items() if layer is live[0]), "its BatchNorm")
        raise ConfigError(
            f'distillation.features names "{name}", that is {found}, whose outputs have the factor of the BatchNorm '
            "that is folded into it in each step. The teacher's outputs do not have it, so the two would never match. "
            f"Name {norm} instead."
        )
    return found

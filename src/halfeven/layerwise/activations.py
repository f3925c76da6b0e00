"""Activations on their way through a model, unit by unit, kept within a bound of memory.

A stream holds, for every batch, the tensors that the next units will read. Each unit is run once per batch, and what
nothing reads any more is let go; so the work grows with the number of layers, not with its square, and the memory with
the tensors that are alive at one place of the graph.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from halfeven.errors import AlgorithmError
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import module_of
from halfeven.layerwise.blocks import Unit
from halfeven.layerwise.cache import Cache, Stored
from halfeven.quantization.quantizer import Mode, Quantizer, quantizers, set_mode

Values = dict[fx.Node, Any]
Call = Callable[[nn.Module, tuple[Any, ...]], Any]


def run_module(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """A module on its arguments, as it stands."""
    return module(*args)


class Stream:
    """The tensors that cross from unit to unit, for each batch, in one version of the model (float or quantized).

    Args:
        batches: the stored arguments, (args, kwargs), that the region is called with, for each batch.
        cache: where the tensors are kept.
        device: where units are run.
    """

    def __init__(self, region: CapturedModule, batches: Sequence[Stored], cache: Cache, device: torch.device) -> None:
        self.region, self.cache, self.device = region, cache, device
        self.placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
        self.batches = list(batches)
        self.values: list[dict[fx.Node, Stored]] = [{} for _ in batches]

    def inputs(self, unit: Unit, batch: int) -> Values:
        """What a unit reads, for a batch, on the stream's device."""
        values: Values = {}
        if any(node.op == "placeholder" for node in unit.inputs):
            args, kwargs = self.batches[batch].load()
            values = dict(zip(self.placeholders, self.region.flat_inputs(*args, **kwargs), strict=True))
        found = {n: values[n] if n in values else self.values[batch][n].load() for n in unit.inputs}
        return self._on_device(found)

    def outputs(self, unit: Unit, batch: int) -> Values:
        """What a unit gave, for a batch, after `advance`."""
        return self._on_device({node: self.values[batch][node].load() for node in unit.outputs})

    def _on_device(self, values: Values) -> Values:
        if self.device.type == "cpu":  # where they are stored
            return values
        moved: Values = pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), values)
        return moved

    @torch.no_grad()
    def advance(self, unit: Unit, call: Call = run_module) -> None:
        """Run a unit on every batch and keep what it gives; `call` as for `run`."""
        for batch, values in enumerate(self.values):
            for node, value in run(unit, self.inputs(unit, batch), call).items():
                values[node] = self.cache.store(pytree.tree_map_only(Tensor, lambda t: t.cpu(), value))

    @torch.no_grad()
    def visit(self, unit: Unit, call: Call) -> None:
        """Run a unit on every batch for what `call` sees; the stream stays before it."""
        for batch in range(len(self.values)):
            run(unit, self.inputs(unit, batch), call)

    def forget(self, done: Iterable[Unit]) -> None:
        """Let go of what only these units, which have been dealt with, read."""
        inside = {node for unit in done for node in unit.nodes}
        for values in self.values:
            for node in [n for n in values if all(user in inside for user in n.users)]:
                del values[node]


def run(unit: Unit, values: Values, call: Call = run_module) -> Values:
    """Run a unit's nodes on the values that it reads; the values of its outputs.

    Args:
        call: runs a module on its arguments, where something else than the module itself shall be run.
    """
    known = dict(values)

    def look_up(node: fx.Node) -> Any:
        return _attribute(node) if node.op == "get_attr" else known[node]

    for node in unit.nodes:
        args = fx.node.map_arg(node.args, look_up)
        kwargs = fx.node.map_arg(node.kwargs, look_up)
        known[node] = call(module_of(node), args) if node.op == "call_module" else node.target(*args, **kwargs)  # type: ignore[operator]
    return {node: known[node] for node in unit.outputs}


def _attribute(node: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def streams(qmodel: nn.Module, prefix: str, inputs: Sequence[Stored], cache: Cache) -> tuple[Stream, Stream]:
    """The float and the quantized stream of a region, at its start.

    Args:
        inputs: the arguments of the model, batch by batch, as `store_inputs` gives them.
    """
    region: Any = qmodel.get_submodule(prefix)
    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    floats = quantized = inputs
    if prefix:  # a part of the model: what comes in depends on what is before it
        floats, quantized = (_seen(qmodel, region, inputs, cache, mode) for mode in (Mode.FLOAT, Mode.QUANTIZE))
    return Stream(region, floats, cache, device), Stream(region, quantized, cache, device)


def _seen(
    qmodel: nn.Module, region: CapturedModule, inputs: Sequence[Stored], cache: Cache, mode: Mode
) -> list[Stored]:
    """What a region is called with while the model runs."""
    seen: list[Stored] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(cache.store(pytree.tree_map_only(Tensor, lambda t: t.cpu(), (args, kwargs))))

    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    hook = region.register_forward_pre_hook(see, with_kwargs=True)
    set_mode(qmodel, mode)
    try:
        with torch.no_grad():
            for stored in inputs:
                args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), stored.load())
                qmodel(*args, **kwargs)
    finally:
        set_mode(qmodel, Mode.QUANTIZE)
        hook.remove()
    return seen


def check_float_weights(qmodel: nn.Module, algorithm: str) -> None:
    """Raise AlgorithmError for a model whose rounding was learned: its float weights are gone, and the target with
    them."""
    decided = [name for name, q in quantizers(qmodel).items() if q.weight and q.state.fixed]
    if decided:
        raise AlgorithmError(
            f"{algorithm} compares the quantized model with the float one, and the float weights of {len(decided)} "
            f"layers ({decided[0]} for one) are gone: their rounding was learned before. Quantize the float model "
            "anew, with the step in its place (halfeven.quantize knows the order)."
        )


@contextmanager
def in_float(unit: Unit) -> Iterator[None]:
    """While this lasts, the quantizers of a unit pass their tensors through."""
    modules = [module_of(node) for node in unit.nodes if node.op == "call_module"]
    found = [q for module in modules for q in module.modules() if isinstance(q, Quantizer)]
    modes = [q.mode for q in found]
    for quantizer in found:
        quantizer.mode = Mode.FLOAT
    try:
        yield
    finally:
        for quantizer, mode in zip(found, modes, strict=True):
            quantizer.mode = mode

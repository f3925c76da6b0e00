"""Activations of a model block by block, for many batches, within a bound on memory.

An `ActivationCache` holds, for every batch, the tensors that the next blocks will read. Each block runs once per batch,
and a tensor that no later block reads is released. So the work grows with the number of layers, not with its square,
and the memory with the tensors that are alive at one place of the graph.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import AlgorithmError
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op, operations
from halfeven.layerwise.blocks import Block
from halfeven.layerwise.cache import BoundedCache, Stored
from halfeven.quantization.model_quantizers import quantizers, set_mode
from halfeven.quantization.quantizer import Mode, Quantizer

Values = dict[fx.Node, Any]
RunModule = Callable[[nn.Module, tuple[Any, ...]], Any]


def run_module(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Run a module on its arguments."""
    return module(*args)


class ActivationCache:
    """Holds the tensors that pass from block to block, for each batch, in one form of a model (float or quantized).

    Args:
        region: the captured graph that the blocks were cut from.
        batches: stored arguments of the region, (args, kwargs), batch by batch.
        store: receives the tensors.
        device: device that blocks run on.
    """

    def __init__(
        self, region: CapturedModule, batches: Sequence[Stored], store: BoundedCache, device: torch.device
    ) -> None:
        self.region = region
        self.store = store
        self.device = device
        self.placeholders = [op.node for op in operations(region.graph) if op.is_input]
        self.batches = list(batches)
        self.values: list[dict[fx.Node, Stored]] = [{} for _ in batches]

    def inputs(self, block: Block, batch: int) -> Values:
        """Return the values that a block reads from outside itself, for the batch of this index."""
        values: Values = {}
        if any(Op(node).is_input for node in block.inputs):
            # The region's own inputs are stored once per batch and not among `values`, since both forms of a whole
            # model share them.
            args, kwargs = self.batches[batch].load()
            values = dict(zip(self.placeholders, self.region.flat_inputs(*args, **kwargs), strict=True))
        found = {n: values[n] if n in values else self.values[batch][n].load() for n in block.inputs}
        return self._on_device(found)

    def outputs(self, block: Block, batch: int) -> Values:
        """Return a block's output values for the batch of this index, after `advance`."""
        return self._on_device({node: self.values[batch][node].load() for node in block.outputs})

    def _on_device(self, values: Values) -> Values:
        if self.device.type == "cpu":  # the store keeps them there
            return values
        moved: Values = pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), values)
        return moved

    @torch.no_grad()
    def advance(self, block: Block, call: RunModule = run_module) -> None:
        """Run a block on every batch and keep its outputs.

        Args:
            block: the block that follows those run before.
            call: runs each module, as for `run`.
        """
        for batch, values in enumerate(self.values):
            for node, value in run(block, self.inputs(block, batch), call).items():
                # The cache's bound counts RAM: on a GPU the activations of all batches would not fit.
                values[node] = self.store.store(pytree.tree_map_only(Tensor, lambda t: t.cpu(), value))

    @torch.no_grad()
    def visit(self, block: Block, call: RunModule) -> None:
        """Run a block on every batch for `call` to see its tensors, and keep nothing."""
        for batch in range(len(self.values)):
            run(block, self.inputs(block, batch), call)

    def release(self, done: Iterable[Block]) -> None:
        """Release the tensors that no block reads except these, which are finished."""
        inside = {node for block in done for node in block.nodes}
        for values in self.values:
            # A list first: entries are deleted from the dictionary during the loop.
            for node in [n for n in values if all(user in inside for user in n.users)]:
                del values[node]


def run(block: Block, values: Values, call: RunModule = run_module) -> Values:
    """Run a block's nodes and return the values of its outputs.

    Args:
        block: the block.
        values: the value of each of its input nodes.
        call: runs a module on its arguments; a caller may replace a module or watch its output here.
    """
    known = dict(values)

    def look_up(node: fx.Node) -> Any:
        read = Op(node)
        return read.constant if read.is_constant else known[node]

    for op in map(Op, block.nodes):
        # Node by node rather than by the region's generated code, so that a caller can watch or replace each module.
        args = fx.node.map_arg(op.node.args, look_up)
        kwargs = fx.node.map_arg(op.node.kwargs, look_up)
        module = op.module
        if module is None:
            known[op.node] = op.function(*args, **kwargs)
        else:
            # Only modules that stay Python take keywords; no caller replaces or watches these.
            known[op.node] = module(*args, **kwargs) if kwargs else call(module, args)
    return {node: known[node] for node in block.outputs}


def activation_caches(
    qmodel: nn.Module, prefix: str, inputs: Sequence[Stored], store: BoundedCache
) -> tuple[ActivationCache, ActivationCache]:
    """Return the caches of a region's float and quantized form, both before its first block.

    Args:
        qmodel: a calibrated model.
        prefix: path of the region; "" for the whole model.
        inputs: arguments of the model, batch by batch, from `store_inputs`.
        store: receives the tensors of both.
    """
    floats = activation_cache(qmodel, prefix, inputs, store, Mode.FLOAT)
    return floats, activation_cache(qmodel, prefix, inputs, store, Mode.QUANTIZE)


def activation_cache(
    qmodel: nn.Module, prefix: str, inputs: Sequence[Stored], store: BoundedCache, mode: Mode
) -> ActivationCache:
    """Return the cache of a region in one form, before its first block; the arguments are those of `activation_caches`.

    The float form is to be had before an algorithm changes any weight or bias of the model: inside of a model, the
    arguments of a region come out of the modules before it.
    """
    region: Any = qmodel.get_submodule(prefix)
    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    # Before its first layer, a whole model has the same arguments in both forms: they are stored once.
    arguments = _region_arguments(qmodel, region, inputs, store, mode) if prefix else inputs
    return ActivationCache(region, arguments, store, device)


def _region_arguments(
    qmodel: nn.Module, region: CapturedModule, inputs: Sequence[Stored], store: BoundedCache, mode: Mode
) -> list[Stored]:
    """Return the arguments, (args, kwargs), that a region is called with while the whole model runs."""
    seen: list[Stored] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(store.store(pytree.tree_map_only(Tensor, lambda t: t.cpu(), (args, kwargs))))

    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    # The model around the region is Python, which cannot be cut into blocks: it runs whole, once per form.
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
    """Check that a model still has its float weights, which are the target of an algorithm.

    Raises:
        AlgorithmError: the rounding of weights was learned before, so that only rounded weights are left.
    """
    decided = [name for name, q in quantizers(qmodel).items() if q.weight and q.state.fixed]
    if decided:
        raise AlgorithmError(
            f"{algorithm} compares the quantized model with the float model, but the float weights of {len(decided)} "
            f"layers ({decided[0]}, for example) are gone: their rounding was learned before. Quantize the float model "
            "again with this step enabled; halfeven.quantize runs the steps in the right order."
        )


@contextmanager
def block_in_float(block: Block) -> Iterator[None]:
    """Switch the quantizers of a block off; restore their modes at the end."""
    modules = [op.module for op in map(Op, block.nodes) if op.module is not None]
    # Quantizers of activations are nodes of the block themselves; those of weights are inside of its layers.
    found = [q for module in modules for q in module.modules() if isinstance(q, Quantizer)]
    modes = [q.mode for q in found]
    for quantizer in found:
        quantizer.mode = Mode.FLOAT
    try:
        yield
    finally:
        for quantizer, mode in zip(found, modes, strict=True):
            quantizer.mode = mode

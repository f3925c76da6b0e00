"""Capture the blocks inside of a forward that change how torch computes: `torch.no_grad` and `torch.autocast`.

`torch.export` puts such a block into a graph of its own, which could not be quantized. A block without gradients is put
back in its place, and its results pass no gradient on; one under `torch.inference_mode` counts as such. A block of
automatic mixed precision is captured in float32: a runtime chooses its precision itself.
"""

import operator
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from halfeven.graph.torch_private import autocast_dtype

aten = torch.ops.aten


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch off, within the context, the automatic mixed precision that the caller may have switched on."""
    with ExitStack() as stack:
        for device in {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off, within the context, the fused kernel of `nn.MultiheadAttention`, which hides the layers inside of it.

    Behind a padding mask it also leaves zeros where the layers compute other values.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[list[str]]:
    """Run a model within the context in float32, and let `len(tensor)` in its code be the free size of the first axis.

    Yields:
        The lines of code whose blocks of automatic mixed precision have run in float32 so far.
    """
    found: dict[str, None] = {}
    lines: list[str] = []
    modes: list[ExitStack] = []

    def enter(block: torch.autocast) -> torch.autocast:
        # A stack, since blocks may lie inside of each other; a block that is switched off adds no mode.
        modes.append(ExitStack())
        if (dtype := autocast_dtype(block)) is not None:
            modes[-1].enter_context(_InFloat32(dtype))
            line = f"{_model_line()} ({str(dtype).removeprefix('torch.')})"
            if line not in found:
                found[line] = None
                lines.append(line)
        return block

    def enter_inference(block: torch.inference_mode) -> None:
        # Its tensors could take no part in a graph that is trained.
        modes.append(ExitStack())
        modes[-1].enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and not block.mode))

    def leave(block: Any, *exception: Any) -> None:
        modes.pop().close()

    # An autocast around the capture is switched off; those in the model's code meet `enter` and `leave` in place of
    # their own.
    with ExitStack() as stack:
        stack.enter_context(without_autocast())
        stack.enter_context(without_fast_path())
        stack.enter_context(patch.object(torch.autocast, "__enter__", enter))
        stack.enter_context(patch.object(torch.autocast, "__exit__", leave))
        stack.enter_context(patch.object(torch.inference_mode, "__enter__", enter_inference))
        stack.enter_context(patch.object(torch.inference_mode, "__exit__", leave))
        stack.enter_context(_symbolic_len(model))
        yield lines


@contextmanager
def _symbolic_len(model: nn.Module) -> Iterator[None]:
    """Give the files of a model's classes a `len` that returns the symbol of a free axis.

    Python's own makes a constant of it. It stays what it is: torch's compiler knows builtins by identity.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    names = {c.__module__ for c in classes if c.__module__.partition(".")[0] not in ("torch", "builtins")}
    files = [sys.modules[name] for name in names if name in sys.modules]
    spaces = {id(vars(file)): vars(file) for file in files if "len" not in vars(file)}
    for space in spaces.values():
        space["len"] = _symbolic_length
    try:
        yield
    finally:
        for space in spaces.values():
            del space["len"]


def _symbolic_length(value: Any, /) -> Any:
    size: Any = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
    return size if isinstance(size, torch.SymInt) else len(value)


def _model_line() -> str:
    """Return the line of the model's own code that is being run: "file:line"."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "/graph/inline" not in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}"


class _InFloat32(TorchFunctionMode):
    """Makes conversions to a smaller floating type conversions to float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.methods = {Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A model may convert to its block's type by itself: `x.half()`, `x.to(torch.float16)`.
        if self.methods.get(func) == self.dtype:
            return Tensor.float(*args, **kwargs)
        args = tuple(torch.float32 if a is self.dtype else a for a in args)
        kwargs = {name: torch.float32 if a is self.dtype else a for name, a in kwargs.items()}
        return func(*args, **kwargs)


def inline_grad_blocks(module: fx.GraphModule) -> None:
    """Put the graphs of blocks under `torch.no_grad` or `torch.enable_grad` back in their places, in an exported graph.

    The results of a block without gradients are detached, so that its parameters get none, as in the float model.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        # The operator takes the mode, the block's graph and its operands, and returns a tuple, which `getitem` takes
        # apart.
        enabled, block, *operands = node.args
        inner = module.get_submodule(block.target)
        assert isinstance(inner, fx.GraphModule)
        inline_grad_blocks(inner)
        results = _copy_nodes(graph, node, inner.graph, operands)
        if not enabled:
            results = [x if x in operands else _detach_result(graph, node, x) for x in results]
        for reader in list(node.users):
            assert reader.target is operator.getitem
            reader.replace_all_uses_with(results[reader.args[1]])
            graph.erase_node(reader)
        graph.erase_node(node)
        if not block.users:
            graph.erase_node(block)


def _copy_nodes(graph: fx.Graph, before: fx.Node, inner: fx.Graph, operands: list[Any]) -> list[Any]:
    """Copy a block's nodes in front of a node, and return the nodes of its results."""
    copies: dict[fx.Node, Any] = dict(zip([n for n in inner.nodes if n.op == "placeholder"], operands, strict=True))
    results: list[Any] = []
    with graph.inserting_before(before):
        for node in inner.nodes:
            if node.op == "output":
                results = list(fx.node.map_arg(node.args[0], lambda n: copies[n]))
            elif node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
    return results


def _detach_result(graph: fx.Graph, before: fx.Node, value: Any) -> Any:
    floating = isinstance(value, fx.Node) and isinstance(v := value.meta.get("val"), Tensor) and v.is_floating_point()
    if not floating:
        return value
    with graph.inserting_before(before):
        result = graph.call_function(aten.detach.default, (value,))
    result.meta = dict(value.meta)
    return result

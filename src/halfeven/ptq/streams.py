"""Activations on their way through a model, unit by unit, kept within a bound of memory.

A stream holds, for every batch, the tensors that the next units will read. Each unit is run once per batch, and what
nothing reads any more is let go; so the work grows with the number of layers, not with its square, and the memory with
the tensors that are alive at one place of the graph.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from halfeven.errors import AlgorithmError, CalibrationError
from halfeven.graph.capture import inputs_of
from halfeven.graph.operators import module_of
from halfeven.graph.restoration import CapturedModule
from halfeven.ptq.units import Unit
from halfeven.quantizer import Mode, Quantizer, quantizers, set_mode

Values = dict[fx.Node, Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Call = Callable[[nn.Module, tuple[Any, ...]], Any]


def run_module(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """A module on its arguments, as it stands."""
    return module(*args)


class Stored:
    """A value in a cache: in RAM, or in a file that goes with it."""

    def __init__(self, value: Any, file: Path | None) -> None:
        self._value = None if file else value
        self._file = file

    def load(self) -> Any:
        """The value; one on disk is read anew each time."""
        return torch.load(self._file, weights_only=True) if self._file else self._value


class Cache:
    """Holds values in RAM up to a bound, and beyond it in files of a temporary folder.

    A value lives as long as the `Stored` that stands for it.

    Args:
        memory: bytes that may lie in RAM.
        folder: where the temporary folder is made; "" for the system's place.
    """

    def __init__(self, memory: float, folder: str = "") -> None:
        self.memory, self.used, self.on_disk, self.files = memory, 0, 0, 0
        self._parent = folder or None
        self._folder: Path | None = None

    def store(self, value: Any) -> Stored:
        """Take a value: any nesting of lists, tuples and dicts of tensors and numbers."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        fits = self.used + size <= self.memory
        stored = Stored(value, None if fits else self._write(value))
        weakref.finalize(stored, self._release, size if fits else 0, stored._file)
        self.used += size if fits else 0
        self.on_disk += 0 if fits else size
        return stored

    def _write(self, value: Any) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="halfeven-", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.files += 1
        path = self._folder / f"{self.files}.pt"
        torch.save(value, path)
        return path

    def _release(self, size: int, file: Path | None) -> None:
        self.used -= size
        if file is not None:
            file.unlink(missing_ok=True)


def rebatched(loader: Iterable[Any], size: int, batches: int | None = None) -> list[Arguments]:
    """The model's arguments for batches of `size` samples, cut from those of a loader; a remainder stays smaller.

    Batches of the loader that are smaller stay as they are.

    Raises:
        CalibrationError: the loader gave nothing.
    """
    result: list[Arguments] = []
    for batch in islice(loader, batches):
        leaves, spec = pytree.tree_flatten(inputs_of(batch))
        samples = max((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), default=1)
        for start in range(0, samples, size):
            result.append(pytree.tree_unflatten([_part(leaf, samples, start, size) for leaf in leaves], spec))
    if not result:
        raise CalibrationError(
            "The loader gave no batch, so there is nothing to compare the quantized model with the float one on. Give "
            "a loader with at least one batch; an iterator that was used up before looks empty."
        )
    return result


def _part(leaf: Any, samples: int, start: int, size: int) -> Any:
    is_batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == samples
    return leaf[start : start + size].clone() if is_batched else leaf


class Stream:
    """The tensors that cross from unit to unit, for each batch, in one version of the model (float or quantized).

    Args:
        batches: the stored values of the graph's placeholders, in order, for each batch.
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
            values = dict(zip(self.placeholders, self.batches[batch].load(), strict=True))
        found = {n: values[n] if n in values else self.values[batch][n].load() for n in unit.inputs}
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), found)  # type: ignore[no-any-return]

    def outputs(self, unit: Unit, batch: int) -> Values:
        """What a unit gave, for a batch, after `advance`."""
        found = {node: self.values[batch][node].load() for node in unit.outputs}
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), found)  # type: ignore[no-any-return]

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


def streams(qmodel: nn.Module, prefix: str, inputs: Sequence[Any], cache: Cache) -> tuple[Stream, Stream]:
    """The float and the quantized stream of a region, at its start.

    Args:
        inputs: the arguments of the model, batch by batch, as `rebatched` gives them.
    """
    region: Any = qmodel.get_submodule(prefix)
    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    floats, quantized = _region_inputs(qmodel, prefix, inputs, cache)
    return Stream(region, floats, cache, device), Stream(region, quantized, cache, device)


def _region_inputs(
    qmodel: nn.Module, prefix: str, inputs: Sequence[Any], cache: Cache
) -> tuple[list[Stored], list[Stored]]:
    """What a region is called with, for each batch, in the float and in the quantized model."""
    region: Any = qmodel.get_submodule(prefix)
    if not prefix:  # the same for both: kept once
        stored = [cache.store(region.flat_inputs(*args, **kwargs)) for args, kwargs in inputs]
        return stored, stored
    return (
        _seen_inputs(qmodel, region, inputs, cache, Mode.FLOAT),
        _seen_inputs(qmodel, region, inputs, cache, Mode.QUANTIZE),
    )


def _seen_inputs(
    qmodel: nn.Module, region: CapturedModule, inputs: Sequence[Any], cache: Cache, mode: Mode
) -> list[Stored]:
    seen: list[Stored] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        values = pytree.tree_map_only(Tensor, lambda t: t.cpu(), region.flat_inputs(*args, **kwargs))
        seen.append(cache.store(values))

    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    hook = region.register_forward_pre_hook(see, with_kwargs=True)
    set_mode(qmodel, mode)
    try:
        with torch.no_grad():
            for args, kwargs in pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs):
                qmodel(*args, **kwargs)
    finally:
        set_mode(qmodel, Mode.QUANTIZE)
        hook.remove()
    return seen


def check_float_weights(qmodel: nn.Module, algorithm: str) -> None:
    """Raise AlgorithmError for a model whose rounding was learned: its float weights are gone, and the target with
    them."""
    decided = [name for name, q in quantizers(qmodel).items() if q.weight and not q.calibrates]
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

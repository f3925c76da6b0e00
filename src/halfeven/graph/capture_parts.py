"""Capture the largest parts of a model that `torch.export` makes a graph of; the code between them stays Python."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CaptureError
from halfeven.graph.batches import Inputs
from halfeven.graph.capture_report import CaptureReport, LeftInPython
from halfeven.graph.copying import copy_model
from halfeven.graph.dynamic_shapes import FreeAxes
from halfeven.graph.export_module import export_module
from halfeven.graph.fixed_axes import FixedAxisError
from halfeven.graph.kept_in_python import KeptInPython, relative_to, returning_others
from halfeven.graph.output_classes import register_classes
from halfeven.graph.parts import called_modules
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.restoring import same_random_numbers, state_restored
from halfeven.graph.same_outputs import reason_of
from halfeven.graph.single_samples import batch_axis_hint
from halfeven.graph.torch_private import pytree
from halfeven.graph.training_outputs import TrainingOutputsError
from halfeven.graph.training_run import map_tensors
from halfeven.graph.view import computes_products


@dataclass(frozen=True)
class PartsCapture:
    """Capture a model in its largest parts, again and again with other modules kept in Python.

    Parts that stay the same are exported once.
    """

    model: nn.Module
    recorded: Mapping[str, list[Inputs]]
    """The arguments of each submodule's calls, by its name; "" is the model."""
    free_axes_of: Callable[[str], FreeAxes]
    """Returns the free axes of a submodule's arguments, by its name."""
    leave_out: tuple[str, ...]
    """Submodules that stay Python at the user's request."""
    exported: dict[tuple[str, tuple[str, ...], tuple[str, ...]], CapturedModule] = field(default_factory=dict)
    """The parts exported so far, by their names, the modules kept in them, and those that return others in training."""

    def capture(self, kept: Mapping[str, KeptInPython], report: CaptureReport) -> nn.Module:
        """Return the model with its largest parts as graphs.

        Args:
            kept: the modules whose own code stays Python, by name.
            report: gets the parts, and the submodules that stay Python, with their reasons.

        Raises:
            CaptureError: no part could be captured.
            FixedAxisError: the model's code makes an axis that the user frees a constant.
            TrainingOutputsError: a graph cannot return what its modules return in training.
        """
        parts: dict[str, CapturedModule] = {}
        self._capture_in(self.model, "", kept, report, parts)
        if not parts:
            reasons = "\n  ".join(str(reason) for reason in (*report.left, *report.kept))
            raise CaptureError(
                "No part of the model could be captured, so no part of it can be quantized. These were tried:\n  "
                f"{reasons}\nMend the named lines, or leave those submodules out with leave_out=[...]."
            )
        return parts[""] if "" in parts else self._with_parts(parts)

    def _capture_in(
        self,
        module: nn.Module,
        name: str,
        kept: Mapping[str, KeptInPython],
        report: CaptureReport,
        parts: dict[str, CapturedModule],
    ) -> None:
        """Capture a module whole, or else the largest parts in it; add them to `parts`, by name."""
        if name in self.leave_out:
            report.left.append(LeftInPython(name, "left out at your request"))
            return
        prefix = f"{name}." if name else ""
        if not any(called == name or called.startswith(prefix) for called in self.recorded):
            report.left.append(LeftInPython(name, "the example input does not lead to it"))
            return
        # A module whose own forward stays Python, or that is left out, divides the graph: what holds it cannot be one
        # part.
        shells = [k.name for k in kept.values() if not k.whole and not k.in_graph]
        broken_by = [inner for inner in (*self.leave_out, *shells) if inner.startswith(prefix)]
        is_kept = name in kept and not kept[name].in_graph
        if name in self.recorded and not is_kept and not broken_by:
            part = self._export(module, name, kept, report)
            # Python may read the parts of one without products, which gains nothing as a graph.
            if part is not None and (not shells or computes_products(part.graph)):
                parts[name] = part
                report.regions.append(name)
                return
        # Else the largest parts inside. A child without parameters has no layers: it stays with the code that calls it.
        for child_name, child in module.named_children():
            if any(True for _ in child.parameters()):
                self._capture_in(child, prefix + child_name, kept, report, parts)

    def _export(
        self, module: nn.Module, name: str, kept: Mapping[str, KeptInPython], report: CaptureReport
    ) -> CapturedModule | None:
        """Export a module; None where it cannot be, which the report then gives the reason of."""
        kept_inside = tuple(relative_to(name, kept))
        others = tuple(returning_others(name, kept))
        key = (name, kept_inside, others)  # what is kept elsewhere does not change this part
        try:
            if key not in self.exported:
                given = self.recorded[name][0]
                self.exported[key] = export_module(module, given, self.free_axes_of(name), name, kept_inside, others)
        except (FixedAxisError, TrainingOutputsError):
            raise
        except Exception as error:  # torch.export raises many kinds: each is reported with its line
            report.left.append(LeftInPython(name, reason_of(error)))
            return None
        return self.exported[key]

    def _with_parts(self, parts: Mapping[str, CapturedModule]) -> nn.Module:
        """Return a copy of the model that shares its parameters, with graphs in the places of the parts."""
        # A deep copy returns what is in its memo: so the copy has modules of its own and the model's tensors.
        memo: dict[int, Any] = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        copy = copy_model(self.model, memo)
        for name, part in parts.items():
            parent, _, attribute = name.rpartition(".")
            setattr(copy.get_submodule(parent), attribute, part)
        return copy


def record_inputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, list[Inputs]]:
    """Return the (positional, keyword) arguments of each submodule's calls, by name; after the first, shapes alone.

    Raises:
        CaptureError: the model does not run on the arguments.
    """
    seen: dict[str, list[Inputs]] = {}

    def record(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        call = (args, kwargs)
        if name in seen:
            # The tensors of all calls together may not fit in memory.
            call = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), call)
        seen.setdefault(name, []).append(call)

    handles = [
        module.register_forward_pre_hook(partial(record, name=name), with_kwargs=True)
        for name, module in called_modules(model)
        if name
    ]
    try:
        with torch.no_grad(), state_restored(model), same_random_numbers():
            args, kwargs = map_tensors(Tensor.clone, (args, kwargs))  # it may change its inputs
            outputs = model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"The model does not run on the example input, so it cannot be captured: {error}\nPass an example that "
            "`model(...)` takes: a tensor, a tuple of positional arguments or a dict of keyword arguments."
            f"{batch_axis_hint(model, args, kwargs)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    register_classes([outputs, *(calls[0] for calls in seen.values())])
    return seen

"""Find what a captured graph loses of a model's training mode, and the modules to keep in Python for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfeven.errors import CaptureError
from halfeven.graph.attention_dropout import may_lack_dropouts, restore_dropouts
from halfeven.graph.batches import sample_count
from halfeven.graph.kept_in_python import KeptInPython, can_be_whole
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.training_run import TrainingRun, differences, map_tensors, run_in_training
from halfeven.graph.training_suspects import Export, Suspicion, suspects, training_inputs

Kept = dict[str, KeptInPython]


@dataclass(frozen=True)
class Capture:
    """The functions that capture a model and its parts."""

    capture: Callable[[Kept], nn.Module]
    """Captures the model with the modules that it is given kept in Python."""
    check: Callable[[nn.Module], None]
    """Raises an error for a captured model that differs in eval mode."""
    export: Export
    """Captures a part of the model alone, on its arguments."""
    may_return_others: bool = True
    """Graphs may return other outputs in training: not where they return a loss, which reads those of eval mode."""


@dataclass(frozen=True)
class TrainingCapture:
    """A captured model that trains as its original does."""

    model: nn.Module
    kept: tuple[KeptInPython, ...] = ()
    notes: tuple[str, ...] = ()
    lost_in_attention: int = 0
    """Dropouts of attention that are not in the graph."""


def capture_as_trained(model: nn.Module, args: Any, kwargs: Any, how: Capture) -> TrainingCapture:
    """Capture a model, compare it with the original in training mode, and keep modules in Python where they differ.

    Args:
        model: the original.
        args, kwargs: its arguments, of at least two samples.
        how: how the model is captured.

    Raises:
        CaptureError: the captured model trains in another way, whatever is kept.
    """
    captured = how.capture({})
    how.check(captured)
    try:
        comparison = _Comparison.of(model, args, kwargs, captured)
    except Exception as error:  # the model's own code, which may want labels in training
        note = (
            f"In training mode the model does not run on the example ({_first_line(error)}), so what it does in "
            "training alone was not looked for: the quantized model computes in training what it computes in eval mode."
        )
        return TrainingCapture(captured, notes=(note,))
    kept: Kept = {}
    said = comparison.differences(captured)
    if not said:
        return _with_dropouts(TrainingCapture(captured), model, comparison.run)
    candidates = comparison.suspects(how.export)
    others: list[str] = []
    while said:
        # From the least to the most that stays Python: suspected modules, then those modules with their children
        # captured apart, then whole regions.
        new = next((found for found in candidates if found), {})
        if not new:
            new = {name: replace(k, whole=False) for name, k in kept.items() if k.whole}
        if not new:
            new = comparison.differing_regions(captured, kept)
        if not new:
            unsure = _refuse_unless_random(comparison, captured, tuple(kept.values()), said)
            return _with_dropouts(unsure, model, comparison.run)
        others += [name for name, k in new.items() if k.in_graph]
        kept = kept | {name: replace(k, in_graph=False) for name, k in new.items()}
        # Best is one graph, which returns in training what the model returns there. Else the code stays Python.
        if found := _capture_with_training_outputs(kept, others, how, comparison):
            captured, kept = found
            break
        captured, kept = _capture_with_kept(model, kept, how)
        said = comparison.differences(captured)
    return _with_dropouts(TrainingCapture(captured, tuple(kept.values())), model, comparison.run)


def restored_dropouts(captured: nn.Module, model: nn.Module, args: Any, kwargs: Any) -> TrainingCapture:
    """Give the dropouts of a captured model the probabilities of training mode, in place, from a run of its original.

    Args:
        captured: the captured model, with what differs in training kept in Python.
        model: the original.
        args, kwargs: its arguments.
    """
    found = TrainingCapture(captured)
    if not may_lack_dropouts(captured, model):
        return found
    try:
        return _with_dropouts(found, model, run_in_training(model, *_two_samples(args, kwargs)))
    except Exception:  # the model's own code, which may want labels in training: the plan says so
        return found


def _with_dropouts(found: TrainingCapture, model: nn.Module, run: TrainingRun) -> TrainingCapture:
    """Restore the dropouts that a captured graph lost, because the code calls them with 0 in eval mode."""
    lost = restore_dropouts(found.model, model, run.dropouts, in_attention=False)
    lost_in_attention = restore_dropouts(found.model, model, run.dropouts, in_attention=True)
    note = (
        f"{lost} dropout{'s have' if lost > 1 else ' has'} no effect in training: the code does not call F.dropout in "
        "eval mode, in which the model is captured. Call F.dropout(x, p, self.training), or use nn.Dropout, to keep it."
    )
    return replace(found, notes=(*found.notes, *([note] if lost else [])), lost_in_attention=lost_in_attention)


def _capture_with_training_outputs(
    kept: Kept, others: Sequence[str], how: Capture, comparison: "_Comparison"
) -> tuple[nn.Module, Kept] | None:
    """Capture a model in graphs that return in training what some modules return there.

    Args:
        kept: the modules that are kept in Python.
        others: those of them that return something else in training, by their own flag.
        how: how the model is captured.
        comparison: tells whether the result trains as the original.

    Returns:
        The captured model and the modules that are kept; None where graphs cannot do it.
    """
    changed = {name: replace(kept[name], in_graph=True) for name in others if not kept[name].whole}
    if not changed or not how.may_return_others:
        return None
    try:
        captured = how.capture(kept | changed)
        how.check(captured)
    except Exception:  # whatever it is, the modules stay Python
        return None
    regions = [name for name, module in captured.named_modules() if isinstance(module, CapturedModule)]
    are_inside = all(any(not r or f"{name}.".startswith(f"{r}.") for r in regions) for name in changed)
    return None if not are_inside or comparison.differences(captured) else (captured, kept | changed)


def _capture_with_kept(model: nn.Module, kept: Kept, how: Capture) -> tuple[nn.Module, Kept]:
    """Capture a model with modules kept in Python, and with those whose attributes the kept code reads."""
    while True:
        captured = how.capture(kept)
        try:
            how.check(captured)
            return captured, kept
        except AttributeError as error:
            names = {
                id(region): name for name, region in captured.named_modules() if isinstance(region, CapturedModule)
            }
            name = names.get(id(getattr(error, "obj", None)))
            if not name:
                raise CaptureError(
                    f"{', '.join(kept)} must stay Python for training, and the code that stays fails with the layers "
                    f"that were captured: {_first_line(error)}. Leave the submodules that it reads out with "
                    "leave_out=[...]."
                ) from error
            # The code needs the region as it was, so that stays Python too. Each turn adds a region, until none is
            # left.
            kept = kept | {name: KeptInPython(name, f"code that stays Python reads its {error.name}")}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _refuse_unless_random(
    comparison: "_Comparison", captured: nn.Module, kept: tuple[KeptInPython, ...], said: list[str]
) -> TrainingCapture:
    if comparison.repeats_itself():
        names = ", ".join(k.name or "(the model itself)" for k in kept) or "(the model itself)"
        raise CaptureError(
            f"In training the captured model differs from the original in {names}: {'; '.join(said)}. So it would be "
            "trained in another way than you wrote, although these modules stay Python. Move what training does there "
            "into a submodule of its own, or name the submodule in leave_out=[...]."
        )
    note = (
        "In training mode the model gives other results each time, even with the same random numbers, so its training "
        "could not be compared with that of the captured model."
    )
    return TrainingCapture(captured, kept, (note,))


@dataclass(frozen=True)
class _Comparison:
    """An original, its arguments, and its run in training mode."""

    model: nn.Module
    args: Any
    kwargs: Any
    run: TrainingRun
    parameters: Mapping[str, nn.Parameter]

    @staticmethod
    def of(model: nn.Module, args: Any, kwargs: Any, captured: nn.Module) -> "_Comparison":
        """Return the comparison on two samples, or on all where one of the models does not run on two."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        a, k = _two_samples(args, kwargs)
        try:
            with torch.no_grad():
                captured(*a, **k)
            run = run_in_training(model, a, k, parameters)  # BatchNorm of parts of a batch takes no part of one sample
        except Exception:  # whatever it is: where two samples are not the reason, the run on all raises it again
            a, k = args, kwargs
            run = run_in_training(model, a, k, parameters)
        return _Comparison(model, a, k, run, parameters)

    def differences(self, captured: nn.Module) -> list[str]:
        """Return the differences of a captured model from the original in training, a phrase each."""
        return _training_differences(self.run, captured, self.args, self.kwargs, self.parameters)

    def suspects(self, export: Export) -> Iterator[Kept]:
        """Return the modules whose own code has a training mode of its own, the most likely ones first."""
        for found in suspects(self.model, self.args, self.kwargs, export):
            yield {name: self._as_kept(name, said) for name, said in found.items()}

    def _as_kept(self, name: str, said: Suspicion) -> KeptInPython:
        whole = said.same_outputs and self._can_be_whole(name)
        return KeptInPython(name, said.text, whole, in_graph=said.by_flag and not whole)

    def _can_be_whole(self, name: str) -> bool:
        return bool(name) and can_be_whole(self.part(name))

    def part(self, name: str) -> nn.Module:
        """Return a module of the original."""
        return self.model.get_submodule(name)

    def differing_regions(self, captured: nn.Module, kept: Kept) -> Kept:
        """Return the captured regions that train in another way than the module that they were made of."""
        inputs = training_inputs(self.model, self.args, self.kwargs)
        found: Kept = {}
        for name, region in captured.named_modules():
            if not isinstance(region, CapturedModule) or name in kept or name not in inputs:
                continue
            part = self.part(name)
            parameters = dict(part.named_parameters(remove_duplicate=False))
            expected = run_in_training(part, *inputs[name], parameters)
            if said := _training_differences(expected, region, *inputs[name], parameters):
                found[name] = KeptInPython(name, "; ".join(said))
        return found

    def repeats_itself(self) -> bool:
        """Return True if a second run of the original gives the same results."""
        return not differences(self.run, run_in_training(self.model, self.args, self.kwargs, self.parameters))


def _training_differences(
    expected: TrainingRun, captured: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    try:
        found = run_in_training(captured, args, kwargs, parameters)
    except Exception as error:  # Python code around the graphs may use their modules otherwise in training
        return [f"the captured graph fails there ({_first_line(error)})"]
    return differences(expected, found)


def _two_samples(args: Any, kwargs: Any) -> tuple[Any, Any]:
    batch = sample_count((args, kwargs))
    result: tuple[Any, Any] = map_tensors(lambda x: x[:2] if x.ndim and len(x) == batch else x, (args, kwargs))
    return result

"""Capture a model in the form that a plan is made for: attention expanded, duplicates merged, BatchNorm folded.

The order matters: duplicates show only once operators are written out, and BatchNorm is folded into the layers left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import CaptureError, ConfigError, named
from halfeven.graph.attention_dropout import add_attention_dropouts
from halfeven.graph.batches import Example
from halfeven.graph.batchnorm import fold
from halfeven.graph.capture import capture
from halfeven.graph.capture_report import CaptureReport
from halfeven.graph.complex_numbers import lower_complex
from halfeven.graph.copying import copy_model
from halfeven.graph.kept_in_python import KeptInPython
from halfeven.graph.nearest_sizes import lower_uneven_resampling
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import expand_gates, lower_attention, lower_scatters, lower_stacked_sums, merge_duplicates
from halfeven.graph.torch_private import forgetting_graphs, pytree
from halfeven.placement.make_plan import regions
from halfeven.placement.options import QuantizationOptions
from halfeven.placement.plan import FoundInCapture
from halfeven.placement.sources import behind_convolution
from halfeven.placement.tied_weights import untie_for_folding
from halfeven.tables import counted


def _float32_copy(model: nn.Module, example: Example) -> tuple[nn.Module, Example, list[str]]:
    """Return a copy of a float model for capture to change, with an example for it, and sentences for the plan.

    The copy has no wrappers such as `torch.compile`. It is in float32, as its files are, also where the model is in
    another precision; floating inputs in that precision are then converted too.

    Raises:
        CaptureError: the model cannot be copied, or has nothing to capture: TorchScript, tensors without values.
        ConfigError: the model is quantized already.
    """
    _check_can_be_captured(model)
    if any(isinstance(m, CapturedModule) and m.halfeven_plan is not None for m in model.modules()):
        raise ConfigError(
            "This model is quantized already, and a second layer of quantizers could not be deployed. Give the float "
            "model; to change bits of a quantized model, use halfeven.set_rules(qmodel, rules)."
        )
    copy = copy_model(model)
    dtype = next((p.dtype for p in copy.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float32:
        return copy, example, []

    def converted(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == dtype else value

    given = dict(example) if isinstance(example, Mapping) else example
    note = (
        f"The model was in {str(dtype).removeprefix('torch.')}, and is quantized in float32: give float32 inputs, and "
        "train it in mixed precision with torch.autocast or with qmodel.bfloat16()."
    )
    return copy.float(), pytree.tree_map(converted, given), [note]


def _check_can_be_captured(model: nn.Module) -> None:
    """Refuse a model that has no Python code to trace, or no values.

    Raises:
        CaptureError: a module is TorchScript's, a tensor is on the meta device, or a submodule has a name that graphs
            need.
    """
    own = {*dir(CapturedModule)} - {*dir(nn.Module)}
    if taken := [name for name, _ in model.named_children() if name in own]:
        raise CaptureError(
            f"A captured model has {named(taken)} for itself, as every graph of torch does, so a submodule cannot be "
            "called so. Give it another name; in a checkpoint, rename its keys alike."
        )
    scripted = [
        name or "the model itself" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)
    ]
    if scripted:
        raise CaptureError(
            f"torch.export cannot trace TorchScript, so nothing of it could be quantized: {named(scripted)}. Give the "
            "Python model that it was made from, with the weights of its state_dict()."
        )
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise CaptureError(
            f"Tensors on the meta device have no values, so there is nothing to quantize: {named(empty)}. Load the "
            "weights first, for example with model.to_empty(device='cpu') and load_state_dict."
        )


def _notes_of(report: CaptureReport) -> list[str]:
    """Return the sentences of a plan about the capture."""
    notes = [f"Stays Python, in float: {left}" for left in report.left]
    how = {
        False: "Its own code stays Python, so that it trains as in float",
        True: "The graph returns in training what the float model returns there",
    }
    notes += [f"{how[kept.in_graph]}: {kept}" for kept in report.kept]
    notes += report.notes
    if report.fixed_batch:
        notes.append(f"The batch is fixed at {report.samples}, in training and in the file: {report.fixed_batch}.")
    if report.fixed_batch_of_file:
        why = report.fixed_batch_of_file
        notes.append(f"The batch of the file is fixed at {report.samples}, that of the example: {why}.")
    if report.in_float32:
        notes.append(
            "Blocks of automatic mixed precision run in float32, in training too; to train in mixed precision, put the "
            f"whole step under torch.autocast: {', '.join(report.in_float32)}."
        )
    return notes


def _write_out_gates(captured: nn.Module, options: QuantizationOptions) -> list[str]:
    """Write SiLU and hard-swish as products where the options ask for it, in place, and return a sentence for the plan.

    Raises:
        ConfigError: the options ask for it, and there is none.
    """
    if not options.quantize_gates:
        return []
    gates = sum(expand_gates(region, behind_convolution) for region in regions(captured).values())
    if not gates:
        raise ConfigError(
            "quantize_gates=True is for SiLU and hard-swish behind a convolution, and this model has none there, so it "
            "would have no effect. Leave it out."
        )
    return [f"{gates} SiLU and hard-swish are written out as the product of their input and its gate."]


@forgetting_graphs()
def capture_for_quantization(
    model: nn.Module,
    example: Example,
    options: QuantizationOptions,
    kept: Sequence[KeptInPython] | None = None,
) -> tuple[nn.Module, FoundInCapture]:
    """Capture a model and bring its graphs into the form that quantizers are placed in.

    Args:
        model: any module; it is not changed, and the result has its mode.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments.
        options: name the submodules that stay Python and the free axes, and decide about BatchNorm.
        kept: the modules whose own code stays Python for training, of an earlier plan; None: they are looked for.

    Returns:
        The captured model, and what the plan says about it.

    Raises:
        CaptureError: nothing of the model could be captured, it cannot be copied, or its code makes a free axis a
            constant.
        ConfigError: the model is quantized already, or `dynamic_shapes` names an input or axis that it does not have.
    """
    own, example, notes = _float32_copy(model, example)
    captured, report = capture(own, example, options.leave_out, kept, options.dynamic_shapes)
    notes += _notes_of(report)
    if written := sum(lower_complex(region) for region in regions(captured).values()):
        verb = "is" if written == 1 else "are"
        notes.append(
            f"{counted(written, 'operator')} on complex numbers {verb} written out with real and imaginary parts."
        )
    lowered = sum(lower_attention(region) for region in regions(captured).values())
    if lowered:
        verb = "is" if lowered == 1 else "are"
        notes.append(f"{counted(lowered, 'attention operator')} {verb} written out as products and softmax.")
    lost = report.lost_in_attention
    lost += sum(add_attention_dropouts(region, own.get_submodule(name)) for name, region in regions(captured).items())
    if lost:
        notes.append(
            f"The dropout inside of {counted(lost, 'attention operator')} has no effect in training: halfeven "
            "restores it where the attention is written out, and a causal one stays one operator. To keep it, write "
            "the attention as products, a softmax and nn.Dropout, or give it its mask instead of is_causal."
        )
    notes += _write_out_gates(captured, options)
    for region in regions(captured).values():
        # Runtimes merge equal operators. Merged here, they have a single quantizer.
        merge_duplicates(region)
        lower_stacked_sums(region)
        lower_scatters(region)
        lower_uneven_resampling(region)
    if options.batchnorm == "fold":
        if untied := untie_for_folding(captured):
            notes.append(
                f"No longer tied, and trained by themselves: {', '.join(untied)}. BatchNorm is folded into these "
                "layers, and other operators read the same weight without it."
            )
        for region in regions(captured).values():
            fold(region)
    captured.train(model.training)
    return captured, FoundInCapture(tuple(notes), report.kept)

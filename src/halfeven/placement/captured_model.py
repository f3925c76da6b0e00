"""Capture a model in the form that a plan is made for: attention expanded, duplicates merged, BatchNorm folded."""

from torch import nn

from halfeven.graph.batchnorm import fold
from halfeven.graph.capture import Example, capture
from halfeven.graph.rewrite import lower_attention, lower_stacked_sums, merge_duplicates
from halfeven.placement.make_plan import regions
from halfeven.placement.options import QuantizationOptions


def capture_for_quantization(
    model: nn.Module, example: Example, options: QuantizationOptions
) -> tuple[nn.Module, tuple[str, ...]]:
    """Capture a model and bring its graphs into the form that quantizers are placed in.

    Args:
        model: any module; the result shares its parameters, and its mode.
        example: an input as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments.
        options: name the submodules that stay Python, and decide about BatchNorm.

    Returns:
        The captured model, and notes for the plan about submodules in float and about rewritten operators.

    Raises:
        CaptureError: nothing of the model could be captured.
    """
    captured, report = capture(model, example, options.leave_out)
    notes = [f"Stays Python, in float: {left}" for left in report.left]
    lowered = sum(lower_attention(region) for region in regions(captured).values())
    if lowered:
        notes.append(
            f"{lowered} attention operators are written out as products and softmax. Dropout inside of them has no "
            "effect in training, because the model is captured in eval mode, where its probability is 0."
        )
    for region in regions(captured).values():
        merge_duplicates(region)
        lower_stacked_sums(region)
        if options.batchnorm == "fold":
            fold(region)
    captured.train(model.training)
    return captured, tuple(notes)

"""Refuse quantized gates of SiLU and hard-swish where a runtime gains nothing by them."""

from halfeven.errors import PlacementError
from halfeven.placement.options import QuantizationOptions
from halfeven.quantization.scheme import BITS_NAMED_FOR_FLOAT
from halfeven.targets.target import Target


def check_gates(options: QuantizationOptions, target: Target, activation_bits: int) -> None:
    """Refuse `quantize_gates` for a target or a scheme that computes these activations in float anyway.

    Raises:
        PlacementError: there would be no product of integers.
    """
    if not options.quantize_gates or (target.multiplies_gates and activation_bits != BITS_NAMED_FOR_FLOAT):
        return
    why = (
        f"the scheme {options.scheme} leaves activations in float"
        if activation_bits == BITS_NAMED_FOR_FLOAT
        else f"{target.name} computes SiLU and hard-swish with the layer before them"
    )
    raise PlacementError(
        f"quantize_gates=True computes SiLU and hard-swish as products of integers, and {why}, so it would only cost "
        "accuracy. Leave it out."
    )


def check_gates_deployable(options: QuantizationOptions, target: Target) -> None:
    """Refuse a target that would read the gates' integers and compute in float, slower than without quantizers.

    The quantizers are not dropped: the file would differ from the model that was trained and simulated.

    Raises:
        PlacementError: the model was prepared with `quantize_gates`, and the target does not multiply gates.
    """
    if options.quantize_gates and not target.multiplies_gates:
        raise PlacementError(
            f"This model was prepared with quantize_gates=True for {options.target}, and {target.name} computes SiLU "
            "and hard-swish with the layer before them: quantized gates would cost accuracy and time there. Prepare "
            f'the model with target="{target.name}" and without quantize_gates, or use target="{options.target}".'
        )

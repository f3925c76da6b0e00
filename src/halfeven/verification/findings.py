"""Find the differences of a report that are too large to be the rounding of float arithmetic."""

from collections.abc import Callable, Sequence
from typing import Any

from halfeven.errors import named
from halfeven.verification.file_precision import Float32Session
from halfeven.verification.outputs import OutputParity
from halfeven.verification.report import TensorParity

VISIBLE_DIFFERENCE = 1e-3
"""Smallest difference of an output, relative to the output, that counts: rounding in float32 stays far below."""

SHARE_OF_QUANTIZATION_ERROR = 0.5
"""Largest difference of an output from the exact simulation, over what quantization itself changes."""

MOVED_SHARE = 0.1
"""Largest share of a tensor's integers that float rounding moves, computed from the same integers before it. A few of a
thousand are usual; a weight that differs moves more than a tenth."""

FEWEST_MOVED = 10
"""Fewer integers than these are no share of a small tensor."""

FEWEST_INDICES = 2
"""Fewer values of an output of indices or masks than these may differ: single ones lie at a tie."""


SPREAD_SHARE = 0.05
"""Largest share of integers that differ from the float simulation in a whole model and need no explanation."""

SINGLE_ROUNDINGS = 0.005
"""Largest share of integers that float rounding moves in a model, with each layer alone."""

OTHER_WEIGHTS = (
    "The integer weights in the file are not those of this model: it was written from another checkpoint or with other "
    "bits, and all other differences follow from that. Export the model again; report it if that does not help."
)

OVERFLOWS = (
    "This processor has no VNNI, so its sums of 8-bit products can overflow: verify the file on a processor with VNNI, "
    'or quantize with scheme="w7a8" for processors like this one.'
)


def findings(outputs: Sequence[OutputParity], tensors: Sequence[TensorParity]) -> list[str]:
    """Return a sentence for each difference between the file and a simulation that float rounding does not explain."""
    found = [
        *(_not_exact(output) for output in outputs if differs_from_exact(output)),
        *_not_trained(outputs, tensors),
    ]
    near_zero = [tensor.name for tensor in tensors if tensor.near_zero]
    return [_near_zero_sentence(near_zero), *found] if found and near_zero else found


def judged(
    parity: dict[str, Any], proof: Callable[[], dict[str, Any]], *, needed: bool
) -> tuple[Float32Session | None, list[str], list[str]]:
    """Return the session in float32, where the file's own session differs, the findings, and notes.

    A difference is a fault of the file where float32 shows it too; in the runtime's own precision it is expected, and a
    note says it.

    Args:
        parity: the report's fields about integers and outputs in the file's own session.
        proof: compares all batches in float32, and returns the same fields of that session.
        needed: the file's session may compute float operators in another precision.
    """
    if not parity["weights_match"]:
        return None, [OTHER_WEIGHTS], []  # advice on single tensors would mislead
    found = findings(parity["outputs"], parity["tensors"])
    if found and parity["overflows"]:
        found.insert(0, f"{OVERFLOWS} Look at what follows if that does not help.")
    differs = parity["integer_match"] < 1  # false where no activation is quantized
    if not (needed and (differs or found)):
        return None, found, []
    proved = proof()
    names = ("integer_match", "alone_match", "first_difference", "output_difference")
    session = Float32Session(**{name: proved[name] for name in names})
    notes = [f"In the runtime's own precision: {difference}" for difference in found]
    return session, findings(proved["outputs"], proved["tensors"]), notes


def spread_notes(tensors: Sequence[TensorParity]) -> list[str]:
    """Return a sentence where the float simulation's integers differ in many places for single roundings; else none.

    It is for reports without findings, whose reader would take the share for a fault of the file.
    """
    count = sum(tensor.count for tensor in tensors)
    alone = sum(tensor.different_float_alone for tensor in tensors)
    whole = sum(tensor.different_float for tensor in tensors)
    if whole <= SPREAD_SHARE * count or alone > SINGLE_ROUNDINGS * count:
        return []
    return [
        f"Single roundings spread: {_percent_text(alone / count)} of the integers differ from the float simulation's "
        f"with each layer alone, {_percent_text(whole / count)} in the whole model. This is no fault of the file. "
        "Models with random weights spread them most."
    ]


def differs_from_exact(output: OutputParity) -> bool:
    """Return True where an output is further from the exact simulation than single roundings take it."""
    if not output.continuous:  # an index that changes has no size: its share counts
        share = max(MOVED_SHARE, SHARE_OF_QUANTIZATION_ERROR * output.moved_by_quantization)
        different = 1 - output.equal
        return different > share and round(different * output.count) >= FEWEST_INDICES
    return output.rms_difference > max(VISIBLE_DIFFERENCE, SHARE_OF_QUANTIZATION_ERROR * output.quantization_error)


def _not_exact(output: OutputParity) -> str:
    if not output.continuous:
        return (
            f'{_percent_text(1 - output.equal)} of the values of the output "{output.name}" differ from the exact '
            f"simulation's, and quantization itself changes {_percent_text(output.moved_by_quantization)}. The file "
            "does not compute what this model does: export the model again, and report it if that does not help. If "
            "the values need more than 32 bits, the file may be right: runtimes compute them in 32."
        )
    return (
        f'The output "{output.name}" differs from the exact simulation by {_percent_text(output.rms_difference)} of '
        "its size (root mean square), and quantization itself changes it by "
        f"{_percent_text(output.quantization_error)}. The file does not compute what this model does: export the model "
        "again, and report it if that does not help."
    )


def _not_trained(outputs: Sequence[OutputParity], tensors: Sequence[TensorParity]) -> list[str]:
    """Return a sentence for a difference of the file from the float simulation; none without.

    It names the first tensor or output that differs, given the same integers before it, or else the output that
    differs in a run of the whole model.
    """
    first = next((tensor for tensor in tensors if _has_moved(tensor)), None)
    if first is not None:
        share = _percent_text(first.different_float_alone / first.count)
        return [_advice_on_readers(f'{share} of the integers of "{first.name}" differ from the float simulation\'s')]
    real = [output for output in outputs if output.continuous]
    alone = next((output for output in real if _has_parted(output, output.float_simulation_difference_alone)), None)
    if alone is not None:
        size = _percent_text(alone.float_simulation_difference_alone)
        return [
            _advice_on_readers(f'the output "{alone.name}" differs from the float simulation\'s by {size} of its size')
        ]
    return [_spread_sentence(output) for output in real if _has_parted(output, output.float_simulation_difference)]


def _has_moved(tensor: TensorParity) -> bool:
    return tensor.different_float_alone > max(FEWEST_MOVED, MOVED_SHARE * tensor.count)


def _has_parted(output: OutputParity, difference: float) -> bool:
    return difference > max(VISIBLE_DIFFERENCE, output.quantization_error)


def _advice_on_readers(what: str) -> str:
    return (
        f"Given the same integers before it, {what}: the file computes there what was not trained, as where a layer's "
        "weight is read by another operator too. Its accuracy is not that of the simulation. Give that operator a "
        "weight of its own, or leave the layer in float with a Rule, and report it."
    )


def _near_zero_sentence(names: Sequence[str]) -> str:
    return (
        f"The values of {named(names)} are so near to 0 that the runtime forgets the zero point of their range, and "
        "they are off by a constant: this may be the reason of what follows. Let the layer before give larger values, "
        'give it 8 bits and a range that is not learned (Rule(activation_bits=8, ranges="calibrated")), or leave the '
        "layer behind in float by a Rule."
    )


def _spread_sentence(output: OutputParity) -> str:
    return (
        f'The output "{output.name}" differs from the float simulation, which is what was trained, by '
        f"{_percent_text(output.float_simulation_difference)} of its size (root mean square), more than quantization "
        f"itself changes it ({_percent_text(output.quantization_error)}). Each layer alone agrees: single roundings "
        "spread, most in models with random weights. Judge the file by its own accuracy, not by the simulation's."
    )


def _percent_text(share: float) -> str:
    return f"{100 * share:.3g} %"

"""Files whose float operators run in the precision of the runtime's choice: where integers differ for that reason, they
are compared once more in float32."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Float32Session:
    """The integers of a file in a session that computes float operators in float32, as the exact simulation does."""

    integer_match: float
    """Share of activation integers equal to the exact simulation's."""
    alone_match: float
    """The same where each tensor is computed from the session's own integers before it."""
    first_difference: str
    """The first activation whose integers differ; "" if none."""
    output_difference: float
    """Largest difference of an output from the exact simulation's, over the largest absolute value of that."""

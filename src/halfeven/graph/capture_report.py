"""The report of a capture: what became a graph, what stayed Python, and why."""

from dataclasses import dataclass, field

from halfeven.graph.kept_in_python import KeptInPython


@dataclass(frozen=True)
class LeftInPython:
    """A submodule that stays Python: its name ("" is the model itself), and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {self.reason}"


@dataclass
class CaptureReport:
    """The names of the captured regions ("" is the whole model), and the submodules that stayed Python."""

    regions: list[str] = field(default_factory=list)
    left: list[LeftInPython] = field(default_factory=list)
    kept: tuple[KeptInPython, ...] = ()
    """Modules whose own code stays Python, because it does something in training alone."""
    notes: tuple[str, ...] = ()
    """Properties that could not be compared, as sentences."""
    fixed_batch: str = ""
    """Why the batch is a constant, with the line of the model's code; "" where it is free."""
    fixed_batch_of_file: str = ""
    """Why the batch is a constant in files alone: the parts keep it free, and the code between them does not."""
    samples: int = 0
    """The batch of the example that was captured."""
    in_float32: list[str] = field(default_factory=list)
    """Lines of the model's code whose blocks of automatic mixed precision were captured in float32."""
    lost_in_attention: int = 0
    """Dropouts of attention in training that are not in the graph."""

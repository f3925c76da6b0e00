"""Define the entries of a plan: quantized tensors and weights, what is in float, and later changes of the graph."""

from dataclasses import dataclass, field, fields

from halfeven.quantization.own_class import OwnClass
from halfeven.quantization.quantizer import Ranges
from halfeven.quantization.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A quantized activation: a single quantizer, called after each of `places`."""

    name: str
    places: tuple[str, ...]
    """Names of the tensors, "region:tensor" where the model has several regions."""
    scheme: Scheme
    ranges: Ranges
    observer: str | OwnClass
    fixed_range: tuple[float, float] | None = None
    consumers: tuple[str, ...] = ()
    quantizer: OwnClass | None = None
    """Class of the user's that quantizes it; None: `Quantizer`."""

    @property
    def quantizer_name(self) -> str:
        """Name of its quantizer in messages and reports: all its places."""
        return " = ".join(self.places)


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """A quantized weight."""

    name: str
    """Name of the layer, as in `PlannedTensor.places`."""
    scheme: Scheme
    channels: int | None
    ranges: Ranges
    observer: str | OwnClass
    quantizer: OwnClass | None = None
    """Class of the user's that quantizes it; None: `Quantizer`."""
    operator: str = field(default="", compare=False)
    """Kind of the layer, for example "Conv2d"; "" in plans of earlier versions."""

    @property
    def quantizer_name(self) -> str:
        """Name of its quantizer in messages and reports."""
        return f"the weight of {self.name}"


@dataclass(frozen=True, kw_only=True)
class LeftInFloat:
    """An operator that computes in float, or one that computes in integers and whose result is not quantized."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GraphChanges:
    """The changes of algorithms to the graph after the plan was made; loading a checkpoint repeats them."""

    unclipped: tuple[str, ...] = ()
    """ReLU6 and clamp operators whose upper bound was removed, so that they are ReLUs now."""
    clipped_by_channel: tuple[str, ...] = ()
    """ReLU6 and other clips that have bounds of their own for each channel now."""
    given_biases: tuple[str, ...] = ()
    """Layers that had no bias and were given a bias."""
    rescaled: tuple[str, ...] = ()
    """LayerNorms that additions read through a factor and an offset of each channel, in float."""
    untied: tuple[str, ...] = ()
    """Parameters, such as "head.weight", that were copied for their layer before an algorithm changed them there,
    because other operators read them too."""

    def joined(self, later: "GraphChanges") -> "GraphChanges":
        """Return these changes and later ones, each name once."""
        both = {kind.name: (*getattr(self, kind.name), *getattr(later, kind.name)) for kind in fields(self)}
        return GraphChanges(**{kind: tuple(dict.fromkeys(names)) for kind, names in both.items()})

    def __str__(self) -> str:
        said = {
            "No longer clipped above (ReLU now)": self.unclipped,
            "Clipped at bounds of each channel": self.clipped_by_channel,
            "Layers that were given a bias": self.given_biases,
            "Read by additions through a factor and an offset of each channel": self.rescaled,
            "No longer tied to what else reads them": self.untied,
        }
        return "\n".join(f"{what}: {', '.join(names)}" for what, names in said.items() if names)
